"""The timesteps of a respaced process by their numbers in the whole one (Nichol & Dhariwal 2021, section 4)."""

from __future__ import annotations

import torch

from stepfusion.diffusion.memo import Memo


class TimestepMap:
    """Tells the training timestep that each t stands for: what models are told, and what keys the noise.

    Args:
        visits: int64 [K], the training timesteps of t = 0, ..., K - 1; None if t is the training timestep itself.
    """

    def __init__(self, visits: torch.Tensor | None = None) -> None:
        self.visits = visits
        self._memo = Memo()

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """The training timesteps of t, int64 like t; of the nearest one if t lies outside [0, K)."""
        if self.visits is None:
            return t
        visits = self.visits
        on_device = self._memo.get(t.device, lambda: visits.to(t.device))
        return on_device[t.clamp(0, len(visits) - 1)]

    def of(self, visits: torch.Tensor) -> TimestepMap:
        """The map of a process that visits these t alone, int64 [K], ascending."""
        return TimestepMap(self(visits))
