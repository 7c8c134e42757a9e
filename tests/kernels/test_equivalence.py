"""Every fused op against its PyTorch twin, bit for bit where no exp is involved, and both against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion import kernels
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import philox, posterior, reference
from stepfusion.kernels import step as walker
from stepfusion.kernels.q_sample import q_sample_kernel
from stepfusion.kernels.to_uint8 import to_uint8_kernel, to_uint8_rgb_kernel
from stepfusion_testing.fused import Fused
from stepfusion_testing.twins import (
    StepCase,
    assert_rounded_alike,
    assert_same_bits,
    assert_step_equivalent,
    assert_within,
    final_bound,
    outputs,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, for inf * 0

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(), (1,), (7,), (1, 28, 28), (3, 32, 32), (2, 3, 4, 5), (1, 64, 64), (4101,)]
NOISES = ["none", "given", "drawn"]
ABAR = torch.linspace(0.9999**0.5, 0.0047**0.5, 1000, dtype=torch.float64) ** 2  # alphas_cumprod of a schedule
T = len(ABAR)

OPTIONS = [
    StepCase((3, 32, 32), torch.bfloat16, "none", guidance=(7.5, 1.0, 0.0, 1.0), copies=2),
    StepCase((3, 5, 5), torch.float16, "drawn", guidance=(1.0, 0.0, 7.5, 7.5), copies=2),
    StepCase((4, 8, 8), torch.float32, "given", guidance=(0.0, 7.5, 1.0, 1.0), copies=0, x0=False),
    StepCase((3, 8, 8), torch.bfloat16, "drawn", learned=True),
    StepCase((1, 28, 28), torch.float16, "given", learned=True, copies=2),
    StepCase((3, 5, 5), torch.float32, "drawn", learned=True, guidance=(7.5, 1.0, 0.0, 3.0)),
    StepCase((2, 3), torch.float32, "none", learned=True),
    StepCase((5, 5), torch.float32, "drawn", clip=float("inf")),
    StepCase((5, 5), torch.float32, "drawn", clip=1e-3),
    StepCase((9,), torch.float32, "drawn", rows=()),
    StepCase((0, 9), torch.float32, "drawn", x0=False),
    StepCase((9,), torch.float32, "drawn", rows=(kernels.PARKED,) * 3),
    StepCase((9,), torch.float32, "drawn", rows=(4,)),
    *(StepCase((3, 7, 7), dtype, noise, history=1) for dtype in DTYPES for noise in ("none", "drawn")),
    *(StepCase((1030,), dtype, "drawn", history=n, copies=2) for dtype in DTYPES for n in (2, 3)),
    *(StepCase((3, 5, 5), torch.bfloat16, noise, history=3, x0=False) for noise in NOISES),
    *(StepCase((), torch.float32, "none", history=n, copies=n - 1) for n in (1, 2, 3)),
    StepCase((3, 5, 5), torch.float16, "drawn", guidance=(7.5, 1.0, 0.0, 3.0), unguided=True, copies=2),
    StepCase((2, 3), torch.float32, "none", learned=True, guidance=(7.5, 2.0, 0.0, 3.0), unguided=True, history=2),
    StepCase((9,), torch.float32, "drawn", history=3, rows=()),
    StepCase((0, 9), torch.float32, "drawn", history=2),
    StepCase((9,), torch.float32, "drawn", history=2, rows=(kernels.PARKED,) * 3),
    StepCase((9,), torch.float32, "drawn", history=3, rows=(5, 1, 2**40, 2)),
    *(StepCase((1, 65, 80), dtype, noise, known=True) for dtype in DTYPES for noise in NOISES),
    StepCase((3, 32, 32), torch.bfloat16, "given", history=1, known=True, guidance=(7.5, 1.0, 0.0, 1.0), copies=2),
    StepCase((4101,), torch.float32, "drawn", learned=True, history=1, known=True),
    StepCase((4101,), torch.float16, "drawn", learned=True, history=3, known=True),
    StepCase((7,), torch.float32, "drawn", known=True, rows=(5, 1, 2**40)),
]


@pytest.fixture
def device(kernel_device: torch.device) -> torch.device:
    return kernel_device


# The table walker


def _in_turn(noises: list[str]) -> list[Any]:
    """Every shape, dtype and source of noise: the quick ones have every pair of a dtype and another."""
    return [
        pytest.param(shape, dtype, noise, marks=() if k == (i + j) % len(noises) else pytest.mark.soak)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
        for k, noise in enumerate(noises)
    ]


@pytest.mark.parametrize(("shape", "dtype", "noise"), _in_turn(NOISES))
def test_step(shape: tuple[int, ...], dtype: torch.dtype, noise: str, fused: Fused) -> None:
    assert_step_equivalent(
        fused.ops.diffusion_step, StepCase(shape, dtype, noise).arguments(fused.device), truncated=fused.truncates
    )


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_step_options(case: StepCase, fused: Fused) -> None:
    assert_step_equivalent(fused.ops.diffusion_step, case.arguments(fused.device), truncated=fused.truncates)


def _relayout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x`` under other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


LAYOUTS = ["channels_last", "transposed", "strided"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_of_inputs_that_are_not_contiguous(layout: str, fused: Fused) -> None:
    case = StepCase((3, 8, 8), torch.bfloat16, "given", learned=True, guidance=(7.5, 1.0, 0.0, 3.0), history=2)
    dense = case.arguments(fused.device)
    moved = {
        name: _relayout(t, layout) if name in ("x", "out", "noise", "out_uncond") else t for name, t in dense.items()
    }
    moved["guidance"] = _relayout(dense["guidance"], "strided")
    moved["coefficients"] = _relayout(dense["coefficients"], "transposed")
    moved["rows"] = torch.stack([dense["rows"], dense["rows"]], dim=1)[:, 0]
    assert moved["history"].is_contiguous()
    assert not any(moved[n].is_contiguous() for n in ("x", "out", "noise", "out_uncond", "guidance", "rows"))
    for step in (fused.ops.diffusion_step, reference.diffusion_step):
        for name, result in outputs(step, moved).items():
            assert_same_bits(name, result, outputs(step, dense)[name])


def test_step_without_a_buffer_makes_one(implementation: Fused) -> None:
    step = implementation.ops.diffusion_step
    given = StepCase((3, 4), rows=(1, kernels.PARKED)).arguments(implementation.device)
    before = given["x"].clone()
    in_buffer = outputs(step, given)["x_next"]
    result = step(**{name: t for name, t in given.items() if name != "x_next"})
    assert torch.equal(given["x"], before)
    assert_same_bits("x_next", result[0].cpu(), in_buffer[0])
    assert torch.equal(result[1], before[1])  # parked: the state stays
    given = StepCase((3, 4, 4)).arguments(implementation.device)
    given["x"] = _relayout(given["x"], "channels_last")
    assert step(**{name: t for name, t in given.items() if name != "x_next"}).is_contiguous()


@pytest.mark.parametrize("history", [0, 3])
@pytest.mark.parametrize("shape", [(7,), (4101,)])
def test_step_in_place(shape: tuple[int, ...], history: int, implementation: Fused) -> None:
    """What is kept is made of the state before the step."""
    step = implementation.ops.diffusion_step
    given = StepCase(shape, history=history).arguments(implementation.device)
    expected = outputs(step, given)
    apart, x = expected["x_next"], given["x"].clone()
    buffers = {"history": given["history"].clone()} if history else {}
    assert step(**{**given, **buffers, "x": x, "x_next": x}) is x
    if history:
        assert_same_bits("history", buffers["history"].cpu(), expected["history"])
    active = torch.tensor([0, 1, 3])
    assert_same_bits("x", x.cpu()[active], apart[active])
    assert torch.equal(x[2], given["x"][2])


def test_parked_lanes_are_neither_read_nor_written(fused: Fused) -> None:
    given = StepCase((4101,), rows=(1, kernels.PARKED, 2), copies=2).arguments(fused.device)
    clean = outputs(fused.ops.diffusion_step, given)
    for name in ("x", "out"):
        given[name][1] = torch.nan
    given["seeds"][1] = 12345
    poisoned = outputs(fused.ops.diffusion_step, given)
    for name, result in poisoned.items():
        assert_same_bits(name, result, clean[name])
    assert bool(poisoned["x_next"][1].isnan().all())
    assert bool(poisoned["x_net"][[1, 4]].isnan().all())
    assert poisoned["flags"][1] == kernels.FINITE


def test_a_threshold_is_for_the_reference(fused: Fused) -> None:
    """Rows with one give NaN in the kernel, which sees no whole image, and no lane else is touched."""
    given = StepCase((3, 5), torch.float32, "drawn", rows=(1, 2)).arguments(fused.device)
    plain = outputs(fused.ops.diffusion_step, given)
    given["coefficients"] = given["coefficients"].clone()
    given["coefficients"][2, algebra.COLUMNS.index("threshold")] = 0.9
    given["coefficients"][2, algebra.COLUMNS.index("threshold_max")] = 1.5
    got, want = outputs(fused.ops.diffusion_step, given), outputs(reference.diffusion_step, given)
    assert got["x_next"][1].isnan().all()
    assert want["x_next"].isfinite().all()
    for name in ("x_next", "x0"):
        assert_same_bits(name, got[name][0], plain[name][0])
        assert_same_bits(name, want[name][0], plain[name][0])


def test_what_is_known_leaves_the_free_part_alone(fused: Fused) -> None:
    """And its last row, known_x = 1 and known_sigma = 0, is the image to the bit."""
    given = StepCase((1030,), torch.float16, "drawn", known=True, rows=(1, 3)).arguments(fused.device)
    given["coefficients"] = given["coefficients"].clone()
    given["coefficients"][1, algebra.COLUMNS.index("known_x")] = 1.0
    known = given["known"].cpu()
    for step in (fused.ops.diffusion_step, reference.diffusion_step):
        got = outputs(step, given)["x_next"]
        plain = outputs(step, {name: tensor for name, tensor in given.items() if name != "known"})["x_next"]
        assert torch.equal(got[known.isnan()], plain[known.isnan()])
        assert torch.equal(got[0][~known[0].isnan()], known[0][~known[0].isnan()])
        assert not torch.equal(got[1][~known[1].isnan()], known[1][~known[1].isnan()])


def test_both_network_copies_are_the_next_state(fused: Fused) -> None:
    given = StepCase((7,), torch.float32, copies=2, rows=(1, 2)).arguments(fused.device)
    given["coefficients"][:, algebra.COLUMNS.index("net_scale")] = 1.0
    got = outputs(fused.ops.diffusion_step, given)
    assert_same_bits("x_net", got["x_net"], torch.cat([got["x_next"], got["x_next"]]))


@pytest.mark.parametrize("noise", NOISES)
def test_rows_beyond_the_table_give_nan(noise: str, implementation: Fused) -> None:
    step = implementation.ops.diffusion_step
    got = outputs(step, StepCase((1030,), noise=noise, rows=(5, 1, 2**40)).arguments(implementation.device))
    for name in ("x_next", "x_net", "x0"):
        assert got[name][[0, 2]].isnan().all()
        assert got[name][1].isfinite().all()
    assert got["flags"].tolist() == [5, kernels.FINITE, 2**40]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("element", [0, 511, 4100])
def test_what_is_not_finite_flags_its_lane_and_row(element: int, value: float, implementation: Fused) -> None:
    step = implementation.ops.diffusion_step
    given = StepCase((4101,), torch.float16, rows=(1, 3, 2), clip=torch.inf).arguments(implementation.device)
    given["out"][1, element] = value
    got = outputs(step, given)
    assert got["flags"].tolist() == [kernels.FINITE, 3, kernels.FINITE]
    assert (~got["x_next"].isfinite()).nonzero().tolist() == [[1, element]]


def test_a_flag_keeps_the_first_row(fused: Fused) -> None:
    given = StepCase((7,), rows=(1, 3)).arguments(fused.device)
    given["out"][:, 2] = torch.nan
    given["flags"][0] = 4
    for step in (fused.ops.diffusion_step, reference.diffusion_step):
        assert outputs(step, given)["flags"].tolist() == [4, 3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_the_same_in_both(value: float, fused: Fused) -> None:
    """A clip must not hide a NaN from x0."""
    for name in ("x", "out"):
        given = StepCase((33,)).arguments(fused.device)
        given[name][1, 5] = value
        got, twin = (outputs(step, given) for step in (fused.ops.diffusion_step, reference.diffusion_step))
        for output in got:
            assert_same_bits(output, got[output], twin[output])


def test_guidance_of_one_is_the_conditional_output(fused: Fused) -> None:
    """Exactly, even where the other output is not finite."""
    case = StepCase((9,), guidance=(1.0, 1.0, 1.0, 1.0))
    given = case.arguments(fused.device)
    given["out_uncond"][:] = torch.inf
    alone = {name: t for name, t in given.items() if name not in ("out_uncond", "guidance")}
    for step in (fused.ops.diffusion_step, reference.diffusion_step):
        for name, result in outputs(step, given).items():
            assert_same_bits(name, result, outputs(step, alone)[name])


def test_silent_rows_read_no_noise(fused: Fused) -> None:
    given = StepCase((1030,), noise="given", rows=(0, 1)).arguments(fused.device)
    clean = outputs(fused.ops.diffusion_step, given)
    given["noise"][0] = torch.nan
    for step in (fused.ops.diffusion_step, reference.diffusion_step):
        for name, result in outputs(step, given).items():
            assert_same_bits(name, result, clean[name])


@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "draws"), [((0, 0), 0), ((0, kernels.PARKED), 0), ((0, 1), 1), ((1, 2), 2)])
def test_silent_rows_draw_no_noise(
    rows: tuple[int, ...], draws: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def counted(*arguments: Any) -> Any:
        drawn.append(1)
        return philox.normal_block(*arguments)

    monkeypatch.setattr(walker, "normal_block", counted)
    outputs(kernels.diffusion_step, StepCase((9,), rows=rows).arguments(device))
    assert len(drawn) == draws


# One step between two timesteps


def _lanes(device: torch.device, prediction: str, zero_snr: bool) -> tuple[torch.Tensor, ...]:
    """x, out, t, t_prev and alphas_cumprod: four lanes, from T - 1, to the end, and two between."""
    abar = ABAR.clone()
    if zero_snr:
        abar[-1] = 0.0
    x, out = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    t, t_prev = torch.tensor([T - 1, 0, 500, 20]), torch.tensor([T - 21, -1, 480, 0])
    return tuple(tensor.to(device) for tensor in (x, out, t, t_prev, abar))


def _levels(t: torch.Tensor, t_prev: torch.Tensor, abar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (-1, 1, 1, 1)
    ended = torch.where(t_prev < 0, 1.0, abar[t_prev.clamp(min=0)])
    return abar[t].view(shape), ended.view(shape)


def _x0_and_eps(
    x: torch.Tensor, out: torch.Tensor, abar: torch.Tensor, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both from the network's output, in the papers' words."""
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    if prediction == "epsilon":
        return (x - noise * out) / signal, out
    if prediction == "sample":
        return out, (x - signal * out) / noise
    return signal * x - noise * out, noise * x + signal * out


