"""Planted errors: the comparisons of test_equivalence must fail for each, or they would hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import reference
from stepfusion_testing.planted import planted
from stepfusion_testing.twins import StepCase, assert_rounded_alike, assert_same_bits, assert_step_equivalent

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # NumPy's

Plant = Callable[..., ModuleType]

PLAIN = StepCase((1030,), torch.float32, "drawn", copies=2)
LEARNED = StepCase((3, 7, 7), torch.float16, "drawn", learned=True)
GUIDED = StepCase((9,), torch.float32, "given", guidance=(7.5, 1.0, 0.0, 2.0))
SILENT = StepCase((9,), torch.float32, "none")
PLAIN_HALF = StepCase((1030,), torch.float16, "none")
UNGUIDED = StepCase((9,), torch.float32, "given", guidance=(7.5, 1.0, 0.0, 2.0), unguided=True)
HISTORY = StepCase((9,), torch.float32, "none", history=3)
BEYOND = StepCase((9,), torch.float32, "none", history=1, rows=(5, 1))
KNOWN = StepCase((1030,), torch.float32, "drawn", known=True)
FIXED = StepCase((9,), torch.float32, "none", known=True)

LOAD = "tl.load(coefficient_ptr"
NEXT = "tl.store(next_ptr + start + offs, x_next, mask=mask)"
KEEP = """keep_x = tl.load(coefficient_ptr + 17, mask=inside, other=float("nan"))
        keep_x0 = tl.load(coefficient_ptr + 18, mask=inside, other=float("nan"))"""
STEP_MUTANTS: dict[str, tuple[StepCase, str, str]] = {
    "a coefficient": (SILENT, "next_x * x + next_out * out\n", "x0_x * x + next_out * out\n"),
    "a sign": (SILENT, "+ next_out * out\n", "- next_out * out\n"),
    "a term left out": (SILENT, "next_x0 * x0 + next_x * x + next_out * out\n", "next_x0 * x0 + next_x * x\n"),
    "no clip": (
        SILENT,
        "tl.clamp(x0_x * x + x0_out * out, -clip, clip",
        "tl.clamp(x0_x * x + x0_out * out, -1e9, 1e9",
    ),
    "swapped columns": (SILENT, f"next_x0 = {LOAD} + 3", f"next_x0 = {LOAD} + 5"),
    "another row": (SILENT, "table_ptr + row * WIDTH", "table_ptr + tl.maximum(row - 1, 0) * WIDTH"),
    "the lane's stride": (SILENT, "start = lane.to(tl.int64) * E", "start = lane.to(tl.int64) * (E - 1)"),
    "the last element": (
        SILENT,
        NEXT,
        "tl.store(next_ptr + start + offs, x_next, mask=offs < E - 1)",
    ),
    "the last copy": (PLAIN, "tl.static_range(COPIES)", "tl.static_range(COPIES - 1)"),
    "x0 left out": (SILENT, "tl.store(x0_ptr + start + offs, x0, mask=mask)", "pass"),
    "x0 not the clipped one": (SILENT, "tl.store(x0_ptr + start + offs, x0,", "tl.store(x0_ptr + start + offs, x,"),
    "a parked lane": (SILENT, "if row < 0:", "if row < -1:"),
    "a parked lane filled": (SILENT, "if FILL:", "if not FILL:"),
    "the next quad": (PLAIN, "block * (BLOCK // 4), timestep", "block * (BLOCK // 4) + 1, timestep"),
    "one block's quads": (PLAIN, "block * (BLOCK // 4), timestep", "0, timestep"),
    "another lane's seed": (PLAIN, "tl.load(seed_ptr + lane)", "tl.load(seed_ptr)"),
    "another lane's index": (PLAIN, "tl.load(index_ptr + lane)", "tl.load(index_ptr)"),
    "the row for the timestep": (PLAIN, "tl.load(timestep_ptr + row)", "row"),
    "another stream": (PLAIN, "STREAM = tl.constexpr(STREAM_STEP)", "STREAM = tl.constexpr(STREAM_STEP + 1)"),
    "variance for std": (PLAIN, "x_next += std * z", "x_next += std * std * z"),
    "log variance for log std": (LEARNED, "tl.exp(half_log_min +", "tl.exp(2 * half_log_min +"),
    "v not moved to [0, 1]": (LEARNED, "tl.exp(half_log_min + (v * 0.5 + 0.5) *", "tl.exp(half_log_min + v *"),
    "out for v": (
        LEARNED,
        "(OUT_CHANNELS // 2 if OUT_CHANNELS else E)",
        "(OUT_CHANNELS // 2 if OUT_CHANNELS else 0)",
    ),
    "guidance from the wrong end": (GUIDED, "out, uncond + guidance *", "out, out + guidance *"),
    "no history": (HISTORY, "x_next += next_prev * tl.load(", "x_next += 0.0 * tl.load("),
    "history of the same row": (
        HISTORY,
        "next_prev * tl.load(kept_ptr + offs, mask=mask)",
        "next_prev * x0",
    ),
    "history read by a row without": (HISTORY, "if next_prev != 0.0:", "if next_prev == next_prev:"),
    "older history read by a row without": (HISTORY, "if next_prev2 != 0.0:", "if next_prev2 == next_prev2:"),
    "the oldest history read by a row without": (HISTORY, "if next_prev3 != 0.0:", "if next_prev3 == next_prev3:"),
    "an older entry for the oldest": (
        HISTORY,
        "next_prev3 * tl.load(kept_ptr + 2 * age",
        "next_prev3 * tl.load(kept_ptr + age",
    ),
    "the history of another lane": (HISTORY, "kept_ptr = history_ptr + start", "kept_ptr = history_ptr"),
    "the history's stride": (HISTORY, "age = B.to(tl.int64) * E", "age = (B.to(tl.int64) - 1) * E"),
    "the history not shifted": (
        HISTORY,
        "tl.store(kept_ptr + age + offs, tl.load(kept_ptr + offs, mask=mask), mask=mask)",
        "pass",
    ),
    "the oldest history not shifted": (
        HISTORY,
        "tl.store(kept_ptr + 2 * age + offs, tl.load(kept_ptr + age + offs, mask=mask), mask=mask)",
        "pass",
    ),
    "the history shifted in the wrong order": (
        HISTORY,
        "tl.store(kept_ptr + 2 * age + offs, tl.load(kept_ptr + age + offs, mask=mask), mask=mask)",
        "tl.store(kept_ptr + 2 * age + offs, tl.load(kept_ptr + offs, mask=mask), mask=mask)",
    ),
    "nothing kept": (HISTORY, "tl.store(kept_ptr + offs, keep_x * x + keep_x0 * x0, mask=mask)", "pass"),
    "x0 kept alone": (HISTORY, "keep_x * x + keep_x0 * x0, mask", "keep_x0 * x0, mask"),
    "the state kept alone": (HISTORY, "keep_x * x + keep_x0 * x0, mask", "keep_x * x, mask"),
    "every row keeps something": (HISTORY, "if (keep_x != 0.0) | (keep_x0 != 0.0):", "if keep_x == keep_x:"),
    "a row beyond the table keeps nothing": (BEYOND, KEEP, KEEP.replace('float("nan")', "0.0")),
    "what the network is shown not scaled": (SILENT, "(net_scale * x_next)", "(x_next)"),
    "the next state scaled": (SILENT, NEXT, f"x_next *= {LOAD} + 14)\n    {NEXT}"),
    "what the network is shown scaled after rounding": (
        PLAIN_HALF,
        "(net_scale * x_next).to(net_ptr.dtype.element_ty)",
        "(net_scale * x_next.to(tl.float16).to(tl.float32)).to(tl.float16)",
    ),
    "an unguided row guided": (UNGUIDED, "unguided == 0.0, guidance, 1.0", "True, guidance, 1.0"),
    "a guided row not guided": (UNGUIDED, "unguided == 0.0, guidance, 1.0", "unguided != unguided, guidance, 1.0"),
    "known region left to the sampler": (KNOWN, "known == known, known_x * known + known_sigma * z", "False, x_next"),
    "known region left alone without noise": (
        FIXED,
        "known == known, known_x * known, x_next",
        "False, x_next, x_next",
    ),
    "known region without noise": (KNOWN, "known + known_sigma * z, x_next", "known + 0.0 * z, x_next"),
    "known region by the sampler's scale": (KNOWN, "known + known_sigma * z, x_next", "known + sigma * z, x_next"),
    "known region of another lane": (
        KNOWN,
        "known = tl.load(known_ptr + start + offs, mask=mask)\n            x_next",
        "known = tl.load(known_ptr + offs, mask=mask)\n            x_next",
    ),
    "known_sigma for known_x": (KNOWN, "coefficient_ptr + 10", "coefficient_ptr + 11"),
    "noise of another lane": (GUIDED, "tl.load(noise_ptr + start + offs", "tl.load(noise_ptr + offs"),
}


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """A module of kernels/ with one text replaced, imported under a name and an op namespace of its own."""

    return partial(planted, tmp_path)


@pytest.mark.parametrize("case", list(dict.fromkeys(case for case, _, _ in STEP_MUTANTS.values())), ids=str)
def test_a_step_without_an_error_passes(case: StepCase, plant: Plant, kernel_device: torch.device) -> None:
    assert_step_equivalent(plant("step.py").diffusion_step, case.arguments(kernel_device))


@pytest.mark.parametrize("name", STEP_MUTANTS)
def test_an_error_in_the_step_is_caught(name: str, plant: Plant, kernel_device: torch.device) -> None:
    case, old, new = STEP_MUTANTS[name]
    step = plant("step.py", old, new).diffusion_step
    with pytest.raises(AssertionError, match=r"differ|beyond"):
        assert_step_equivalent(step, case.arguments(kernel_device))


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        (GUIDED, "guidance == 1.0", "guidance == 2.0"),
        (SILENT, "tl.load(flag_ptr + lane) < 0", "tl.load(flag_ptr + lane) >= 0"),
        (SILENT, ", propagate_nan=tl.PropagateNan.ALL", ""),
    ],
    ids=["guidance of one", "flags", "a NaN that the clip hides"],
)
def test_an_error_with_nan_is_caught(
    case: StepCase, old: str, new: str, plant: Plant, kernel_device: torch.device
) -> None:
    """These show only where something is not finite; the last one on a GPU, the interpreter's clamp keeps NaN."""
    if "propagate" in old and kernel_device.type == "cpu":
        pytest.skip("the interpreter's clamp keeps NaN in any case")
    given = case.arguments(kernel_device)
    given["out_uncond" if "out_uncond" in given else "out"][1] = torch.nan
    assert_step_equivalent(kernels.diffusion_step, given)
    step = plant("step.py", old, new).diffusion_step
    with pytest.raises(AssertionError, match=r"differ|beyond"):
        assert_step_equivalent(step, given)


