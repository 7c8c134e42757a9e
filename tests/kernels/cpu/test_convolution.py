"""Convolutions by their definition: against PyTorch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stepfusion.kernels.cpu import convolution
from stepfusion.kernels.cpu.convolution import gathered_conv2d, pack_weight
from stepfusion_testing.cpu_kernels import thread_counts

#: Relative to a result, and absolute: of the last rounding, and of sums of up to 1152 products of about 1 / 34.
ALLOWED = {torch.bfloat16: (2.0**-8, 2.0**-16), torch.float32: (2.0**-22, 2.0**-18)}


def problem(
    dtype: torch.dtype, batch: int, inputs: int, outputs: int, height: int, width: int, kernel: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs + height + kernel)
    x = torch.randn(batch, inputs, height, width, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (inputs * kernel**2) ** 0.5
    return x, weight.to(dtype), torch.randn(outputs, generator=generator)


@pytest.mark.parametrize(("stride", "before", "after"), [(1, 0, 0), (1, 1, 1), (2, 0, 1), (2, 1, 1), (3, 2, 0)])
@pytest.mark.parametrize(
    "sizes",
    [
        (8, 3, 128, 9, 9, 3),  # 27 products of a row, one more for the pair
        (2, 128, 3, 8, 8, 3),  # three of sixteen channels are wanted
        (3, 32, 48, 6, 11, 3),
        (1, 64, 80, 5, 5, 1),
        (2, 1, 1, 7, 7, 5),
        (1, 16, 100, 10, 3, 3),
        (1, 2, 17, 4, 4, 2),
    ],
    ids=str,
)
def test_it_is_the_convolution(
    dtype: torch.dtype, sizes: tuple[int, ...], stride: int, before: int, after: int
) -> None:
    x, weight, bias = problem(dtype, *sizes)
    padded = functional.pad(x.double(), (before, after, before, after))
    exact = functional.conv2d(padded, weight.double(), bias.double(), stride=stride)
    y = gathered_conv2d(
        x, pack_weight(weight, dtype), bias, kernel=sizes[5], stride=stride, before=before, after=after
    )
    assert y.shape == exact.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), exact, rtol=ALLOWED[dtype][0], atol=ALLOWED[dtype][1])


def test_an_images_bits_depend_on_itself_alone(dtype: torch.dtype) -> None:
    x, weight, bias = problem(dtype, 7, 16, 32, 6, 6, 3)
    packed = pack_weight(weight, dtype)
    y = gathered_conv2d(x, packed, bias, kernel=3, before=1, after=1)
    strange = x.clone()
    strange[1:] = torch.nan
    assert torch.equal(gathered_conv2d(strange, packed, bias, kernel=3, before=1, after=1)[0], y[0])
    assert torch.equal(gathered_conv2d(x[3:], packed, bias, kernel=3, before=1, after=1), y[3:])
    for _ in thread_counts():
        assert torch.equal(gathered_conv2d(x, packed, bias, kernel=3, before=1, after=1), y)


def test_nothing_else_is_written(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three channels of an output of which sixteen are computed."""
    x, weight, bias = problem(dtype, 2, 16, 3, 5, 5, 3)
    expected = gathered_conv2d(x, pack_weight(weight, dtype), bias, kernel=3)
    whole = torch.full((4, 3, 3, 3), torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(convolution, "_empty", lambda *_: whole[1:3])
    y = convolution._gathered_conv2d_cpu(x, pack_weight(weight, dtype), bias, 3, 1, 0, 0)
    assert torch.equal(y, expected)
    assert whole[0].isnan().all()
    assert whole[3].isnan().all()


@pytest.mark.usefixtures("one_thread")
def test_what_another_image_left_in_memory_does_no_harm(dtype: torch.dtype) -> None:
    """27 products of a row are 28 with the one that makes pairs whole: it must not meet what is not finite."""
    strange, wide, _ = problem(dtype, 1, 16, 5, 6, 6, 3)
    gathered_conv2d(torch.full_like(strange, torch.nan), pack_weight(wide, dtype), torch.zeros(5), kernel=3)
    x, weight, bias = problem(dtype, 1, 3, 5, 6, 6, 3)
    assert gathered_conv2d(x, pack_weight(weight, dtype), bias, kernel=3).isfinite().all()


def test_nothing_to_do(dtype: torch.dtype) -> None:
    x, weight, bias = problem(dtype, 1, 16, 16, 4, 4, 3)
    assert gathered_conv2d(x[:0], pack_weight(weight, dtype), bias, kernel=3).shape == (0, 16, 2, 2)


def test_the_op_is_what_torch_library_wants(dtype: torch.dtype) -> None:
    x, weight, bias = problem(dtype, 2, 3, 5, 6, 6, 3)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    arguments = (x, pack_weight(weight, dtype), bias, 3, 2, 0, 1)
    torch.library.opcheck(convolution._gathered_conv2d_cpu, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 3, 4, 4)}, TypeError, "x must be bfloat16, got float32"),
        ({"x": torch.ones(1, 3, 2, 4).bfloat16()}, ValueError, r"x must be \[B, C, H, W\], at least 3 pixels wide"),
        ({"x": torch.ones(1, 4, 4, 4).bfloat16()}, ValueError, "what pack_weight returns for 4 channels"),
        ({"weight": torch.ones(5, 3, 3, 3).bfloat16()}, ValueError, "weight must be what pack_weight returns"),
        ({"bias": torch.ones(17)}, ValueError, "bias must have the number of weight's output channels"),
        ({"bias": torch.ones(5).bfloat16()}, TypeError, "bias must be float32"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"before": -1}, ValueError, "before must be at least 0, got -1"),
        ({"kernel": 0}, ValueError, "kernel must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight, bias = problem(torch.bfloat16, 1, 3, 5, 4, 4, 3)
    right: dict[str, Any] = {"x": x, "weight": pack_weight(weight, torch.bfloat16), "bias": bias, "kernel": 3}
    with pytest.raises(error, match=message):
        gathered_conv2d(**(right | change))
