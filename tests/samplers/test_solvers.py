"""DPM-Solver++(2M), ancestral Euler, Karras spacing, thresholding: against papers in float64, and diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.kernels import COLUMNS
from stepfusion.samplers.timesteps import karras
from stepfusion_testing import solvers
from stepfusion_testing.networks import smooth
from stepfusion_testing.walking import Gaussian, stand_in, walk

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)

SHAPE = (2, 3, 8, 8)
LINEAR, COSINE = sf.NoiseSchedule.linear(), sf.NoiseSchedule.cosine(300)
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
PREDICTIONS = ("epsilon", "sample", "v_prediction")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of diffusers' set_timesteps
TOLERANCE = 1e-4  # against diffusers, float32 on both sides


def data_prediction(schedule: sf.NoiseSchedule, prediction: str, clip: float | None) -> solvers.Predict:
    """The same network's x0, clipped, in NumPy."""
    network = stand_in(schedule, prediction)

    def predict(x: solvers.Floats, t: int) -> solvers.Floats:
        a, s = np.sqrt(schedule.alphas_cumprod[t]), np.sqrt(1 - schedule.alphas_cumprod[t])
        out = network(torch.from_numpy(x), t).numpy()
        x0 = {"epsilon": lambda: (x - s * out) / a, "sample": lambda: out, "v_prediction": lambda: a * x - s * out}
        return np.clip(x0[prediction](), -clip, clip) if clip is not None else x0[prediction]()

    return predict


# DPM-Solver++(2M)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("steps", "lower", "final"), [(7, None, None), (20, None, None), (20, False, 0.9995), (20, True, 0.9995)]
)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_dpmpp_2m_is_the_papers(
    schedule: sf.NoiseSchedule,
    steps: int,
    lower: bool | None,
    final: float | None,
    prediction: str,
    clip: float | None,
) -> None:
    final = None if final is None else float(schedule.alphas_cumprod[0])
    table = sf.dpmpp_2m(
        schedule, steps, prediction=prediction, clip=clip, lower_order_final=lower, final_alpha_cumprod=final
    )
    assert table.history == 1
    # a row keeps its x0 if the next one reads it
    assert table.column("keep_x0").tolist() == [*(table.column("next_prev") != 0)[1:], 0]
    assert not table.stochastic
    x = torch.randn(SHAPE, dtype=torch.float64)
    want = solvers.dpm_solver_pp_2m(
        data_prediction(schedule, prediction, clip),
        x.numpy(),
        schedule.alphas_cumprod,
        table.timesteps.tolist(),
        final=1.0 if final is None else final,
        first_order_last=steps < 15 if lower is None else lower,
    )
    np.testing.assert_allclose(walk(table, stand_in(schedule, prediction), x).numpy(), want, rtol=0, atol=2e-9)


def test_only_the_rows_between_use_a_history() -> None:
    table = sf.dpmpp_2m(LINEAR, 20)
    uses = table.column("next_prev") != 0
    assert uses.tolist() == [False] + [True] * 18 + [False]
    first = sf.ddim(LINEAR, 20, spacing="trailing")
    np.testing.assert_allclose(
        table.column("next_x0") + table.column("next_prev"), first.column("next_x0"), atol=1e-12
    )
    assert first.history == 0
    assert (
        sf.dpmpp_2m(LINEAR, 1).coefficients.tolist()
        == sf.ddim(LINEAR, 1, spacing="trailing", clip=None).coefficients.tolist()
    )


