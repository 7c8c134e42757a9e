"""Sampler tables: every row against the papers' equations on scalars, in float64, and what a table promises."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from stepfusion.kernels import COLUMNS, PARKED, reference
from stepfusion.samplers import ddim, ddim_inversion, ddpm
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable
from stepfusion_testing import paper
from stepfusion_testing.walking import Gaussian, walk

PREDICTIONS = ("epsilon", "sample", "v_prediction")
CLIPS = (1.0, 0.3, None)
LINEAR, COSINE = NoiseSchedule.linear(), NoiseSchedule.cosine(300)
ZERO_SNR = NoiseSchedule.linear().rescale_zero_terminal_snr()
close = partial(pytest.approx, rel=1e-9, abs=1e-9)  # float64, but 1 - abar cancels, and 1 / sqrt(abar) is 160


def row_step(row: np.ndarray[Any, Any], x: float, out: float, z: float, v: float = 0.0) -> float:
    """What the step kernel does with a row, on scalars."""
    c = dict(zip(COLUMNS, row.tolist(), strict=True))
    x0 = min(max(c["x0_x"] * x + c["x0_out"] * out, -c["clip"]), c["clip"])
    sigma = c["sigma"] * np.exp(c["half_log_min"] + (v + 1) / 2 * c["half_log_span"])
    return float(c["next_x0"] * x0 + c["next_x"] * x + c["next_out"] * out + sigma * z)


def draws(abar: float, prediction: str) -> Iterator[tuple[float, float, float, float]]:
    """Plausible (x, out, z, v), with an x0 that a clip may or may not reach."""
    for _ in range(4):
        x0, x, z, v = random.gauss(0, 1), random.gauss(0, 1), random.gauss(0, 1), random.uniform(-1, 1)
        yield x, paper.out_of(x0, x, abar, prediction), z, v


def levels(schedule: NoiseSchedule, table: StepTable) -> list[tuple[float, float]]:
    return paper.levels(schedule.alphas_cumprod, table.timesteps)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ddpm_rows(schedule: NoiseSchedule, variance: str, prediction: str, clip: float | None) -> None:
    for steps, spacing in ((150, "leading"), (7, "trailing"), (30, "linspace"), (1, "trailing")):
        table = ddpm(schedule, steps, spacing=spacing, prediction=prediction, clip=clip, variance=variance)
        assert table.learned_variance == (variance == "learned_range")
        for row, (abar, prev) in zip(table.coefficients, levels(schedule, table), strict=True):
            for x, out, z, v in draws(abar, prediction):
                expected = paper.ddpm_step(
                    x, out, z, abar, prev, prediction=prediction, clip=clip, variance=variance, v=v
                )
                assert row_step(row, x, out, z, v) == close(expected)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rederive", [True, False], ids=["rederived", "raw"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ddim_rows(schedule: NoiseSchedule, eta: float, rederive: bool, prediction: str, clip: float | None) -> None:
    options: dict[str, Any] = {"prediction": prediction, "clip": clip, "eta": eta, "rederive_eps": rederive}
    for steps, spacing in ((150, "leading"), (7, "trailing"), (30, "linspace"), (1, "trailing")):
        table = ddim(schedule, steps, spacing=spacing, **options)
        for row, (abar, prev) in zip(table.coefficients, levels(schedule, table), strict=True):
            for x, out, z, _ in draws(abar, prediction):
                expected = paper.ddim_step(x, out, z, abar, prev, **options)
                assert row_step(row, x, out, z) == close(expected)


def test_final_alpha_cumprod_ends_the_last_row() -> None:
    final = float(LINEAR.alphas_cumprod[0])
    table = ddim(LINEAR, 10, steps_offset=1, eta=1.0, rederive_eps=False, final_alpha_cumprod=final)
    assert table.column("next_x0")[-1] == pytest.approx(final**0.5, rel=1e-15)
    assert table.column("next_out")[-1] == pytest.approx((1 - final) ** 0.5, rel=1e-9)
    assert table.column("sigma")[-1] == 0
    assert ddim(LINEAR, 10, rederive_eps=False).column("next_x0")[-1] == 1


def combined(table: StepTable) -> np.ndarray[Any, Any]:
    """Each row as the weights of (x0, x, z); rows that use the network's output directly do not fit."""
    assert not table.column("next_out").any()
    return np.stack([table.column(name) for name in ("x0_x", "x0_out", "clip", "next_x0", "next_x", "sigma")])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_eta_1_is_ddpm(clip: float | None, prediction: str) -> None:
    """With the clip too, because eps is re-derived from the clipped x0 (trap 15 is about the raw one)."""
    for steps, spacing in ((1000, "leading"), (50, "trailing"), (7, "linspace")):
        options: dict[str, Any] = {"spacing": spacing, "clip": clip, "prediction": prediction}
        ours = combined(ddim(LINEAR, steps, eta=1.0, **options))
        np.testing.assert_allclose(ours, combined(ddpm(LINEAR, steps, **options)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_raw_and_rederived_eps_agree_without_a_clip(prediction: str) -> None:
    raw = ddim(LINEAR, 20, eta=0.5, prediction=prediction, clip=None, rederive_eps=False)
    rederived = ddim(LINEAR, 20, eta=0.5, prediction=prediction, clip=None)
    for a, b, t in zip(raw.coefficients, rederived.coefficients, raw.timesteps, strict=True):
        for x, out, z, _ in draws(float(LINEAR.alphas_cumprod[t]), prediction):
            assert row_step(a, x, out, z) == close(row_step(b, x, out, z))


@pytest.mark.parametrize("evaluate_at", ["source", "target"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_rows(prediction: str, evaluate_at: str) -> None:
    """The network's answer is turned into eps at its own level, and moves x along it (Song et al., section 4.3)."""
    visits = [0, 10, 300, 998]
    table = ddim_inversion(LINEAR, timesteps=visits[::-1], prediction=prediction, evaluate_at=evaluate_at)
    told = {"source": [0, 0, 10, 300], "target": visits}[evaluate_at]
    assert table.timesteps.tolist() == told
    assert not table.stochastic
    assert np.isposinf(table.column("clip")).all()
    abar = 1.0
    for row, target, network in zip(table.coefficients, visits, told, strict=True):
        after, at = float(LINEAR.alphas_cumprod[target]), float(LINEAR.alphas_cumprod[network])
        for x, out, z, _ in draws(at, prediction):
            eps = (x - at**0.5 * paper.x0_of(x, out, at, prediction, None)) / (1 - at) ** 0.5
            x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
            expected = after**0.5 * x0 + (1 - after) ** 0.5 * eps
            assert row_step(row, x, out, z) == close(expected)
        abar = after


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_round_trip_improves_with_steps(prediction: str) -> None:
    network = Gaussian(torch.from_numpy(LINEAR.alphas_cumprod.copy()), prediction, 0.2, 0.5)
    image = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    errors = []
    for steps in (10, 50, 250):
        noise = walk(ddim_inversion(LINEAR, steps, prediction=prediction), network, image)
        back = walk(ddim(LINEAR, steps, prediction=prediction, clip=None), network, noise)
        errors.append(float((back - image).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # first order in 1 / steps, in the limit
    assert errors[2] < 0.03


def test_inversion_undoes_a_step_that_had_the_same_network_output() -> None:
    """What a round trip loses is only that the network is asked at another state."""
    table = ddim(LINEAR, timesteps=[400], clip=None)
    back = ddim_inversion(LINEAR, timesteps=[400], evaluate_at="target")
    for x, out, _, _ in draws(float(LINEAR.alphas_cumprod[400]), "epsilon"):
        assert row_step(back.coefficients[0], row_step(table.coefficients[0], x, out, 0), out, 0) == pytest.approx(x)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("sampler", [ddpm, ddim], ids=["ddpm", "ddim"])
def test_zero_terminal_snr_starts_from_pure_noise(sampler: Callable[..., StepTable], prediction: str) -> None:
    table = sampler(ZERO_SNR, 50, spacing="trailing", prediction=prediction, clip=None)
    assert table.timesteps[0] == 999
    assert table.column("x0_x")[0] == 0
    assert np.isfinite(table.column("next_x")).all()


def test_zero_terminal_snr_needs_another_prediction() -> None:
    message = (
        "prediction 'epsilon' cannot start at timestep 999, where the signal is zero (zero terminal SNR): "
        "use a network with prediction 'v_prediction' or 'sample'"
    )
    for sampler in (ddpm, ddim, ddim_inversion):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            sampler(ZERO_SNR, 50, spacing="trailing")
        assert len(sampler(ZERO_SNR, 50)) == 50  # leading stops short of it
    with pytest.raises(ValueError, match=r"^ddim_inversion cannot reach a level with zero SNR: leave the last time"):
        ddim_inversion(ZERO_SNR, 50, spacing="trailing", prediction="v_prediction")


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, ZERO_SNR], ids=["linear", "cosine", "zero SNR"])
def test_the_radicand_is_never_negative(schedule: NoiseSchedule) -> None:
    """Trap 13: 1 - abar_prev - sigma^2 rounds below 0 at some counts; StepTable would refuse its NaN root."""
    for steps in range(1, 301):
        table = ddim(schedule, steps, eta=1.0, spacing="trailing", prediction="v_prediction", clip=None)
        assert len(table) == steps


@pytest.mark.parametrize("sampler", [ddpm, ddim], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_last_row_adds_no_noise(sampler: Callable[..., StepTable], spacing: str) -> None:
    option: dict[str, Any] = {"variance": "fixed_large"} if sampler is ddpm else {"eta": 1.0}
    sigma = sampler(LINEAR, 50, spacing=spacing, **option).column("sigma")
    assert (sigma[:-1] > 0).all()
    assert sigma[-1] == 0


def test_all_timesteps_by_default() -> None:
    assert ddpm(LINEAR).timesteps.tolist() == list(range(999, -1, -1))
    assert len(ddim(COSINE)) == 300


def test_a_table_says_what_it_is() -> None:
    table = ddim(LINEAR, 50, eta=0.5)
    assert repr(table) == "StepTable(ddim, eta 0.5, 50 rows, epsilon, linear)"
    assert table.stochastic
    assert not ddim(LINEAR, 50).stochastic
    assert table.schedule is LINEAR
    assert table.starts == (0,)
    assert table.steps() == 50
    assert table.next_row.tolist() == [*range(1, 50), PARKED]


def test_arrays_are_read_only_and_the_callers_stay_writable() -> None:
    mine = np.array([9, 5])
    table = StepTable.from_columns("mine", "epsilon", LINEAR, mine, {"sigma": np.ones(2)})
    for array in (table.coefficients, table.timesteps, table.next_row, table.column("sigma")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    mine[0] = 8
    assert table.timesteps[0] == 9


def test_a_concatenated_table_walks_each_part() -> None:
    parts = [ddim(LINEAR, 5), ddpm(LINEAR, 7), ddim(LINEAR, 3, eta=1.0)]
    table = StepTable.concatenate([StepTable.concatenate(parts[:2]), parts[2]])  # nesting is no different
    assert table.starts == (0, 5, 12)
    assert [table.steps(part) for part in range(3)] == [5, 7, 3]
    assert len(table) == 15
    assert table.name == "ddim, eta 0 + ddpm + ddim, eta 1"
    for part, start in zip(parts, table.starts, strict=True):
        row, visited = start, []
        while row != PARKED:
            visited.append(row)
            row = int(table.next_row[row])
        assert visited == list(range(start, start + len(part)))
        assert (table.coefficients[visited] == part.coefficients).all()
        assert (table.timesteps[visited] == part.timesteps).all()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "concatenate needs at least one table, got none"),
        ([ddim(LINEAR, 5), ddim(LINEAR, 5, prediction="sample")],
         "tables must share a prediction type, got 'epsilon' and 'sample'"),
        ([ddim(LINEAR, 5), ddim(COSINE, 5)],
         f"tables must share a schedule, got {LINEAR} and {COSINE}"),
    ],
)  # fmt: skip
def test_mixtures_are_refused(tables: list[StepTable], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        StepTable.concatenate(tables)


def test_learned_variance_survives_concatenation() -> None:
    mixed = StepTable.concatenate([ddpm(LINEAR, 5), ddpm(LINEAR, 5, variance="learned_range")])
    assert mixed.learned_variance


@pytest.mark.parametrize(("column", "value"), [("x0_x", np.nan), ("sigma", np.inf), ("clip", np.nan)])
def test_coefficients_that_are_not_finite_are_refused(column: str, value: float) -> None:
    columns = {"clip": np.full(3, np.inf), column: np.array([1.0, value, 1.0])}
    message = f"coefficient {column} of row 1 (timestep 5) is {value}, which no network output can be multiplied with"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        StepTable.from_columns("mine", "epsilon", LINEAR, np.array([9, 5, 0]), columns)


def test_ragged_tables_are_refused() -> None:
    message = "a table of 2 rows must have coefficients [2, 21] and next_row [2], got [3, 21] and [2]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        StepTable("mine", "epsilon", LINEAR, np.zeros((3, len(COLUMNS))), np.array([5, 0]), np.array([1, -1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_on_a_device(dtype: torch.dtype) -> None:
    table = ddpm(LINEAR, 10)
    there = table.on(torch.device("cpu"), dtype)
    assert there.coefficients.dtype == dtype
    assert (there.coefficients.numpy() == table.coefficients.astype(there.coefficients.numpy().dtype)).all()
    assert there.timesteps.tolist() == table.timesteps.tolist()
    assert there.next_row.tolist() == table.next_row.tolist()
    there.coefficients.zero_()
    assert table.coefficients.any()


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["fixed_small", "fixed_large", "learned_range", "raw", "eta 0", "eta 1"])
def test_single_steps_equal_rows(sampler: str, prediction: str, clip: float | None) -> None:
    """kernels.ddim_step and ddpm_step make their coefficients on the fly: every lane another row of the table."""
    options: dict[str, Any] = {"prediction": prediction, "clip": clip}
    if sampler in ("fixed_small", "fixed_large", "learned_range"):
        options["variance"] = sampler
        table, step = ddpm(LINEAR, 9, **options), reference.ddpm_step
    else:
        options |= {"eta": float(sampler == "eta 1"), "rederive_eps": sampler != "raw"}
        table, step = ddim(LINEAR, 9, **options), reference.ddim_step
    x, noise = torch.randn(2, 9, 2, 4, 4, dtype=torch.float64)
    out = torch.randn(9, 4 if table.learned_variance else 2, 4, 4, dtype=torch.float64)
    t = torch.from_numpy(table.timesteps.copy())
    device = table.on(torch.device("cpu"), torch.float64)
    expected = reference.diffusion_step(x, out, torch.arange(9), device.coefficients, t, noise=noise)
    abar = torch.from_numpy(LINEAR.alphas_cumprod.copy())
    actual = step(x, out, t, torch.cat([t[1:], torch.tensor([-1])]), abar, noise=noise, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ddim([0.1], 5), TypeError, "schedule must be a NoiseSchedule or another path, got list"),
        (lambda: ddim(LINEAR, 5, eta=1.5), ValueError, "eta must be a finite number in [0, 1], got 1.5"),
        (lambda: ddim(LINEAR, 5, eta="0"), TypeError, "eta must be a number, got '0'"),
        (lambda: ddim(LINEAR, 5, prediction="eps"), ValueError,
         "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'eps'"),
        (lambda: ddpm(LINEAR, 5, clip=0), ValueError, "clip must be a finite number in (0, inf], got 0"),
        (lambda: ddpm(LINEAR, 5, variance="fixed_small_log"), ValueError,
         "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'fixed_small_log'"),
        (lambda: ddpm(LINEAR, 5, compat="peer"), ValueError,
         "compat must be None, 'diffusers' or 'guided-diffusion', got 'peer'"),
        (lambda: ddpm(LINEAR, 5, timesteps=[3]), ValueError, "steps and timesteps exclude each other, got both"),
        (lambda: ddim(LINEAR, 1001), ValueError, "steps must be in [1, 1000], got 1001"),
        (lambda: ddim(LINEAR, 5, rederive_eps=1), TypeError, "rederive_eps must be True or False, got 1"),
        (lambda: ddim(LINEAR, 5, final_alpha_cumprod=0.5), ValueError,
         "final_alpha_cumprod must be a finite number in [0.9999, 1], got 0.5"),
        (lambda: ddim_inversion(LINEAR, 5, evaluate_at="both"), ValueError,
         "evaluate_at must be one of 'source', 'target', got 'both'"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()