SINGLE = [
    (prediction, zero_snr)
    for prediction in ("epsilon", "sample", "v_prediction")
    for zero_snr in (False, True)
    if not (zero_snr and prediction == "epsilon")
]


@pytest.mark.parametrize(("prediction", "zero_snr"), SINGLE)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("rederive", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_step(
    eta: float, rederive: bool, clip: float | None, prediction: str, zero_snr: bool, fused: Fused
) -> None:
    """Against Song et al. 2021, equation 12, written out in float64."""
    x, out, t, t_prev, abar = _lanes(fused.device, prediction, zero_snr)
    z = torch.randn_like(x)
    options: dict[str, Any] = {
        "eta": eta,
        "prediction": prediction,
        "clip": clip,
        "rederive_eps": rederive,
        "noise": z,
    }
    got = fused.ops.ddim_step(x, out, t, t_prev, abar, **options)
    twin = reference.ddim_step(x, out, t, t_prev, abar, **options)
    assert_same_bits("x_prev", got.cpu(), twin.cpu())

    level, level_prev = _levels(t, t_prev, abar)
    x0, eps = _x0_and_eps(x.double(), out.double(), level, prediction)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        eps = (x - level.sqrt() * x0) / (1 - level).sqrt() if rederive else eps
    sigma = eta * ((1 - level_prev) / (1 - level)).sqrt() * (1 - level / level_prev).sqrt()
    want = level_prev.sqrt() * x0 + (1 - level_prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * z
    # the largest terms: x and out over sqrt(abar), and the weights of x that cancel at the last step
    largest = 10 * float(1 / level[level > 0].min().sqrt() + 1 / (1 - level).min().sqrt())
    assert_within("x_prev", got.cpu(), want.cpu(), 12 * 2.0**-23 * largest)


@pytest.mark.parametrize("column", ["x0_x", "x0_out", "next_x0", "next_x", "next_out", "sigma"])
def test_one_percent_off_in_a_coefficient_is_caught(
    column: str, fused: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the comparison above: fused and reference share the algebra, so only formulas see its errors."""
    right = algebra.ddim

    def wrong(*levels: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
        columns = right(*levels, **options)
        return {**columns, column: columns[column] * 1.01}

    monkeypatch.setattr(algebra, "ddim", wrong)
    with pytest.raises(AssertionError, match="beyond"):
        test_ddim_step(0.7, column == "next_x", 1.0, "epsilon", False, fused)


@pytest.mark.parametrize(("prediction", "zero_snr"), SINGLE)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_step(variance: str, prediction: str, zero_snr: bool, fused: Fused) -> None:
    """Against Ho et al. 2020, equations 6 and 7, and Nichol & Dhariwal 2021, equation 15, written out in float64."""
    x, out, t, t_prev, abar = _lanes(fused.device, prediction, zero_snr)
    z, v = torch.randn_like(x), torch.rand_like(x) * 2 - 1
    options: dict[str, Any] = {"variance": variance, "prediction": prediction, "clip": 1.0, "noise": z}
    given = torch.cat([out, v], dim=1) if variance == "learned_range" else out
    got = fused.ops.ddpm_step(x, given, t, t_prev, abar, **options)
    twin = reference.ddpm_step(x, given, t, t_prev, abar, **options)

    level, level_prev = _levels(t, t_prev, abar)
    x0 = _x0_and_eps(x.double(), out.double(), level, prediction)[0].clamp(-1, 1)
    alpha = level / level_prev
    small, large = (1 - level_prev) / (1 - level) * (1 - alpha), 1 - alpha
    mean = level_prev.sqrt() * large / (1 - level) * x0 + alpha.sqrt() * (1 - level_prev) / (1 - level) * x
    spread = (v.double() + 1) / 2
    learned = (spread * large.log() + (1 - spread) * small.clamp(min=1e-20).log()).exp()
    chosen = {"fixed_small": small, "fixed_large": large, "learned_range": learned}[variance]
    want = mean + torch.where(t_prev.view(-1, 1, 1, 1) < 0, 0.0, chosen.sqrt()) * z
    bound = 12 * 2.0**-23 * 50  # x0 before its clip, at the level of 20 and of T - 1, is below 50
    assert_within("x_prev", got.cpu(), want.cpu(), bound)
    if variance == "learned_range":
        assert_within("x_prev", got.cpu(), twin.cpu(), bound)
    else:
        assert_same_bits("x_prev", got.cpu(), twin.cpu())


def test_timesteps_outside_the_schedule_give_nan(fused: Fused) -> None:
    x, out, _, _, abar = _lanes(fused.device, "epsilon", False)
    t, t_prev = (torch.tensor(v, device=fused.device) for v in ([T, 10, -1, 10], [0, T, 0, -2]))
    for step in (fused.ops.ddim_step, fused.ops.ddpm_step, reference.ddim_step, reference.ddpm_step):
        assert step(x, out, t, t_prev, abar).isnan().all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 5, 7), (1, 4, 4), (3, 40, 36)], ids=str)
@pytest.mark.parametrize("copies", [1, 2])
def test_a_network_in_nhwc_memory_takes_and_gives_the_same_bits(
    shape: tuple[int, ...], copies: int, fused: Fused
) -> None:
    """Also where it returns its variance, guided; what is drawn is keyed by the element's place in C order."""
    table, lanes = sf.ddpm(sf.NoiseSchedule.linear(100), 5), 3
    channels, *size = shape
    numbers = torch.arange(lanes, device=fused.device)
    given = {
        "x": torch.randn(lanes, *shape, device=fused.device),
        "out": torch.randn(lanes, 2 * channels, *size, device=fused.device).half(),
        "rows": torch.tensor([0, -1, 4], device=fused.device),
        "coefficients": torch.from_numpy(table.coefficients.copy()).float().to(fused.device),
        "timesteps": torch.from_numpy(table.timesteps.copy()).to(fused.device),
        "seeds": numbers,
        "indices": numbers,
        "out_uncond": torch.randn(lanes, 2 * channels, *size, device=fused.device).half(),
        "guidance": torch.tensor([1.0, 2.0, 3.0], device=fused.device),
    }
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        net = torch.zeros(copies * lanes, *shape, device=fused.device).half().to(memory_format=memory)
        laid_out = {name: given[name].to(memory_format=memory) for name in ("out", "out_uncond")}
        results.append((fused.ops.diffusion_step(**given | laid_out, x_net=net), net))
        assert net.is_contiguous(memory_format=memory)
    for name, ours, theirs in zip(("x_next", "x_net"), *results, strict=True):
        assert_same_bits(name, ours, theirs)
    assert results[0][1].any()


# The forward process and its posterior


def _forward_arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    t = torch.tensor([0, T - 1, 500])
    given = {
        "x_start": torch.randn((len(t), *shape)).to(dtype),
        "t": t,
        "sqrt_alphas_cumprod": ABAR.sqrt().float(),
        "sqrt_one_minus_alphas_cumprod": (1 - ABAR).sqrt().float(),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def _double(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


@pytest.mark.parametrize(("shape", "dtype", "noise"), _in_turn(NOISES[1:]))
def test_q_sample(shape: tuple[int, ...], dtype: torch.dtype, noise: str, fused: Fused) -> None:
    given = _forward_arguments(shape, dtype, fused.device)
    if noise == "given":
        given["noise"] = torch.randn_like(given["x_start"], dtype=torch.float32)
    else:
        given |= {"seeds": torch.tensor([1, -1, 2**62], device=fused.device), "indices": given["t"] + 2**31}
    x_t, eps = fused.ops.q_sample(**given)
    twin, twin_eps = reference.q_sample(**given)
    truth, _ = reference.q_sample(**_double(given))
    assert_same_bits("eps", eps.cpu(), twin_eps.cpu())
    assert_rounded_alike("x_t", x_t.cpu(), twin.cpu(), interpreted=fused.truncates)
    bound = final_bound(dtype, "q_sample", given["x_start"], eps)
    for result in (x_t, twin):
        assert_within("x_t", result.cpu(), truth.cpu(), bound)


def _posterior_arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    alpha = ABAR / torch.cat([torch.ones(1, dtype=torch.float64), ABAR[:-1]])
    previous = ABAR / alpha
    variance = (1 - previous) / (1 - ABAR) * (1 - alpha)
    t = torch.tensor([0, T - 1, 500])
    given = {
        "x_start": torch.randn((len(t), *shape)).to(dtype),
        "x_t": torch.randn((len(t), *shape)).to(dtype),
        "t": t,
        "posterior_mean_coef1": (previous.sqrt() * (1 - alpha) / (1 - ABAR)).float(),
        "posterior_mean_coef2": (alpha.sqrt() * (1 - previous) / (1 - ABAR)).float(),
        "posterior_variance": variance.float(),
        "posterior_log_variance_clipped": variance.clamp(min=float(variance[1])).log().float(),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_posterior(shape: tuple[int, ...], dtype: torch.dtype, fused: Fused) -> None:
    given = _posterior_arguments(shape, dtype, fused.device)
    got, twin = (op.q_posterior_mean_variance(**given) for op in (fused.ops, reference))
    truth = reference.q_posterior_mean_variance(**_double(given))
    assert_rounded_alike("mean", got[0].cpu(), twin[0].cpu(), interpreted=fused.truncates)
    for name, ours, theirs in zip(("variance", "log variance"), got[1:], twin[1:], strict=True):
        assert ours.shape == (3, *(1,) * len(shape))
        assert_same_bits(name, ours.cpu(), theirs.cpu())
    bound = final_bound(dtype, "q_posterior_mean_variance", given["x_start"], given["x_t"])
    for result in (got, twin):
        assert_within("mean", result[0].cpu(), truth[0].cpu(), bound)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_of_inputs_that_are_not_contiguous(layout: str, fused: Fused) -> None:
    given = _posterior_arguments((3, 8, 8), torch.float16, fused.device)
    moved = {**given, **{name: _relayout(given[name], layout) for name in ("x_start", "x_t")}}
    dense, strided = (fused.ops.q_posterior_mean_variance(**g)[0].cpu() for g in (given, moved))
    assert_same_bits("mean", strided, dense)
    given = _forward_arguments((3, 8, 8), torch.float16, fused.device)
    given["noise"] = torch.randn_like(given["x_start"])
    moved = {**given, **{name: _relayout(given[name], layout) for name in ("x_start", "noise")}}
    dense, strided = (fused.ops.q_sample(**g)[0].cpu() for g in (given, moved))
    assert_same_bits("x_t", strided, dense)


def test_float64_tables_are_read_as_float32(fused: Fused) -> None:
    given = _forward_arguments((7,), torch.float32, fused.device)
    noise = torch.randn_like(given["x_start"])
    tables = {name: t.double() + 1e-9 for name, t in given.items() if name.startswith("sqrt")}
    got, twin = (op.q_sample(**{**given, **tables}, noise=noise)[0].cpu() for op in (fused.ops, reference))
    assert_same_bits("x_t", got, twin)
    given = _posterior_arguments((7,), torch.float32, fused.device)
    tables = {name: t.double() + 1e-9 for name, t in given.items() if name.startswith("posterior")}
    means = (op.q_posterior_mean_variance(**{**given, **tables})[0].cpu() for op in (fused.ops, reference))
    assert_same_bits("mean", *means)


@pytest.mark.parametrize("t", [[T, 3], [-1, 3], [2**40, 3]])
def test_forward_outside_the_schedule_gives_nan(t: list[int], fused: Fused) -> None:
    for op in (fused.ops, reference):
        given = _forward_arguments((7,), torch.float32, fused.device)
        given |= {"x_start": given["x_start"][:2], "t": torch.tensor(t, device=fused.device)}
        x_t, _ = op.q_sample(**given, noise=torch.zeros_like(given["x_start"]))
        assert x_t.isnan().all(1).tolist() == [True, False]
        given = _posterior_arguments((7,), torch.float32, fused.device)
        given |= {name: given[name][:2] for name in ("x_start", "x_t")} | {"t": torch.tensor(t, device=fused.device)}
        for result in op.q_posterior_mean_variance(**given):
            assert result.isnan().all(1).tolist() == [True, False]


def test_forward_of_an_empty_batch(implementation: Fused) -> None:
    given = {
        n: t[:0] if n in ("x_start", "t") else t
        for n, t in _forward_arguments((3, 4), torch.half, implementation.device).items()
    }
    assert implementation.ops.q_sample(**given, noise=given["x_start"])[0].shape == (0, 3, 4)
    given = _posterior_arguments((3, 4), torch.half, implementation.device)
    given |= {name: given[name][:0] for name in ("x_start", "x_t", "t")}
    assert [r.shape for r in implementation.ops.q_posterior_mean_variance(**given)] == [
        (0, 3, 4),
        (0, 1, 1),
        (0, 1, 1),
    ]


# Pixels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 1, 28, 28), (2, 3, 32, 32), (3, 4, 5, 7), (1, 2, 1, 1), (0, 3, 4, 4), (1, 1, 64, 64)]
)
def test_to_uint8(shape: tuple[int, ...], dtype: torch.dtype, fused: Fused) -> None:
    x = (torch.randn(shape) * 0.8).to(dtype)
    got = fused.ops.to_uint8(x.to(fused.device)).cpu()
    level = np.clip(x.float().numpy() * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    want = np.rint(level).astype(np.uint8).transpose(0, 2, 3, 1)
    assert got.shape == want.shape
    assert np.array_equal(got.numpy(), want)
    assert torch.equal(got, reference.to_uint8(x))
    if x.numel():
        assert int((got.int() - reference.to_uint8(x.double()).int()).abs().max()) <= 1  # a half, rounded either way


def test_to_uint8_at_the_edges(fused: Fused) -> None:
    """Halves go to the even pixel; what lies outside is clamped; NaN is 0."""
    halves = (torch.arange(255) + 0.5) / 255 * 2 - 1
    level = halves * 0.5 + 0.5
    exact = halves[level * 255.0 == torch.arange(255) + 0.5]
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 5.0, -5.0, 0.0])
    x = torch.cat([exact, special]).view(1, 1, 1, -1)
    got = fused.ops.to_uint8(x.to(fused.device)).cpu()
    assert torch.equal(got, reference.to_uint8(x))
    pixels = got.flatten().tolist()
    assert len(exact) > 20
    assert all(pixel % 2 == 0 for pixel in pixels[: len(exact)])
    assert pixels[len(exact) :] == [0, 255, 0, 255, 0, 255, 0, 128]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_uint8_of_inputs_that_are_not_contiguous(layout: str, fused: Fused) -> None:
    x = torch.randn(2, 3, 8, 8, device=fused.device)
    assert torch.equal(fused.ops.to_uint8(_relayout(x, layout)), fused.ops.to_uint8(x))


# Offsets of 64 bits. The interpreter reads real addresses, so a batch of 4 * 2**30 + BLOCK elements needs an address
# space, of which only the last page is touched. An offset in 32 bits would wrap around to lane 0.

FAR, WIDE = 4, 2**30
BLOCK = 1024


def _reserve(folder: Path, dtype: torch.dtype, elements: int = FAR * WIDE + BLOCK) -> torch.Tensor:
    """Zeros that take no memory until they are touched: a file with a hole, which has no name any more."""
    path = folder / "zeros"
    zeros = torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
    path.unlink()
    return zeros


@pytest.mark.interpreter
def test_step_beyond_two_to_the_31_elements(device: torch.device, tmp_path: Path) -> None:
    far = slice(FAR * WIDE, None)
    x, out = _reserve(tmp_path, torch.float32), _reserve(tmp_path, torch.float16)
    net = _reserve(tmp_path, torch.float16, (2 * FAR + 1) * WIDE + BLOCK)
    x[far], out[far] = torch.randn(BLOCK), torch.randn(BLOCK).half()
    given = StepCase((BLOCK,), torch.float16, rows=(1,), copies=2, x0=False).arguments(device)
    given |= {"x": x[far][None].clone(), "out": out[far][None].clone()}
    want = outputs(kernels.diffusion_step, given)

    def lanes(value: torch.Tensor) -> torch.Tensor:
        return value.expand(FAR + 1).contiguous()

    rows = torch.full((FAR + 1,), kernels.PARKED)
    rows[FAR] = 1
    arrays = (
        x,
        out,
        None,
        None,
        x,
        net,
        None,
        None,
        None,
        lanes(given["flags"]),
        rows,
        given["coefficients"],
        given["timesteps"],
    )
    walker.diffusion_step_kernel[(FAR + 1, 1)](
        *arrays,
        lanes(given["seeds"]),
        lanes(given["indices"]),
        None,
        WIDE,
        FAR + 1,
        5,
        FILL=False,
        LEARNED=False,
        COPIES=2,
        HISTORY=0,
        OUT_CHANNELS=0,
        NET_CHANNELS=0,
        PIXELS=0,
        EVEN=True,
        VEC=8,
        BLOCK=BLOCK,
    )
    assert_same_bits("x_next", x[far], want["x_next"][0])
    for start in (FAR * WIDE, (2 * FAR + 1) * WIDE):
        assert_same_bits("x_net", net[start : start + BLOCK], want["x_net"][0])
    assert not x[:BLOCK].any()
    assert not net[:BLOCK].any()


@pytest.mark.interpreter
def test_other_kernels_beyond_two_to_the_31_elements(tmp_path: Path) -> None:
    far = slice(FAR * WIDE, None)
    x, y, pixels = (
        _reserve(tmp_path, torch.float32),
        _reserve(tmp_path, torch.float32),
        _reserve(tmp_path, torch.uint8),
    )
    x[far] = torch.randn(BLOCK)
    t, one = torch.full((FAR + 1,), 7), torch.full((T,), 1.0)
    grid, common = (FAR + 1, 1), {"EVEN": True, "BLOCK": BLOCK}
    variances = torch.zeros(2, FAR + 1)
    posterior.q_posterior_kernel[grid](x, x, y, *variances, t, one, one, 3 * one, 4 * one, WIDE, T, **common)
    assert torch.equal(y[far], 2 * x[far])
    assert variances[:, -1].tolist() == [3.0, 4.0]
    q_sample_kernel[grid](x, x, y, None, t, one, 2 * one, None, None, WIDE, T, VEC=4, **common)
    assert torch.equal(y[far], 3 * x[far])
    to_uint8_kernel[grid](x, pixels, WIDE, WIDE, C=1, **common)
    assert torch.equal(pixels[far], reference.to_uint8(x[far].view(1, 1, 1, -1)).flatten())
    philox.normal_kernel[grid](y, t, t, t, 0, WIDE, **common)
    assert torch.equal(y[far], reference.normal(t[:1], t[:1], t[:1], (BLOCK,))[0])


@pytest.mark.interpreter
def test_pixels_beyond_two_to_the_31_elements(tmp_path: Path) -> None:
    plane = 2**28
    x, words = (
        _reserve(tmp_path, torch.float32, (3 * FAR + 2) * plane + BLOCK),
        _reserve(tmp_path, torch.int32, plane * 4),
    )
    colours = torch.randn(1, 3, 1, BLOCK)
    for c in range(3):
        start = (3 * FAR + c) * plane
        x[start : start + BLOCK] = colours[0, c, 0]
    to_uint8_rgb_kernel[(FAR + 1, 1)](x, words, plane, EVEN=True, BLOCK=BLOCK)
    far = words[FAR * 3 * plane // 4 :][: 3 * BLOCK // 4]
    assert torch.equal(far.view(torch.uint8), reference.to_uint8(colours).flatten())