def test_dpmpp_2m_from_a_level_without_signal() -> None:
    """Zero terminal SNR: h is infinite there, and the second row has no history to weigh."""
    table = sf.dpmpp_2m(ZERO_SNR, 16, prediction="v_prediction")
    assert table.timesteps[0] == 999
    assert (table.column("next_prev")[:2] == 0).all()
    assert np.isfinite(table.coefficients[:, COLUMNS.index("next_x0")]).all()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        sf.dpmpp_2m(ZERO_SNR, 16, lambda_min_clipped=-np.inf)
    assert sf.dpmpp_2m(ZERO_SNR, 16).timesteps[0] < 999  # by default a network of epsilon is not asked there


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpmpp_2m_equals_diffusers_at_its_timesteps(prediction: str, steps: int) -> None:
    """Its list of timesteps, whatever the spacing, gives its images: at whole timesteps its levels are ours."""
    for spacing in ("leading", "linspace", "trailing"):
        theirs = DPMSolverMultistepScheduler(prediction_type=prediction, timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        timesteps = theirs.timesteps.tolist()
        network, x = stand_in(LINEAR, prediction), torch.randn(SHAPE)
        want = x
        for t in theirs.timesteps:
            want = theirs.step(network(want, int(t)), t, want).prev_sample
        table = sf.dpmpp_2m(LINEAR, timesteps=timesteps, prediction=prediction, clip=None)
        torch.testing.assert_close(walk(table, network, x), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_dpmpp_2m_needs_half_the_steps(spacing: str) -> None:
    """Beside the limit of many steps, 15 of it are closer than 30 of DDIM; without its history they would not be."""
    network = Gaussian(torch.from_numpy(LINEAR.alphas_cumprod.copy()), "epsilon", 0.5, 0.6)
    x = torch.randn(SHAPE, dtype=torch.float64)
    limit = walk(sf.ddim(LINEAR, clip=None), network, x)

    def error(table: sf.StepTable) -> float:
        return float((walk(table, network, x) - limit).abs().max())

    of_ddim = error(sf.ddim(LINEAR, 30, spacing=spacing, clip=None))
    assert error(sf.dpmpp_2m(LINEAR, 15, spacing=spacing, clip=None)) < of_ddim
    assert error(sf.ddim(LINEAR, 15, spacing=spacing, clip=None)) > of_ddim


# Ancestral Euler


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
def test_euler_ancestral_is_k_diffusions(spacing: str, prediction: str, eta: float) -> None:
    table = sf.euler_ancestral(LINEAR, 20, eta=eta, spacing=spacing, prediction=prediction)
    x, noise = torch.randn(SHAPE, dtype=torch.float64), torch.randn(20, *SHAPE, dtype=torch.float64)
    predict = data_prediction(LINEAR, prediction, None)
    timesteps = table.timesteps.tolist()
    want = solvers.euler_ancestral(predict, x.numpy(), LINEAR.alphas_cumprod, timesteps, noise.numpy(), eta=eta)
    got = walk(table, stand_in(LINEAR, prediction), x, noise)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=2e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_euler_ancestral_equals_diffusers(spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = EulerAncestralDiscreteScheduler(prediction_type=prediction, timestep_spacing=spacing)
    theirs.set_timesteps(20)
    table = sf.euler_ancestral(LINEAR, 20, spacing=spacing, prediction=prediction)
    assert theirs.timesteps.tolist() == table.timesteps.tolist()
    network, x, noise = stand_in(LINEAR, prediction), torch.randn(SHAPE), torch.randn(20, *SHAPE)
    y = x / float(LINEAR.alphas_cumprod[table.timesteps[0]] ** 0.5)
    for i, t in enumerate(theirs.timesteps):
        name = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        monkeypatch.setattr(name, lambda *_, i=i, **__: noise[i])
        y = theirs.step(network(theirs.scale_model_input(y, t), int(t)), t, y).prev_sample
    torch.testing.assert_close(walk(table, network, x, noise), y, rtol=0, atol=TOLERANCE)


# Karras spacing


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
def test_karras_takes_the_nearest_timesteps(steps: int) -> None:
    sigma = np.sqrt((1 - LINEAR.alphas_cumprod) / LINEAR.alphas_cumprod)
    levels = np.array(solvers.karras_levels(sigma[0], sigma[-1], steps))
    positions = np.interp(np.log(levels), np.log(sigma), np.arange(1000))
    visits = karras(LINEAR.alphas_cumprod, steps)
    apart = np.diff(positions) < -1.5  # elsewhere neighbours have to make room for each other
    assert (np.abs(visits - positions) <= 0.5)[:-1][apart].all()
    assert apart.sum() >= steps / 2
    assert visits[0] == 999


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, ZERO_SNR], ids=["linear", "cosine", "zero SNR"])
def test_karras_is_strictly_decreasing_for_every_number_of_steps(schedule: sf.NoiseSchedule) -> None:
    total = schedule.num_timesteps
    for steps in (1, 2, 3, 7, 50, 299, total - 1, total):
        visits = karras(schedule.alphas_cumprod, min(steps, total))
        assert len(visits) == min(steps, total)
        assert visits[0] == total - 1
        assert visits[-1] >= 0
        assert (np.diff(visits) < 0).all()


def test_karras_levels_agree_with_diffusers_up_to_rounding() -> None:
    """diffusers evaluates at the rounded timestep and steps to the level between; ours are the timestep's own."""
    theirs = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    theirs.set_timesteps(12)
    ours = karras(LINEAR.alphas_cumprod, 12)
    assert np.abs(theirs.timesteps.numpy()[:9] - ours[:9]).max() <= 1
    sigma = np.sqrt((1 - LINEAR.alphas_cumprod) / LINEAR.alphas_cumprod)[ours[:9]]
    np.testing.assert_allclose(theirs.sigmas.numpy()[:9], sigma, rtol=0.02)


@pytest.mark.parametrize("make", [sf.ddpm, sf.ddim, sf.dpmpp_2m, sf.euler_ancestral])
def test_every_sampler_takes_karras_spacing(make: Any) -> None:
    assert make(LINEAR, 9, spacing="karras").timesteps.tolist() == karras(LINEAR.alphas_cumprod, 9).tolist()
    with pytest.raises(ValueError, match="spacing 'karras' takes neither steps_offset nor compat"):
        make(LINEAR, 9, spacing="karras", steps_offset=1)


# Dynamic thresholding


def in_their_loop(
    scheduler: Any, network: Any, x: torch.Tensor, noise: torch.Tensor, monkeypatch: Any
) -> torch.Tensor:
    for i, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, i=i, **__: noise[i])
        x = scheduler.step(network(x, int(t)), t, x).prev_sample
    return x


