"""Models for GaussianDiffusion's tests: with parameters, dropout and hooks, as real ones have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, np.dtype[np.float64]]


class ConvolutionalModel(nn.Module):
    """A convolution with dropout, moved by the timestep; twice the channels if the variance is ``learned``."""

    def __init__(self, channels: int = 3, *, learned: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(channels)
            self.convolution = nn.Conv2d(channels, channels * (1 + learned), 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
        """[B, C, H, W], or [B, 2 C, H, W]."""
        time = self.slope * (t.view(-1, 1, 1, 1).to(x.dtype) / 1000)
        out: torch.Tensor = torch.tanh(self.dropout(self.convolution(x)) + time)
        return out


class ElementwiseModel(nn.Module):
    """tanh(weight x + t / total), beside a v if the variance is ``learned``."""

    def __init__(self, total: int, *, learned: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.9))
        self.total, self.learned = total, learned

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """[B, C, ...], or [B, 2 C, ...]."""
        time = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype) / self.total
        out = torch.tanh(self.weight * x + time)
        return torch.cat((out, torch.tanh(x - time) - 0.5), dim=1) if self.learned else out

    def in_numpy(self, x: Array, t: int, *, weight: float = 0.9) -> Array:
        """The same in float64."""
        out = np.tanh(weight * x + t / self.total)
        return np.concatenate((out, np.tanh(x - t / self.total) - 0.5), axis=1) if self.learned else out
