"""DDIM and DDPM in plain PyTorch, as one writes them without diffusers: the loop of baselines if it is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.scheduler_config import read_config

#: What stands before the names of those who run in it.
OWN = "own loop"


@dataclass(frozen=True)
class Stepped:
    """The state after a step, under diffusers' name."""

    prev_sample: Tensor


class OwnScheduler:
    """The part of diffusers' schedulers that a sampling loop uses, for networks that predict the noise.

    Timesteps are spaced as diffusers' "leading", x0 is clipped as the config says, and DDPM has the config's fixed
    variance (Ho et al. 2020, algorithm 2 through x0; Song et al. 2021, equation 12).

    Args:
        sampler: "ddim" or "ddpm". config: of the model's scheduler.

    Raises:
        ValueError: the config is of another prediction type.
    """

    def __init__(self, sampler: str, config: Mapping[str, Any]) -> None:
        prediction = read_config(config)[1]
        if prediction != "epsilon":
            raise ValueError(f"the own loop needs a network that predicts epsilon, and it predicts {prediction}")
        self._ancestral = sampler == "ddpm"
        self._alpha_bar = NoiseSchedule.from_config(config).alphas_cumprod
        self._clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else None
        self._large = config.get("variance_type", "fixed_small") == "fixed_large"
        self._stride = 1
        self._noise: Iterator[Tensor] | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64)

    def set_timesteps(self, steps: int) -> None:
        """Visit so many timesteps."""
        self._stride = len(self._alpha_bar) // steps
        self.timesteps = torch.from_numpy((np.arange(steps) * self._stride)[::-1].copy())

    def step(self, out: Tensor, t: int, x: Tensor, z: Tensor | None = None, *, eta: float = 0.0) -> Stepped:
        """The state before timestep ``t``; ``z`` is the noise of a step that adds some, drawn by default.

        A network that predicts its variance, too, has twice the channels; the config's is used.
        """
        out = out[:, : x.shape[1]]
        now = float(self._alpha_bar[t])
        before = float(self._alpha_bar[t - self._stride]) if t >= self._stride else 1.0
        x0 = (x - (1 - now) ** 0.5 * out) / now**0.5
        if self._clip is not None:
            x0 = x0.clamp(-self._clip, self._clip)
        if not self._ancestral:
            std = eta * ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5
            x = before**0.5 * x0 + (1 - before - std**2) ** 0.5 * out
            return Stepped(x + std * self._drawn(x, z) if std > 0 else x)
        beta = 1 - now / before
        mean = (before**0.5 * beta / (1 - now)) * x0 + ((now / before) ** 0.5 * (1 - before) / (1 - now)) * x
        if t == 0:
            return Stepped(mean)
        variance = beta if self._large else max(beta * (1 - before) / (1 - now), 1e-20)
        return Stepped(mean + variance**0.5 * self._drawn(x, z))

    def _drawn(self, x: Tensor, z: Tensor | None) -> Tensor:
        if z is not None:
            return z
        return torch.randn_like(x) if self._noise is None else next(self._noise).to(x.dtype)

    @contextmanager
    def given(self, noise: Tensor | None) -> Iterator[None]:
        """DDPM's steps add this noise, one entry a step, instead of what they would draw; None changes nothing."""
        self._noise = None if noise is None else iter(noise)
        try:
            yield
        finally:
            self._noise = None
