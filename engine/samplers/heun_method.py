"""Heun's method: two evaluations, and two rows, a step."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from stepfusion.samplers.churn import Churn, churned_levels
from stepfusion.samplers.euler_method import first_order
from stepfusion.samplers.grid import Grid, GridOptions, make_grid
from stepfusion.samplers.path import Path
from stepfusion.samplers.table import StepTable


def heun(
    path: Path,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float | None = None,
    s_noise: float = 1.0,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """Heun's method, second order (Karras et al. 2022, algorithms 1 and 2): 2 N - 1 evaluations for N steps.

    With y = x / c and u = s / c, where c is the signal (on :class:`stepfusion.FlowPath` 1), so that dy/du =
    (y - x0) / u, a step from u to u' is two rows:

        y~ = y + (u' - u) (y - D) / u                           at u, where the network's x0 is D, which is kept
        y' = y~ + (u' - u) / 2 (D - D') / u'                    at u', where its x0 is D'

    The second is y + (u' - u) / 2 ((y - D) / u + (y~ - D') / u'), for (y - D) / u = (y~ - D) / u'. A step that ends
    without noise is the first row alone, and so is one that starts without signal where c is the signal.

    Args:
        s_churn, s_min, s_max, s_noise: on :class:`stepfusion.SigmaPath`, the noise of algorithm 2: from a level t
            with s_min <= t <= s_max a step starts at t (1 + gamma), gamma = min(s_churn / N, sqrt(2) - 1). The row
            before it adds that noise, and the first state starts with it.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    found = make_grid(path, steps, grid, bounded="any")  # y is x divided by the signal
    churn = churned_levels(found, s_churn, s_min, s_max, s_noise)
    corrected = (found.scale[:-1] > 0) & (found.noise[1:] > 0)
    # Rows in pairs, predictor and corrector, of which the correctors of steps that have none are left out.
    chosen = np.stack([np.ones(len(found), dtype=bool), corrected], axis=1).reshape(-1)
    columns = {name: value[chosen] for name, value in _columns(found, churn, corrected).items()}
    levels = np.stack([churn.levels, np.append(found.levels[1:], found.levels[-1])], axis=1).reshape(-1)[chosen]
    signal = np.repeat(found.signal[1:], 2)[chosen]
    noise = np.stack([np.where(corrected, found.noise[1:], churn.noise[1:]), churn.noise[1:]], axis=1)
    ends = signal, noise.reshape(-1)[chosen]
    return found.table(f"heun{churn.text}", columns, levels=levels, ends=ends, start_scale=churn.start_scale)


def _columns(grid: Grid, churn: Churn, corrected: np.ndarray[Any, np.dtype[np.bool_]]) -> dict[str, Any]:
    """The columns of predictor and corrector of each step, [2 N]."""
    start, end = (grid.signal[:-1], churn.noise[:-1]), (grid.signal[1:], grid.noise[1:])
    first = first_order(start, end)
    with np.errstate(divide="ignore", invalid="ignore"):
        u, u_next = start[1] / grid.scale[:-1], end[1] / grid.scale[1:]
        half = np.where(corrected, grid.scale[1:] * (u_next - u) / (2 * u_next), 0.0)
    sigma = np.append(churn.sigma[1:], 0.0)
    zero = np.zeros(len(grid))
    pairs = {
        "next_x": (first["next_x"], zero + 1),
        "next_x0": (first["next_x0"], -half),
        "next_prev": (zero, half),
        "keep_x0": (corrected.astype(np.float64), zero),
        "sigma": (np.where(corrected, 0.0, sigma), np.where(corrected, sigma, 0.0)),
    }
    return {name: np.stack(values, axis=1).reshape(-1) for name, values in pairs.items()}
