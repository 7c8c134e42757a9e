"""Models and conditions as diffusion code calls them, and what they may return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Model = Callable[..., torch.Tensor]
Condition = Callable[..., torch.Tensor]
Step = dict[str, torch.Tensor]


class ModelCaller:
    """Calls models and conditions with the timesteps that they know.

    Args:
        timestep_map: int64 [K], the timestep of the whole process that each t of a respaced one stands for; None if t
            is told as it is.
    """

    def __init__(self, timestep_map: torch.Tensor | None = None) -> None:
        self.timestep_map = timestep_map

    def told(self, t: torch.Tensor) -> torch.Tensor:
        """The timesteps that a model is told for t, int64 [B]."""
        return t if self.timestep_map is None else self.timestep_map.to(t.device)[t]

    def __call__(
        self, model: Model, x: torch.Tensor, t: torch.Tensor, model_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """What a model returns for x [B, ...] at t, int64 [B]."""
        return model(x, self.told(t), **model_kwargs)

    def gradient(
        self, cond_fn: Condition, x: torch.Tensor, t: torch.Tensor, model_kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """What a condition returns, float32 like x; ValueError if it has another shape."""
        gradient = self(cond_fn, x, t, model_kwargs)
        if not isinstance(gradient, torch.Tensor) or gradient.shape != x.shape:
            given = list(gradient.shape) if isinstance(gradient, torch.Tensor) else type(gradient).__name__
            raise ValueError(f"cond_fn must return shape {list(x.shape)}, got {given}")
        return gradient.to(torch.float32)
