"""The levels of a UNet, one after the other: all of them, or the outermost with what the others made before.

Features of the inner levels change slowly from step to step (Ma et al. 2024, "DeepCache"). So a row of a table may
take those of an earlier row: it runs the first level on the way down and the last on the way up, and what enters the
latter from below is *kept*, [B, C, H, W] in the network's dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from stepfusion.networks.fused import Activation, Value


class LevelledNetwork(ABC):
    """A UNet whose inner levels can be left out."""

    @abstractmethod
    def kept_shape(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Of what is kept of an image of a shape (C, H, W); None for a network of one level, which has nothing."""

    @abstractmethod
    def predict_keeping(self, x: Tensor, kept: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """`predict`, which also writes what is kept to ``kept``."""

    @abstractmethod
    def predict_outer(self, x: Tensor, kept: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """Run the outermost level alone, with what is ``kept``: as `predict`, nearly."""


def kept_shape(channels: Sequence[int], shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Of what a UNet with so many channels at each level keeps of an image of a shape (C, H, W)."""
    return None if len(channels) < 2 else (channels[1], shape[-2], shape[-1])


def run_levels(
    network: nn.Module, x: Activation, arguments: Sequence[Tensor], kept: Tensor | None = None, *, outer: bool = False
) -> Activation:
    """Run ``down_blocks``, ``mid_block`` and ``up_blocks`` of a network, each with these arguments.

    ``kept`` is written; with ``outer`` it is read in place of what the inner levels would make.
    """
    downs, ups = cast(nn.ModuleList, network.down_blocks), cast(nn.ModuleList, network.up_blocks)
    skips: list[Activation] = [x]
    if outer:
        assert kept is not None
        skips += downs[0](x, *arguments, resamples=False)
        below = Value(kept) if isinstance(x, Value) else kept
        return cast(Activation, ups[-1](below, skips, *arguments))
    for down in downs:
        skips += down(skips[-1], *arguments)
    x = skips[-1]
    if network.mid_block is not None:
        x = cast(nn.Module, network.mid_block)(x, *arguments)
    for up in ups[:-1]:
        x = up(x, skips, *arguments)
    if kept is not None:
        kept.copy_(x.settle() if isinstance(x, Value) else x)
    return cast(Activation, ups[-1](x, skips, *arguments))
