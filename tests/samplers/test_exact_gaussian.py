"""Whole tables with the exact network of N(mean, std^2): what comes out is known, whatever the number of steps.

The network is affine in x, so that the mean and the variance of the state after every row follow from its columns.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.model_spec import ModelSpec
from stepfusion_testing.walking import Gaussian, walk

LINEAR, COSINE = sf.NoiseSchedule.linear(), sf.NoiseSchedule.cosine()
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@functools.cache
def moments_of(make: Any, schedule: sf.NoiseSchedule, steps: int, prediction: str, **options: Any) -> Any:
    """Those of an unclipped sampler with the exact network of N(0.5, 0.1^2)."""
    return moments(make(schedule, steps, clip=None, prediction=prediction, **options), 0.5, 0.1)


def moments(table: sf.StepTable, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of what an unclipped table makes of x ~ N(0, 1) with the exact network."""
    network = Gaussian(torch.from_numpy(table.schedule.alphas_cumprod.copy()), table.prediction, mean, std)
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    column = {name: table.column(name) for name in ("x0_x", "x0_out", "next_x0", "next_x", "next_out", "sigma")}
    m, variance = 0.0, 1.0
    for i, t in enumerate(table.timesteps):
        at_zero = float(network(zero, int(t)))
        slope = float(network(one, int(t))) - at_zero
        c = {name: float(values[i]) for name, values in column.items()}
        of_x0, of_out = c["x0_x"] + c["x0_out"] * slope, c["x0_out"] * at_zero
        factor = c["next_x0"] * of_x0 + c["next_x"] + c["next_out"] * slope
        m = factor * m + c["next_x0"] * of_out + c["next_out"] * at_zero
        variance = factor**2 * variance + c["sigma"] ** 2
    return m, variance**0.5


def test_501_of_1000() -> None:
    """The lowest 501 timesteps begin at 500, where an image of the cosine schedule is half signal."""
    mean, std = moments(sf.ddim(COSINE, 501, clip=None), 0.5, 0.1)
    assert mean == pytest.approx(0.5, abs=1e-3)
    assert std == pytest.approx(0.0985, abs=1e-3)
    for compat in ("diffusers", "guided-diffusion"):
        mean, std = moments(sf.ddim(COSINE, 501, clip=None, compat=compat), 0.5, 0.1)
        assert mean == pytest.approx(0.451, abs=2e-3)
        assert std == pytest.approx(0.138, abs=2e-3)


COUNTS = (30, 51, 99, 150, 334, 501, 667, 999)
MADE: tuple[tuple[Any, dict[str, Any]], ...] = ((sf.ddim, {}), (sf.ddim, {"eta": 1.0}), (sf.ddpm, {}))


