"""Noise that EDM's stochastic sampler adds before a step (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.samplers.grid import Floats, Grid
from stepfusion.samplers.path import SigmaPath

_LARGEST_GAMMA = math.sqrt(2) - 1


@dataclass(frozen=True)
class Churn:
    """Where the steps of a grid start once their noise is added.

    Attributes:
        levels: t_hat, [N]; the grid's own levels without churn.
        noise: [N + 1], the noise of those levels and of the end.
        sigma: float64 [N], of the noise that goes from t to t_hat: the row before a step adds it.
        start_scale: of the first state, the churn of the first step included; None without churn.
        text: what it adds to a table's name.
    """

    levels: NDArray[Any]
    noise: Floats
    sigma: Floats
    start_scale: float | None = None
    text: str = ""


def churned_levels(grid: Grid, s_churn: float, s_min: float, s_max: float | None, s_noise: float) -> Churn:
    """t_hat = t + gamma t, gamma = min(s_churn / N, sqrt(2) - 1) for s_min <= t <= s_max and 0 elsewhere.

    The noise from t to t_hat is sqrt(t_hat^2 - t^2) s_noise z.

    Raises:
        TypeError, ValueError: naming the argument; or there is churn on another path than a sigma path, where noise
            alone leads to no other level.
    """
    s_churn = _checks.number("s_churn", s_churn, 0.0)
    s_min = _checks.number("s_min", s_min, 0.0)
    s_max = math.inf if s_max is None or s_max == math.inf else _checks.number("s_max", s_max, s_min)
    s_noise = _checks.number("s_noise", s_noise, 0.0)
    if s_churn == 0:
        return Churn(grid.levels, grid.noise, np.zeros(len(grid)))
    if not isinstance(grid.path, SigmaPath):
        raise ValueError(f"s_churn must be 0 on {grid.path!r}: only on a SigmaPath does noise lead to another level")
    t = grid.levels
    gamma = min(s_churn / len(t), _LARGEST_GAMMA) * ((t >= s_min) & (t <= s_max))
    t_hat = t * (1 + gamma)
    sigma = np.sqrt(t_hat**2 - t**2) * s_noise
    start = math.sqrt(t[0] ** 2 + sigma[0] ** 2)
    return Churn(t_hat, np.append(t_hat, grid.noise[-1]), sigma, start, f", churn {s_churn:g}")
