"""The C++ group norm against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepfusion.kernels import reference
from stepfusion.kernels.cpu import group_norm
from stepfusion.kernels.cpu.group_norm import group_norm_silu_cpu
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance


def images(dtype: torch.dtype, *shape: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) + shift
    return x.to(dtype).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x.to(dtype)


def exact(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, **options: Tensor | bool | None
) -> Tensor:
    wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in options.items()}
    return reference.group_norm_silu(x.double(), weight.double(), bias.double(), groups, eps, **wide)


def agree(y: Tensor, expected: Tensor, dtype: torch.dtype, magnitude: float | None = None) -> None:
    """Within float32 roundings and one to the dtype, at the largest magnitude of a result or a term."""
    magnitude = float(expected.abs().max()) if magnitude is None else magnitude
    allowed = tolerance(dtype, magnitude, ROUNDINGS["group_norm_silu"])
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert float((y - expected).abs().max()) <= allowed


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
def test_it_is_the_reference(
    dtype: torch.dtype, batch: int, channels: int, height: int, width: int, groups: int, silu: bool
) -> None:
    x, weight, bias = images(dtype, batch, channels, height, width), images(dtype, channels), images(dtype, channels)
    options: dict[str, Tensor | bool | None] = {
        "time": images(dtype, batch, 3 * channels)[:, channels : 2 * channels],  # rows that lie apart
        "silu": silu,
    }
    y = group_norm_silu_cpu(x, weight, bias, groups, 1e-5, **options)
    agree(y, exact(x, weight, bias, groups, 1e-5, **options), dtype)
    options |= {
        "time": None,
        "scale": images(dtype, batch, channels),
        "shift": images(dtype, batch, channels, shift=1.0),
    }
    y = group_norm_silu_cpu(x, weight, bias, groups, 1e-5, **options)
    agree(y, exact(x, weight, bias, groups, 1e-5, **options), dtype)


def test_a_mean_far_from_zero_costs_no_digits(dtype: torch.dtype) -> None:
    """256, and 258 in one pixel of a hundred: the variance, 0.04, is lost where squares of 65536 are summed."""
    x, weight, bias = torch.full((2, 32, 4096), 256.0), images(dtype, 32), images(dtype, 32)
    x[:, :, 50::100] = 258.0
    x = x.view(2, 32, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    agree(group_norm_silu_cpu(x, weight, bias, 8, 1e-6), exact(x, weight, bias, 8, 1e-6), dtype)


@pytest.mark.parametrize("pixel", [0, 70, 65535])
def test_a_pixel_far_from_the_others_costs_no_digits(dtype: torch.dtype, pixel: int) -> None:
    """1000 where the others have variance 1, at the corner too: squares of distances from it would bury them."""
    x, weight, bias = images(dtype, 1, 16, 256, 256), images(dtype, 16), images(dtype, 16)
    x.permute(0, 2, 3, 1).view(1, -1, 16)[:, pixel] = 1000.0
    y, expected = group_norm_silu_cpu(x, weight, bias, 4, 1e-6), exact(x, weight, bias, 4, 1e-6)
    usual = expected.abs() < 10
    allowed = tolerance(dtype, float(expected[usual].abs().max()), ROUNDINGS["group_norm_silu"])
    assert float((y - expected)[usual].abs().max()) <= allowed


def test_one_pixel_that_differs_is_seen(dtype: torch.dtype) -> None:
    x, weight, bias = torch.zeros(1, 16, 96, 96), images(dtype, 16), images(dtype, 16)
    x[:, :, 0, 0] = 1.0
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    agree(group_norm_silu_cpu(x, weight, bias, 4, 1e-9), exact(x, weight, bias, 4, 1e-9), dtype)


def test_the_activation_is_accurate_far_beyond_bfloat16(dtype: torch.dtype) -> None:
    """Of numbers from -80 to 80, which come unharmed through the norm: as `activate` says, and then rounded."""
    numbers = torch.linspace(-80, 80, 16 * 512).to(dtype)
    x, nothing = images(dtype, 1, len(numbers), 1, 1), torch.zeros_like(numbers)
    y = group_norm_silu_cpu(x, nothing, numbers, 1, 1e-6).flatten()
    exact = torch.nn.functional.silu(numbers.double())
    if dtype == torch.float32:
        assert bool(((y - exact).abs() <= (4e-7 + 8e-8 * numbers.abs()) * exact.abs()).all())
    else:  # an error e changes about e / 2**-9 of the roundings
        assert float((y != exact.to(dtype)).float().mean()) < 1 / 2000


def test_an_images_bits_depend_on_itself_alone(dtype: torch.dtype) -> None:
    x, weight, bias = images(dtype, 7, 96, 6, 6), images(dtype, 96), images(dtype, 96)
    y = group_norm_silu_cpu(x, weight, bias, 32, 1e-6)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_norm_silu_cpu(x[order], weight, bias, 32, 1e-6), y[order])
    strange = x.clone()
    strange[1:] = torch.nan
    again = group_norm_silu_cpu(strange, weight, bias, 32, 1e-6)
    assert torch.equal(again[0], y[0])
    assert again[1:].isnan().all(), "what is not finite shows"
    assert torch.equal(group_norm_silu_cpu(x.contiguous(), weight, bias, 32, 1e-6), y)


def test_large_values_saturate(dtype: torch.dtype) -> None:
    x = images(dtype, 1, 16, 2, 2)
    y = group_norm_silu_cpu(x, torch.full((16,), 1e4).to(dtype), torch.zeros(16).to(dtype), 1, 1e-6)
    assert y.isfinite().all()
    assert float(y.min()) > -1e-3
    assert float(y.max()) > 1e3


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)], ids=str)
def test_nothing_to_do(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=dtype)
    assert group_norm_silu_cpu(x, images(dtype, 16), images(dtype, 16), 4, 1e-6).shape == shape


def test_the_op_is_what_torch_library_wants(dtype: torch.dtype) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    x, time = images(dtype, 2, 48, 4, 6), images(dtype, 2, 48)
    arguments = (x, images(dtype, 48), images(dtype, 48), 8, 1e-6, time, None, None, True)
    torch.library.opcheck(group_norm._group_norm_silu_cpu, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 32, 2, 2).half()}, TypeError, "x must be float32 or bfloat16, got float16"),
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
