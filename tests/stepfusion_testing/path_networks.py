"""Networks on EDM's path and on the straight one, as modules that can be exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import stepfusion as sf

SHAPE = (2, 5, 3)
SIGMA, FLOW = sf.SigmaPath(), sf.FlowPath()


class PathNetwork(nn.Module):
    """A small convolution of x whose weight depends on what the network is told, with parameters and dropout.

    What it is told must be a float: a rounded one gives another output.
    """

    def __init__(self, channels: int = SHAPE[0], num_classes: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.num_classes = num_classes
        self.weight = nn.Parameter(0.3 * torch.randn((channels, channels, 3, 3), generator=generator))
        self.offsets = nn.Parameter(0.2 * torch.randn((num_classes or 1, channels, 1, 1), generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, told: Tensor, labels: Tensor | None = None) -> Tensor:
        level = torch.tanh(told.to(x.dtype)).view(-1, 1, 1, 1)
        mixed = nn.functional.conv2d(x, self.weight, padding=1)
        offsets = self.offsets[0] if labels is None else self.offsets[labels]
        return torch.tanh(x + self.dropout((0.5 + level) * mixed) + level * offsets)


def path_engine(path: Any, num_classes: int | None = None, **given: Any) -> sf.Engine:
    """An engine with such a network, on a CPU, in float32."""
    null = {} if num_classes is None else {"null_label": num_classes - 1}
    settings = {"shape": SHAPE, "device": "cpu", "dtype": "float32", "batch": 4, **null, **given}
    return sf.Engine(PathNetwork(num_classes=num_classes), path, **settings)
