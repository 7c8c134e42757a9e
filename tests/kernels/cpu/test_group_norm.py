"""The C++ group norm against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepfusion.kernels import reference
from stepfusion.kernels.cpu import group_norm
from stepfusion.kernels.cpu.group_norm import group_norm_silu_cpu
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.cpu_kernels import needs_kernel

BFLOAT16 = torch.bfloat16


def images(*shape: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) + shift
    return x.to(BFLOAT16).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x.to(BFLOAT16)


def exact(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, **options: Tensor | bool | None
) -> Tensor:
    wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in options.items()}
    return reference.group_norm_silu(x.double(), weight.double(), bias.double(), groups, eps, **wide)


def agree(y: Tensor, expected: Tensor) -> None:
    """Within float32 roundings and one to bfloat16, at the largest magnitude of a result."""
    allowed = tolerance(BFLOAT16, float(expected.abs().max()), ROUNDINGS["group_norm_silu"])
    assert y.dtype == BFLOAT16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert float((y - expected).abs().max()) <= allowed


@needs_kernel
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width", "groups"),
    [
        (8, 128, 8, 8, 32),
        (3, 384, 5, 7, 32),  # groups of 12 channels
        (2, 144, 4, 4, 8),
        (1, 16, 1, 1, 4),
        (2, 48, 3, 3, 1),
        (1, 768, 2, 2, 32),
        (2, 160, 9, 9, 80),
    ],
)
def test_it_is_the_reference(batch: int, channels: int, height: int, width: int, groups: int, silu: bool) -> None:
    x, weight, bias = images(batch, channels, height, width), images(channels), images(channels)
    options: dict[str, Tensor | bool | None] = {
        "time": images(batch, 3 * channels)[:, channels : 2 * channels],  # rows that lie apart
        "silu": silu,
    }
    y = group_norm_silu_cpu(x, weight, bias, groups, 1e-5, **options)
    agree(y, exact(x, weight, bias, groups, 1e-5, **options))
    options |= {"time": None, "scale": images(batch, channels), "shift": images(batch, channels, shift=1.0)}
    y = group_norm_silu_cpu(x, weight, bias, groups, 1e-5, **options)
    agree(y, exact(x, weight, bias, groups, 1e-5, **options))


@needs_kernel
def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """256, and 258 in one pixel of a hundred: the variance, 0.04, is lost where squares of 65536 are summed."""
    x, weight, bias = torch.full((2, 32, 4096), 256.0), images(32), images(32)
    x[:, :, 50::100] = 258.0
    x = x.view(2, 32, 64, 64).bfloat16().contiguous(memory_format=torch.channels_last)
    agree(group_norm_silu_cpu(x, weight, bias, 8, 1e-6), exact(x, weight, bias, 8, 1e-6))


@needs_kernel
@pytest.mark.parametrize("pixel", [0, 70, 65535])
def test_a_pixel_far_from_the_others_costs_no_digits(pixel: int) -> None:
    """1000 where the others have variance 1, at the corner too: squares of distances from it would bury them."""
    x, weight, bias = images(1, 16, 256, 256), images(16), images(16)
    x.permute(0, 2, 3, 1).view(1, -1, 16)[:, pixel] = 1000.0
    y, expected = group_norm_silu_cpu(x, weight, bias, 4, 1e-6), exact(x, weight, bias, 4, 1e-6)
    usual = expected.abs() < 10
    assert float((y - expected)[usual].abs().max()) <= 2.0**-8 * float(expected[usual].abs().max())


@needs_kernel
def test_one_pixel_that_differs_is_seen() -> None:
    x, weight, bias = torch.zeros(1, 16, 96, 96), images(16), images(16)
    x[:, :, 0, 0] = 1.0
    x = x.bfloat16().contiguous(memory_format=torch.channels_last)
    agree(group_norm_silu_cpu(x, weight, bias, 4, 1e-9), exact(x, weight, bias, 4, 1e-9))


@needs_kernel
def test_the_activation_is_accurate_far_beyond_bfloat16() -> None:
    """Of a million results at most one in 2000 is rounded another way than the exact one.

    A relative error e changes about e / 2**-9 of them: one of 1e-5, which nothing else here would see, twenty times
    as many.
    """
    x, weight, bias = images(1, 16, 256, 256), 3 * torch.ones(16), torch.zeros(16)
    y = group_norm_silu_cpu(x, weight.to(BFLOAT16), bias.to(BFLOAT16), 1, 1e-6)
    expected = exact(x, weight, bias, 1, 1e-6).to(BFLOAT16)
    assert float((y != expected).float().mean()) < 1 / 2000


@needs_kernel
def test_an_images_bits_depend_on_itself_alone() -> None:
    x, weight, bias = images(7, 96, 6, 6), images(96), images(96)
    y = group_norm_silu_cpu(x, weight, bias, 32, 1e-6)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_norm_silu_cpu(x[order], weight, bias, 32, 1e-6), y[order])
    strange = x.clone()
    strange[1:] = torch.nan
    again = group_norm_silu_cpu(strange, weight, bias, 32, 1e-6)
    assert torch.equal(again[0], y[0])
    assert again[1:].isnan().all(), "what is not finite shows"
    assert torch.equal(group_norm_silu_cpu(x.contiguous(), weight, bias, 32, 1e-6), y)


@needs_kernel
def test_large_values_saturate() -> None:
    x = images(1, 16, 2, 2)
    y = group_norm_silu_cpu(x, torch.full((16,), 1e4).bfloat16(), torch.zeros(16).bfloat16(), 1, 1e-6)
    assert y.isfinite().all()
    assert float(y.min()) > -1e-3
    assert float(y.max()) > 1e3


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=BFLOAT16)
    assert group_norm_silu_cpu(x, images(16), images(16), 4, 1e-6).shape == shape


@needs_kernel
def test_the_op_is_what_torch_library_wants() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    x, time = images(2, 48, 4, 6), images(2, 48)
    arguments = (x, images(48), images(48), 8, 1e-6, time, None, None, True)
    torch.library.opcheck(group_norm._group_norm_silu_cpu, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 32, 2, 2)}, TypeError, "x must be bfloat16, got float32"),
        ({"x": torch.ones(1, 32).bfloat16()}, ValueError, r"x must be images \[B, C, H, W\]"),
        ({"x": torch.ones(1, 24, 2, 2).bfloat16()}, ValueError, r"multiple of 16 and of groups \(4\) .*got 24"),
        ({"groups": 5}, ValueError, r"multiple of 16 and of groups \(5\) channels, got 32"),
        ({"groups": 0}, ValueError, r"groups \(0\)"),
        ({"weight": torch.ones(31).bfloat16()}, ValueError, r"weight must have shape \[32\]"),
        ({"bias": torch.ones(32)}, TypeError, "bias must be bfloat16"),
        ({"time": torch.ones(2, 32).bfloat16()}, ValueError, r"time must have shape \[1, 32\]"),
        ({"scale": torch.ones(1, 32).bfloat16()}, ValueError, "scale and shift must be given together"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    right: dict[str, object] = {
        "x": torch.ones(1, 32, 2, 2).bfloat16(),
        "weight": torch.ones(32).bfloat16(),
        "bias": torch.ones(32).bfloat16(),
        "groups": 4,
        "eps": 1e-6,
    }
    with pytest.raises(error, match=message):
        group_norm_silu_cpu(**(right | change))