def _compare_forward(module: Any, device: torch.device) -> None:
    x, t = torch.randn(3, 1030, device=device), torch.tensor([0, 5, 9], device=device)
    tables = torch.linspace(0.9, 0.1, 10, device=device), torch.linspace(0.1, 0.9, 10, device=device)
    lanes = {"seeds": t + 3, "indices": t + 1}
    got, twin = module.q_sample(x, t, *tables, **lanes), reference.q_sample(x, t, *tables, **lanes)
    for name, ours, theirs in zip(("x_t", "eps"), got, twin, strict=True):
        assert_rounded_alike(name, ours.cpu(), theirs.cpu(), interpreted=device.type == "cpu")


def _compare_posterior(module: Any, device: torch.device) -> None:
    x, y, t = (
        torch.randn(3, 9, device=device),
        torch.randn(3, 9, device=device),
        torch.tensor([0, 5, 9], device=device),
    )
    tables = torch.rand(4, 10, device=device).unbind()
    got = module.q_posterior_mean_variance(x, y, t, *tables)[0]
    assert_same_bits("mean", got.cpu(), reference.q_posterior_mean_variance(x, y, t, *tables)[0].cpu())


def _compare_pixels(module: Any, device: torch.device) -> None:
    x = torch.cat([torch.randn(2, 3, 5, 5), torch.full((1, 3, 5, 5), torch.nan)]).to(device)
    assert_same_bits("pixels", module.to_uint8(x).int().cpu(), reference.to_uint8(x).int().cpu())