def counted() -> list[Any]:
    """Schedules, samplers, counts and predictions: every pair of two of them, and the rest for ``make soak``."""
    found = []
    for i, schedule in enumerate((LINEAR, COSINE)):
        for (j, (make, options)), (k, steps) in itertools.product(enumerate(MADE), enumerate(COUNTS)):
            for n, prediction in enumerate(PREDICTIONS):
                marks = [] if (i + j + k + n) % len(PREDICTIONS) == 0 else [pytest.mark.soak]
                name = f"{('linear', 'cosine')[i]}-{make.__name__}-{options}-{steps}-{prediction}"
                found.append(pytest.param(schedule, make, options, steps, prediction, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("schedule", "make", "options", "steps", "prediction"), counted())
def test_any_count_of_steps_meets_the_data(
    schedule: sf.NoiseSchedule, make: Any, options: Any, steps: int, prediction: str
) -> None:
    """As near as the next lower count that divides T, which was always right."""
    mean, std = moments_of(make, schedule, steps, prediction, **options)
    divisor = max(n for n in (20, 50, 100, 125, 250, 500) if n <= steps)
    m, s = moments_of(make, schedule, divisor, prediction, **options)
    assert abs(mean - 0.5) <= max(abs(m - 0.5), 1e-3)
    assert abs(std - 0.1) <= abs(s - 0.1) + 1e-3


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras"])
@pytest.mark.parametrize("make", [sf.ddim, sf.ddpm, sf.dpmpp_2m, sf.euler_ancestral])
def test_a_single_step_gives_the_mean(make: Any, spacing: str) -> None:
    """From noise, the best guess in one step is the mean of the data; from timestep 0 it was noise."""
    mean, std = moments(make(LINEAR, 1, clip=None, spacing=spacing), 0.5, 0.1)
    assert mean == pytest.approx(0.5, abs=0.005)
    assert std < 0.01
    if make in (sf.ddim, sf.ddpm) and spacing in ("leading", "linspace"):
        assert moments(make(LINEAR, 1, clip=None, spacing=spacing, compat="diffusers"), 0.5, 0.1)[1] > 0.4


def test_an_inversion_climbs_to_the_same_top() -> None:
    for steps in (1, 7, 501):
        down, up = sf.ddim(LINEAR, steps).timesteps, sf.ddim_inversion(LINEAR, steps, evaluate_at="target").timesteps
        assert up.tolist() == down[::-1].tolist()


# DPM-Solver++(2M) on schedules that end in almost no signal


def rounding(network: Gaussian) -> Any:
    """The network in bfloat16: what it returns has 8 bits."""
    return lambda x, t: network(x.double(), t).to(torch.bfloat16).to(x.dtype)


def variance_of(table: sf.StepTable, wrap: Any = lambda network: network) -> float:
    schedule = table.schedule
    network = wrap(Gaussian(torch.from_numpy(schedule.alphas_cumprod.copy()), table.prediction, 0.5, 0.2))
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    return float(walk(table, network, x).var())


@pytest.mark.parametrize("steps", [10, 15, 25, 50])
@pytest.mark.parametrize("total", [1000, 4000])
def test_dpmpp_2m_bears_a_network_that_rounds(total: int, steps: int) -> None:
    """Variance 0.372 (T = 1000) and 5.54 (T = 4000) with 15 steps, where float32 gave 0.030."""
    schedule = sf.NoiseSchedule.cosine(total)
    table = sf.dpmpp_2m(schedule, steps)
    exact = variance_of(table)
    assert exact < 0.042
    assert variance_of(table, rounding) == pytest.approx(exact, rel=0.02)
    unbounded = sf.dpmpp_2m(schedule, steps, lambda_min_clipped=-np.inf)
    assert unbounded.timesteps[0] == total - 1
    assert variance_of(unbounded, rounding) > 1.5 * exact


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_other_predictions_need_no_bound(prediction: str) -> None:
    table = sf.dpmpp_2m(sf.NoiseSchedule.cosine(), 15, prediction=prediction)
    assert table.timesteps[0] == 999
    assert variance_of(table, rounding) == pytest.approx(variance_of(table), rel=0.02)


@pytest.mark.parametrize("bound", [-5.1, -4.0, -2.5])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras"])
@pytest.mark.parametrize("schedule", [sf.NoiseSchedule.cosine(), LINEAR], ids=["cosine", "linear"])
def test_no_level_lies_below_the_bound(schedule: sf.NoiseSchedule, spacing: str, bound: float) -> None:
    table = sf.dpmpp_2m(schedule, 20, spacing=spacing, lambda_min_clipped=bound)
    lambdas = np.log(schedule.snr) / 2
    assert (lambdas[table.timesteps] >= bound).all()
    left = int((lambdas >= bound).sum())
    assert table.timesteps[0] >= left - 1 - left // 20
    assert len(table) == 20


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' set_timesteps
def test_the_bound_is_diffusers() -> None:
    """Its list ends one entry early, its spacing is over N + 1 entries: what both share is where they start."""
    from diffusers import DPMSolverMultistepScheduler

    for bound in (-5.1, -3.0):
        config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": bound, "timestep_spacing": "trailing"}
        theirs = DPMSolverMultistepScheduler(**config)
        theirs.set_timesteps(20)
        ours = sf.dpmpp_2m(COSINE, 20, lambda_min_clipped=bound)
        assert ours.timesteps[0] == int(theirs.timesteps[0])


def test_the_linear_schedule_is_visited_whole() -> None:
    assert sf.dpmpp_2m(LINEAR, 15).timesteps[0] == 999
    assert len(sf.dpmpp_2m(LINEAR)) == 1000


def test_a_bound_by_default_gives_way() -> None:
    cosine = sf.NoiseSchedule.cosine(1000)
    assert len(sf.dpmpp_2m(cosine)) == 996
    for steps in (996, 997, 1000):
        assert len(sf.dpmpp_2m(cosine, steps)) == steps
    assert sf.dpmpp_2m(cosine, timesteps=[999, 500, 3]).timesteps.tolist() == [999, 500, 3]
    drowned = sf.NoiseSchedule.from_betas([0.99999, 0.99999])
    assert sf.dpmpp_2m(drowned, 2).timesteps.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"lambda_min_clipped": 20.0},
            ValueError,
            "lambda_min_clipped = 20 leaves 0 timesteps, of which there must be one",
        ),
        (
            {"lambda_min_clipped": 0.0, "steps": 999},
            ValueError,
            "lambda_min_clipped = 0 leaves 496 timesteps, fewer than",
        ),
        ({"lambda_min_clipped": "-5"}, TypeError, "lambda_min_clipped must be a number, got '-5'"),
        ({"lambda_min_clipped": True}, TypeError, "lambda_min_clipped must be a number, got True"),
        ({"lambda_min_clipped": float("nan")}, ValueError, "lambda_min_clipped must be a finite number"),
        ({"lambda_min_clipped": float("inf")}, ValueError, "lambda_min_clipped must be a finite number"),
        (
            {"lambda_min_clipped": -5.1, "timesteps": [5, 3]},
            ValueError,
            "lambda_min_clipped and timesteps exclude each",
        ),
    ],
)
def test_bounds_that_bound_nothing_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        sf.dpmpp_2m(sf.NoiseSchedule.cosine(), **options)