@pytest.mark.parametrize(("ratio", "largest"), [(0.995, 1.0), (0.9, 1.5), (0.4, 3.0)])
@pytest.mark.parametrize("make", [sf.ddpm, sf.ddim, sf.dpmpp_2m])
def test_thresholding_equals_diffusers(make: Any, ratio: float, largest: float, monkeypatch: Any) -> None:
    config = {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": largest}
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}[make.__name__]
    theirs = kind(**config)
    theirs.set_timesteps(20)
    compat = {} if make is sf.dpmpp_2m else {"compat": "diffusers"}
    table = make(LINEAR, timesteps=theirs.timesteps.tolist(), threshold=ratio, sample_max_value=largest, **compat)
    assert table.whole_image
    network, x, noise = stand_in(LINEAR, "epsilon"), torch.randn(SHAPE), torch.randn(20, *SHAPE)
    want = in_their_loop(theirs, network, x, noise, monkeypatch)
    torch.testing.assert_close(walk(table, network, x, noise), want, rtol=0, atol=TOLERANCE)
    clipped = make(LINEAR, timesteps=theirs.timesteps.tolist(), **compat)
    if ratio == 0.9:
        assert (walk(clipped, network, x, noise) - want).abs().max() > 100 * TOLERANCE, "a clip is something else"


def test_a_threshold_runs_where_it_can() -> None:
    """By the reference in an engine that chose the kernels itself, and not at all in one that was told to."""
    arguments: dict[str, Any] = {"shape": (2, 4, 4), "device": "cpu", "dtype": "float32"}
    plain = sf.Engine(smooth, LINEAR, backend="reference", **arguments)
    table = sf.ddim(LINEAR, 5, threshold=0.9, sample_max_value=2.0)
    want = plain.sample(3, table)
    assert "threshold" not in plain.explain()
    told = sf.Engine(smooth, LINEAR, backend="triton", **arguments)
    with pytest.raises(
        sf.BackendError, match="backend='triton' cannot run dynamic thresholding: it needs a quantile"
    ):
        told.sample(3, table)
    assert "threshold      refused       it needs a quantile" in told.explain()
    chose = sf.Engine(smooth, LINEAR, **arguments)
    if chose.plan.backend.value == "reference":
        pytest.skip("no kernels can be chosen here")
    assert "threshold      reference     it needs a quantile" in chose.explain()
    assert torch.equal(chose.sample(3, table), want)
    mixed = [table, sf.dpmpp_2m(LINEAR, 4), table]
    for engine in (chose, plain):
        images = engine.sample(3, mixed)
        assert torch.equal(images[[0, 2]], want[[0, 2]])
        assert torch.equal(images[1], plain.sample(table=mixed[1], indices=[1])[0])


