"""Weights as the C++ kernels read them: in panels of output channels that stay in a processor's cache.

========  ==============================  ==============================================================
bfloat16  ``[K / k, N, C / 2, k, 2]``     pairs of input channels together, as processors multiply them
float32   ``[K / k, N, k / 16, C, 16]``   strips of 16 output channels, as many as registers hold sums of
========  ==============================  ==============================================================

N matrices from C to K channels in panels of k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu.library import DTYPES, LANES

WIDEST = 64  # output channels of a panel


class Packed(NamedTuple):
    """What a packed tensor holds: `matrices` from `inputs` channels to `panels` times `width`."""

    matrices: int
    inputs: int
    panels: int
    width: int

    @property
    def outputs(self) -> int:
        """K, of whole panels."""
        return self.panels * self.width


def width(channels: int, multiple_of: int = LANES) -> int:
    """Output channels of a panel: the largest divisor of `channels` up to 64 that is a multiple of `multiple_of`."""
    return max(w for w in range(multiple_of, WIDEST + 1, multiple_of) if channels % w == 0)


def pack(matrices: Tensor, panel: int, dtype: torch.dtype) -> Tensor:
    """Put weights in panels of output channels.

    Args:
        matrices: [N, K, C], N matrices from C to K channels; C an even number for bfloat16.
        panel: its output channels, a divisor of K and a multiple of 16.
        dtype: float32 or bfloat16, of the result.

    Returns:
        What the table above shows.
    """
    number, outputs, inputs = matrices.shape
    if dtype == torch.bfloat16:
        split = matrices.to(dtype).reshape(number, outputs // panel, panel, inputs // 2, 2)
        return split.permute(1, 0, 3, 2, 4).contiguous()
    split = matrices.to(dtype).reshape(number, outputs // panel, panel // LANES, LANES, inputs)
    return split.permute(1, 0, 2, 4, 3).contiguous()


def unpacked(name: str, weight: Tensor, made_by: str) -> Packed:
    """What a packed tensor holds, by its shape and dtype.

    Raises:
        TypeError, ValueError: naming the tensor, if :func:`pack` makes none such; `made_by` is what should have.
    """
    launch.check_dtype(name, weight, tuple(DTYPES))
    last = 2 if weight.dtype == torch.bfloat16 else LANES
    if weight.ndim != 5 or weight.shape[4] != last or 0 in weight.shape:
        raise ValueError(f"{name} must be what {made_by} returns, got shape {list(weight.shape)}")
    panels, matrices, third, fourth, _ = weight.shape
    if weight.dtype == torch.bfloat16:
        return Packed(matrices, 2 * third, panels, fourth)
    return Packed(matrices, fourth, panels, LANES * third)


def packed_shape(packed: Packed, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the tensor that holds so much in this dtype."""
    matrices, inputs, panels, width_of_panel = packed
    if dtype == torch.bfloat16:
        return panels, matrices, inputs // 2, width_of_panel, 2
    return panels, matrices, width_of_panel // LANES, inputs, LANES
