"""Images to pixels in C++ for CPUs: :mod:`stepfusion.kernels.to_uint8` with the bits of its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library
from stepfusion.kernels.cpu import sampling_library as sampling
from stepfusion.kernels.to_uint8 import check_arguments, to_uint8_reference


def _empty(x: Tensor) -> Tensor:
    lanes, channels, height, width = x.shape
    return torch.empty((lanes, height, width, channels), dtype=torch.uint8, device=x.device)


@library.op("to_uint8_cpu", fake=_empty)
def _to_uint8_cpu(x: Tensor) -> Tensor:
    pixels = _empty(x)
    if x.numel() > 0:
        (source,), apart, _, _ = sampling.layout(x)
        channels = 1 if apart > 1 else x.shape[1]  # channels_last lies as the pixels do
        sizes = (len(x), channels, x[0].numel() // channels, sampling.TYPES[x.dtype])
        sampling.call("to_uint8", (source, pixels), sizes)
    return pixels


def to_uint8(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] to pixels, uint8 [B, H, W, C]: :func:`stepfusion.kernels.to_uint8` on a CPU.

    x may be channels_last. Float64 and programs that are exported get the reference; the result has no gradient.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: there is no C++ library here, or x is not on a CPU.
    """
    check_arguments(x, (*launch.FLOATS, torch.float64))
    if sampling.left_to_the_reference(x):
        return to_uint8_reference(x)
    pixels: Tensor = _to_uint8_cpu(x)
    return pixels