def test_thresholding_of_a_checkpoint_is_taken_over() -> None:
    from stepfusion.samplers.scheduler_config import read_config

    _, _, options = read_config({"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5})
    assert options["threshold"] == 0.9
    assert options["sample_max_value"] == 1.5
    assert "threshold" not in read_config({})[2]


# In an engine


def test_a_checkpoints_clip_is_for_samplers_that_clip() -> None:
    engine = sf.Engine(smooth, LINEAR, shape=(2, 4, 4), device="cpu", options={"clip": 0.8, "spacing": "linspace"})
    for sampler, clip in (("ddim", 0.8), ("ddpm", 0.8), ("dpmpp_2m", np.inf), ("euler_ancestral", np.inf)):
        table = engine.table(sampler, 4)
        assert (table.column("clip") == clip).all(), sampler
        assert table.timesteps.tolist() == [999, 666, 333, 0]
        assert (engine.table(sampler, 4, clip=0.5).column("clip") == 0.5).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_multistep_lanes_share_a_batch_with_others(backend: str) -> None:
    engine = sf.Engine(smooth, LINEAR, shape=(2, 4, 4), device="cpu", dtype="float32", backend=backend, batch=3)
    tables = [engine.table("dpmpp_2m", 6), engine.table(steps=4), engine.table("euler_ancestral", 3)]
    chosen = [tables[i] for i in (0, 1, 2, 0, 0, 1, 2, 0)]
    mixed = engine.sample(8, chosen, seed=4)
    for i, table in enumerate(chosen):
        assert torch.equal(mixed[i], engine.sample(table=table, indices=[i], seed=4)[0]), i
    events = list(engine.stream(2, tables[0]))
    assert torch.equal(events[-1].x, engine.sample(2, tables[0]))


def test_a_table_starts_anew_from_any_row() -> None:
    table = sf.dpmpp_2m(LINEAR, 20)
    tail = table.last(5)
    assert tail.timesteps.tolist() == table.timesteps[-5:].tolist()
    assert tail.next_row.tolist() == [1, 2, 3, 4, -1]
    assert tail.column("next_prev")[0] == 0
    assert tail.column("next_x0")[0] == table.column("next_x0")[-5] + table.column("next_prev")[-5]
    assert tail.coefficients[1:].tolist() == table.coefficients[-4:].tolist()
    assert table.last(20) is table
    for steps in (0, 21):
        with pytest.raises(ValueError, match=r"steps must be in \[1, 20\]"):
            table.last(steps)
    with pytest.raises(ValueError, match="last needs a table of one sampler, got one of 2"):
        sf.StepTable.concatenate([table, table]).last(3)


def test_a_table_that_starts_anew_uses_no_history_that_is_not_there() -> None:
    """What a row would take from an entry that no row has kept, it takes from the oldest one, or from its own x0."""
    weights = {"next_prev": 10.0, "next_prev2": 200.0, "next_prev3": 3000.0}
    keep = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    columns = {name: np.full(7, value) for name, value in {**weights, "next_x0": 1.0, "clip": 1.0}.items()}
    columns |= {"keep_x0": keep}
    table = sf.StepTable.from_columns("third order", "epsilon", LINEAR, np.arange(70, 0, -10), columns)
    assert table.history == 3
    tail = table.last(5)  # whose rows keep 1, 0, 1, 1 and 1 entries
    used = np.stack([tail.column(name) for name in ("next_x0", *weights)], axis=1)
    assert used.tolist() == [[3211, 0, 0, 0], [1, 3210, 0, 0], [1, 3210, 0, 0], [1, 10, 3200, 0], [1, 10, 200, 3000]]


@pytest.mark.parametrize(("column", "entries"), [("next_prev", 1), ("next_prev2", 2), ("next_prev3", 3)])
def test_a_table_says_how_much_history_it_needs(column: str, entries: int) -> None:
    columns = {"clip": np.ones(3), column: np.array([0.0, 0.0, -0.5])}
    table = sf.StepTable.from_columns("mine", "epsilon", LINEAR, np.array([9, 5, 1]), columns)
    assert table.history == entries
    assert sf.StepTable.concatenate([sf.ddim(LINEAR, 5), table]).history == entries
    assert (table.column("net_scale") == 1).all()
    assert sf.ddim(LINEAR, 5).history == 0


@pytest.mark.parametrize(("column", "whole"), [("threshold", True), ("rescale", True), ("net_scale", False)])
def test_a_table_says_whether_it_needs_whole_images(column: str, whole: bool) -> None:
    columns = {"clip": np.ones(2), column: np.array([0.0, 0.5])}
    assert sf.StepTable.from_columns("mine", "epsilon", LINEAR, np.array([9, 5]), columns).whole_image is whole


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sf.dpmpp_2m(LINEAR, 5, lower_order_final=1), "lower_order_final must be True or False, got 1"),
        (lambda: sf.euler_ancestral(LINEAR, 5, eta=2), r"eta must be a finite number in \[0, 1\], got 2"),
        (lambda: sf.ddim(LINEAR, 5, threshold=0), r"threshold must be a finite number in \(0, 1\], got 0"),
        (lambda: sf.ddpm(LINEAR, 5, sample_max_value=0.5), r"sample_max_value must be a finite number in \[1, inf\]"),
        (lambda: karras(LINEAR.alphas_cumprod, 5, rho=0), r"rho must be a finite number in \(0, inf\], got 0"),
        (lambda: karras(LINEAR.alphas_cumprod, 1001), r"steps must be in \[1, 1000\], got 1001"),
        (
            lambda: sf.dpmpp_2m(LINEAR, 5, spacing="even"),
            "spacing must be one of 'leading', .*'karras', .*'beta', got 'even'",
        ),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
