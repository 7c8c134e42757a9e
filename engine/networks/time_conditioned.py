"""Networks whose forward pass comes in parts, so that what depends on the timestep alone is computed once.

::

    time        = embed_time(timesteps)               [B] -> [B, K]       what depends on the timestep alone
    projections = condition(time, class_labels)       [B, K] -> [B, P]    with the labels, if the network takes any
    out         = predict(x, projections)             [B, C, H, W]        what depends on x

A sampler computes the first (and, without labels, the second) for all rows of its table before it starts, and gathers
rows of the result in every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class TimeConditioned(nn.Module, ABC):
    """A network in three parts; ``forward`` is their composition.

    Attributes:
        fused: a residual UNet whose blocks run as :mod:`stepfusion.networks.fused` says, unless a hook watches them.
    """

    fused = False

    @property
    def defers(self) -> bool:
        """Whether layers hand on what is still to be added: `fused`, and neither a hook nor autograd would see it."""
        if not self.fused or torch.is_grad_enabled():
            return False
        return not any(part._forward_hooks or part._forward_pre_hooks for part in self.modules())

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map x [B, C, H, W], timesteps [B] and labels, if the network takes any, to [B, C', H, W]."""
        return self.predict(x, self.condition(self.embed_time(timesteps), class_labels))

    @abstractmethod
    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps, int64, float32 or float64 [B]: [B, K]."""

    @abstractmethod
    def condition(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Join what `embed_time` returned with the labels: [B, P]."""

    @abstractmethod
    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run what depends on `x`, with the projections [B, P] of `condition`: [B, C', H, W]."""
