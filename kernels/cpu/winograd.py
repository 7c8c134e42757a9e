"""3x3 convolutions by Winograd's algorithm (Lavin & Gray 2016, section 4).

The matrices of the transforms are in :mod:`stepfusion.kernels.cpu.winograd_matrices`.

Transforms and sums are float32; the transformed input and weights are rounded to the dtype of the images, bfloat16 or
float32. The weights are transformed once (:func:`transform_weight`), in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library, weight_packing
from stepfusion.kernels.cpu.weight_packing import Packed
from stepfusion.kernels.cpu.winograd_matrices import SCHEMES, Scheme


def fits(in_channels: int, out_channels: int) -> bool:
    """Whether a convolution between so many channels can be transformed."""
    lanes = library.LANES
    return in_channels > 0 and out_channels > 0 and in_channels % lanes == 0 and out_channels % lanes == 0


def transform_weight(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """``G g G^T`` of every filter, as :func:`winograd_conv2d` reads it for images of this dtype.

    Args:
        weight: [K, C, 3, 3], any floating dtype; C and K multiples of 16.
        dtype: float32 or bfloat16.

    Returns:
        N matrices, one for each product of the scheme, as :func:`weight_packing.pack` packs them: ``N / 9`` times as
        many elements as `weight` has.
    """
    launch.check_dtype("weight", weight, (*launch.FLOATS, torch.float64))
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not fits(weight.shape[1], weight.shape[0]):
        shape = f"[K, C, 3, 3], C and K multiples of {library.LANES}"
        raise ValueError(f"weight must be {shape}, got {list(weight.shape)}")
    g = torch.tensor(scheme.weight, dtype=torch.float64, device=weight.device)
    outputs, inputs = weight.shape[:2]
    u = torch.kron(g, g) @ weight.detach().double().reshape(outputs * inputs, 9).T  # 3x as fast as an einsum
    return weight_packing.pack(u.view(-1, outputs, inputs), weight_packing.width(outputs), dtype)


def _empty(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = SCHEMES[int(weight.shape[1])].scale
    shape = (x.shape[0], len(bias), scale * x.shape[2], scale * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@library.op("winograd_conv2d", fake=_empty)
def _winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = _empty(x, weight, bias)
    if y.numel() > 0:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        sizes = batch, height, width, channels, y.shape[1], weight.shape[1], y.shape[1] // weight.shape[0]
        library.call(x.dtype, "winograd_conv2d", (x, weight.contiguous(), bias.contiguous(), y), sizes)
    return y


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with padding 1; with the scheme `UP`, of the image that repeats every pixel in 2 x 2.

    Args:
        x: float32 or bfloat16 [B, C, H, W] on the CPU, read as channels_last: anything else is copied to it. Any H
            and W.
        weight: of the same dtype, from :func:`transform_weight`, which has chosen the scheme.
        bias: float32 [K].

    Returns:
        [B, K, H, W], or [B, K, 2 H, 2 W], of the dtype of x, in channels_last. An image's bits depend on neither its
        place in the batch nor the number of threads. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    packed = check_transformed("weight", weight)
    launch.check_dtype("x", x, (weight.dtype,))
    launch.check_like("bias", bias, (packed.outputs,), x.device, (torch.float32,))
    if x.ndim != 4 or x.shape[1] != packed.inputs:
        raise ValueError(f"x must be [B, {packed.inputs}, H, W], as weight has, got {list(x.shape)}")
    out: Tensor = _winograd_conv2d(x, weight, bias)
    return out


def check_transformed(name: str, weight: Tensor) -> Packed:
    """What a weight holds; a TypeError or ValueError if it cannot be from :func:`transform_weight`."""
    packed = weight_packing.unpacked(name, weight, "transform_weight")
    if packed.matrices not in SCHEMES or not fits(packed.inputs, packed.width):
        raise ValueError(f"{name} must be what transform_weight returns, got shape {list(weight.shape)}")
    return packed