# Options of a model give way to what a caller gives


def spec(**options: Any) -> ModelSpec:
    return ModelSpec(LINEAR, "epsilon", (1, 8, 8), options=options)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "euler_ancestral", "ddim_inversion"])
@pytest.mark.parametrize("steps", [None, 1, 3, 50, 501, 999, 1000])
@pytest.mark.parametrize("offset", [1, 7, 999])
def test_a_models_offset_never_fails(sampler: str, steps: int | None, offset: int) -> None:
    """Latent diffusion's steps_offset = 1 reached t = 1000 with all timesteps."""
    for spacing in ("leading", "linspace", "trailing", "karras"):
        own, plain = spec(steps_offset=offset, spacing=spacing), spec(spacing=spacing)
        table = own.table(sampler, steps)
        assert len(table) == len(plain.table(sampler, steps))
        if spacing != "leading":
            assert table.digest == plain.table(sampler, steps).digest
    if sampler != "ddim_inversion":
        assert own.table(sampler, steps, spacing="karras").timesteps.max() == 999
    assert own.table(sampler, timesteps=[900, 500, 0]).timesteps.size == 3


def test_a_models_offset_is_honoured_where_it_fits() -> None:
    own = spec(steps_offset=1)
    assert own.table("ddim", 50).timesteps.tolist() == list(range(981, 0, -20))
    assert own.table("ddpm", 500).timesteps.tolist() == list(range(999, 0, -2))
    assert own.table("ddpm").timesteps.tolist() == list(range(999, -1, -1))
    assert own.table("ddpm", 999).timesteps.tolist() == list(range(999, 0, -1))
    cosine = ModelSpec(sf.NoiseSchedule.cosine(), "epsilon", (1, 8, 8), options={"steps_offset": 1})
    for steps in (50, 900, 996, 997, 1000):
        assert len(cosine.table("dpmpp_2m", steps, spacing="leading")) == steps


def test_what_a_caller_gives_is_refused_in_its_name() -> None:
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(ValueError, match=r"^steps_offset = 1 with steps = 1000 reaches timestep 1000"):
            spec().table(sampler, 1000, steps_offset=1)
        with pytest.raises(ValueError, match=r"^spacing 'karras' takes neither steps_offset nor compat"):
            spec(steps_offset=1).table(sampler, 9, spacing="karras", steps_offset=1)
    with pytest.raises(ValueError, match=r"^steps must be in \[1, 1000\], got 0"):
        spec(steps_offset=1).table("ddim", 0)
    with pytest.raises(TypeError, match=r"^steps must be an integer, got '9'"):
        spec(steps_offset=1).table("ddim", "9")  # type: ignore[arg-type]


def test_a_callers_options_stand_before_the_models() -> None:
    thresholded = spec(threshold=0.9, sample_max_value=2.0)
    assert thresholded.table("ddim", 5).whole_image
    clipped = thresholded.table("ddim", 5, clip=0.5)
    assert not clipped.whole_image
    assert (clipped.column("clip") == 0.5).all()
    karras = spec(spacing="karras")
    assert karras.table("ddim", 5, compat="diffusers").timesteps.tolist() == [800, 600, 400, 200, 0]
    assert karras.table("ddim", 5, steps_offset=3).timesteps[-1] == 3
    large = spec(variance="fixed_large")
    assert large.table("ddpm", 5, v_posterior=0.5).digest == sf.ddpm(LINEAR, 5, v_posterior=0.5).digest
    bounded = spec(lambda_min_clipped=-3.0)
    assert bounded.table("dpmpp_2m", 10).timesteps[0] < 999
    assert bounded.table("dpmpp_2m", timesteps=[999, 0]).timesteps[0] == 999