OTHER_MUTANTS = [
    ("q_sample.py", _compare_forward, "signal * x_start + scale * noise", "scale * x_start + signal * noise"),
    ("q_sample.py", _compare_forward, "block * (BLOCK // 4), t", "block * (BLOCK // 4) + 1, t"),
    ("q_sample.py", _compare_forward, "tl.constexpr(STREAM_FORWARD)", "tl.constexpr(STREAM_FORWARD - 1)"),
    (
        "q_sample.py",
        _compare_forward,
        "tl.store(noise_out_ptr + start + offs, noise,",
        "tl.store(noise_out_ptr + offs, noise,",
    ),
    ("posterior.py", _compare_posterior, "coef1 * x_start + coef2 * x_t", "coef2 * x_start + coef1 * x_t"),
    ("posterior.py", _compare_posterior, "tl.load(coef2_ptr + t,", "tl.load(coef2_ptr + t // 2,"),
    ("to_uint8.py", _compare_pixels, "(level + 12582912.0) - 12582912.0", "level"),
    ("to_uint8.py", _compare_pixels, "(offs % C) * P + offs // C", "offs"),
    ("to_uint8.py", _compare_pixels, "tl.minimum(tl.maximum(level, 0.0), 1.0)", "tl.abs(level)"),
    ("to_uint8.py", _compare_pixels, "x * 0.5 + 0.5, 0.0)", "x * 0.5 + 0.5, 0.5)"),
]


@pytest.mark.parametrize(("file", "compare", "old", "new"), OTHER_MUTANTS)
def test_an_error_elsewhere_is_caught(
    file: str, compare: Callable[..., None], old: str, new: str, plant: Plant, kernel_device: torch.device
) -> None:
    compare(kernels, kernel_device)
    module = plant(file, old, new)
    with pytest.raises(AssertionError, match="differ"):
        compare(module, kernel_device)


def test_a_mutation_that_does_not_apply_is_an_error(plant: Plant) -> None:
    with pytest.raises(AssertionError, match="occurs 0 times"):
        plant("step.py", "no such text", "")
