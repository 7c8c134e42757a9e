"""Weights as the C++ kernels read them: in panels of output channels that stay in a processor's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion.kernels.cpu.library import LANES

WIDEST = 64  # output channels of a panel


def width(channels: int, multiple_of: int = LANES) -> int:
    """Output channels of a panel: the largest divisor of `channels` up to 64 that is a multiple of `multiple_of`."""
    return max(w for w in range(multiple_of, WIDEST + 1, multiple_of) if channels % w == 0)


def pack(matrices: Tensor, panel: int) -> Tensor:
    """Put weights in panels of output channels, pairs of input channels together, which is how processors multiply.

    Args:
        matrices: [N, K, C], N matrices from C, an even number, to K channels.
        panel: its output channels, a divisor of K.

    Returns:
        bfloat16 [K / panel, N, C / 2, panel, 2].
    """
    number, outputs, inputs = matrices.shape
    split = matrices.to(torch.bfloat16).reshape(number, outputs // panel, panel, inputs // 2, 2)
    return split.permute(1, 0, 3, 2, 4).contiguous()
