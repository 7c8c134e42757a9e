"""Half and double resolution by a filter of a few taps, alone or with the convolution that follows.

The state dict has the filter, ``outer(f, f) / sum(f)**2``, beside each weight that it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks.blocks import double_size
from stepfusion.networks.edm.config import Resample


def filter_of(taps: Sequence[int]) -> Tensor:
    """``outer(f, f) / sum(f)**2``: float32 [1, 1, K, K]."""
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / line.sum().square())[None, None]


class Resampler(nn.Module):
    """Halve or double height and width: [B, C, H, W] -> [B, C, H', W'].

    Down is a convolution with the filter and stride 2, up its transpose times 4, zeros around the image. Equal taps
    are the mean of every 2 x 2 square, and its repetition.
    """

    resample_filter: Tensor

    def __init__(self, taps: Sequence[int], direction: Resample) -> None:
        super().__init__()
        self.direction = direction
        self.plain = len(taps) == 2 and taps[0] == taps[1]
        self.padding = (len(taps) - 1) // 2
        self.register_buffer("resample_filter", filter_of(taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "down":
            return self.smaller(x, self.padding)
        if self.plain:
            return double_size(x)
        weight = 4 * self._weight(x)
        return functional.conv_transpose2d(x, weight, stride=2, padding=self.padding, groups=x.shape[1])

    def smaller(self, x: Tensor, padding: int) -> Tensor:
        """Halve height and width, with so many zeros around the image."""
        if self.plain:
            return functional.avg_pool2d(x, 2)
        return functional.conv2d(x, self._weight(x), stride=2, padding=padding, groups=x.shape[1])

    def _weight(self, x: Tensor) -> Tensor:
        return self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)


class ResampledConv2d(Resampler):
    """A square convolution of what :class:`Resampler` returns, of the same height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, taps: Sequence[int], direction: Resample):
        super().__init__(taps, direction)
        like = nn.Conv2d(in_channels, out_channels, kernel)
        self.weight, self.bias = like.weight, like.bias
        self.around = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(super().forward(x), self.weight, self.bias, padding=self.around)


class ConvThenSmaller(ResampledConv2d):
    """The convolution first, of an image with the zeros of both around it; then half the resolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, taps: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels, kernel, taps, "down")

    def forward(self, x: Tensor) -> Tensor:
        full = functional.conv2d(x, self.weight, padding=self.around + self.padding)
        smaller = self.smaller(full, 0)
        return smaller if self.bias is None else smaller + self.bias[:, None, None]
