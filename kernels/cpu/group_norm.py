"""Group normalisation and SiLU for images in channels_last on a CPU: the C++ form of `group_norm_silu`.

y = act(norm(x + time) * (1 + scale) + shift), as :mod:`stepfusion.kernels.group_norm` has it. A piece of work is an
image and a run of its groups; moments are float32 for each channel about the mean of its first pixels, combined to
those of a group in float64 (Chan et al. 1979, equation 2.1), and everything after them is one factor and one term for
each channel, so that two passes over the pixels remain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library
from stepfusion.kernels.cpu.library import LANES


def fits(channels: int) -> bool:
    """Whether so many channels can be normalised."""
    return channels > 0 and channels % LANES == 0


@library.op("group_norm_silu_cpu", fake=library.like)
def _group_norm_silu_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    time: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    y = library.like(x)
    if y.numel() > 0:
        batch, channels, height, width = y.shape
        x = x.contiguous(memory_format=torch.channels_last)
        rows, strides = rows_of(time, scale, shift)
        sizes = batch, height * width, channels, groups, *strides, int(silu)
        library.call(x.dtype, "group_norm_silu", (x, weight.contiguous(), bias.contiguous(), *rows, y), sizes, (eps,))
    return y


def group_norm_silu_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    time: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Normalise groups of channels of every image, and activate: :func:`stepfusion.kernels.group_norm_silu`, no skip.

    Args:
        x: float32 or bfloat16 [B, C, H, W], read as channels_last; C a multiple of 16. All tensors have its dtype.
        weight, bias: [C]. groups: a divisor of C. eps: added to the variance.
        time, scale, shift: [B, C] or None, scale and shift together; rows may lie apart.
        silu: whether to activate.

    Returns:
        [B, C, H, W] in channels_last, of the dtype of x. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    launch.check_dtype("x", x, tuple(library.DTYPES))
    if x.ndim != 4:
        raise ValueError(f"x must be images [B, C, H, W], got shape {list(x.shape)}")
    batch, channels = x.shape[:2]
    if not fits(channels) or groups < 1 or channels % groups:
        raise ValueError(f"x must have a multiple of {LANES} and of groups ({groups}) channels, got {channels}")
    for name, vector in (("weight", weight), ("bias", bias)):
        launch.check_like(name, vector, (channels,), x.device, (x.dtype,))
    for name, row in (("time", time), ("scale", scale), ("shift", shift)):
        if row is not None:
            launch.check_like(name, row, (batch, channels), x.device, (x.dtype,))
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got one of them")
    y: Tensor = _group_norm_silu_cpu(x, weight, bias, groups, eps, time, scale, shift, silu)
    return y


def rows_of(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Rows [B, C] or None as the kernels read them: elements of a row together, and how far rows lie apart."""
    rows = [None if t is None else t if t.stride(1) == 1 else t.contiguous() for t in tensors]
    return rows, [0 if row is None else row.stride(0) for row in rows]
