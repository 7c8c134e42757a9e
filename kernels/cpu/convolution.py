"""Convolutions that Winograd's algorithm does not serve, on a CPU: strided, or between few channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library, weight_packing


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [K, C, n, n] as :func:`gathered_conv2d` reads it: one matrix (:func:`weight_packing.pack`).

    From n n C channels, rounded up to an even number, to K, rounded up to a multiple of 16: what is added is zero.
    """
    rows = weight.detach().permute(0, 2, 3, 1).flatten(1)
    rows = functional.pad(rows, (0, -rows.shape[1] % 2, 0, -len(rows) % library.LANES))
    return weight_packing.pack(rows[None], weight_packing.width(len(rows)), dtype)


def _empty(x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int, before: int, after: int) -> Tensor:
    sizes = [(size + before + after - kernel) // stride + 1 for size in x.shape[2:]]
    shape = (x.shape[0], len(bias), *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@library.op("gathered_conv2d_cpu", fake=_empty)
def _gathered_conv2d_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int, before: int, after: int
) -> Tensor:
    y = _empty(x, weight, bias, kernel, stride, before, after)
    if y.numel() > 0:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        packed = weight_packing.unpacked("weight", weight, "pack_weight")
        window = kernel, stride, before, y.shape[2], y.shape[3], y.shape[1]
        sizes = batch, height, width, channels, *window, packed.inputs, packed.panels, packed.width
        library.call(x.dtype, "gathered_conv2d", (x, weight.contiguous(), bias.contiguous(), y), sizes)
    return y


def gathered_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, *, kernel: int, stride: int = 1, before: int = 0, after: int = 0
) -> Tensor:
    """A convolution with a square kernel, by its definition.

    Args:
        x: float32 or bfloat16 [B, C, H, W] on the CPU, read as channels_last.
        weight: of the same dtype, from :func:`pack_weight`.
        bias: float32 [K].
        kernel: n, the size of the window. stride: pixels from a window to the next.
        before, after: zeros around the image: on its top and left, on its bottom and right.

    Returns:
        [B, K, (H + before + after - n) // stride + 1, the same of W] in channels_last, of the dtype of x. An image's
        bits depend on neither its place in the batch nor the number of threads. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    packed = weight_packing.unpacked("weight", weight, "pack_weight")
    launch.check_dtype("x", x, (weight.dtype,))
    for name, number, least in (
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("before", before, 0),
        ("after", after, 0),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if x.ndim != 4 or min(x.shape[2:]) + before + after < kernel:
        raise ValueError(
            f"x must be [B, C, H, W], at least {kernel} pixels wide with its padding, got {list(x.shape)}"
        )
    depth = kernel * kernel * x.shape[1]
    if packed.matrices != 1 or packed.inputs != depth + depth % 2:
        raise ValueError(
            f"weight must be what pack_weight returns for {x.shape[1]} channels, got {list(weight.shape)}"
        )
    if bias.ndim != 1 or not packed.outputs - library.LANES < len(bias) <= packed.outputs:
        raise ValueError(f"bias must have the number of weight's output channels, got {list(bias.shape)}")
    launch.check_like("bias", bias, (len(bias),), x.device, (torch.float32,))
    y: Tensor = _gathered_conv2d_cpu(x, weight, bias, kernel, stride, before, after)
    return y
