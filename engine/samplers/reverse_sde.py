"""A stochastic sampler of flows: their reverse-time SDE."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from stepfusion import _checks
from stepfusion.samplers.grid import GridOptions, make_grid
from stepfusion.samplers.path import FlowPath, Path
from stepfusion.samplers.table import StepTable


def flow_sde(path: Path, steps: int | None = None, *, eta: float = 1.0, **grid: Unpack[GridOptions]) -> StepTable:
    """Euler-Maruyama for the SDE that has a flow's marginals (Ma et al. 2024, SiT, equation 6).

    From t down to t' = t - dt, with the velocity v = (x - x0) / t, the score -(x - (1 - t) x0) / t^2 and the
    diffusion w = eta t (SiT's "sigma"):

        x' = x - v dt + w score dt + sqrt(2 w dt) z

    The last row is a step of the flow itself, without noise.

    Args:
        path: a :class:`stepfusion.FlowPath`.
        eta: how much noise: 0 is :func:`stepfusion.euler`.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(path, FlowPath):
        raise TypeError(f"path must be a FlowPath for flow_sde, got {type(path).__name__}: use euler_ancestral")
    eta = _checks.number("eta", eta, 0.0)
    found = make_grid(path, steps, grid)
    t, dt = found.levels, -np.diff(found.noise)
    diffusion = eta * t
    diffusion[-1] = 0.0
    columns = {
        "next_x": 1 - dt / t - diffusion * dt / t**2,
        "next_x0": dt / t + diffusion * dt * (1 - t) / t**2,
        "sigma": np.sqrt(2 * diffusion * dt),
    }
    return found.table(f"flow sde, eta {eta:g}", columns)
