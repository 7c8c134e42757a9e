"""What a step of training draws: a function of a seed and of the step's number alone."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 2.0**-53  # of a probability whose normal quantile is finite; 1 less this is the next float64 below 1


def step_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator on the CPU for one purpose and index.

    PyTorch's CPU generator looks at 32 bits, so indices never collide.
    """
    mixed = seed * 0x9E3779B97F4A7C15 + int.from_bytes(purpose.encode(), "little") * 0xC2B2AE3D27D4EB4F
    mixed = ((mixed & (2**64 - 1)) >> 32) * 0x85EBCA6B + (mixed & 0xFFFFFFFF)
    return torch.Generator().manual_seed((mixed + index) & 0xFFFFFFFF)


def strata(count: int, random: torch.Generator) -> Tensor:
    """A number of each of ``count`` equal parts of [0, 1), float64 [count], ascending.

    Levels that are drawn so lower the variance of the loss (Kingma et al. 2021, section 4.3).
    """
    return (torch.arange(count) + torch.rand(count, generator=random, dtype=torch.float64)) / count


def log_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """The quantiles ``u``, float64 [B] in [0, 1), of a number whose logarithm is N(mean, std^2): float64 [B]."""
    return (mean + std * _normal(u)).exp()


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """The quantiles ``u``, float64 [B] in [0, 1), of a number t for which log(t / (1 - t)) is N(mean, std^2)."""
    return (mean + std * _normal(u)).sigmoid()


def _normal(u: Tensor) -> Tensor:
    """The quantiles of N(0, 1), finite at 0 too."""
    normal: Tensor = torch.special.ndtri(u.clamp(_LEAST, 1 - _LEAST))
    return normal
