"""Euler's method on any path: without noise, with churn, and ancestral."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from stepfusion.samplers.churn import churned_levels
from stepfusion.samplers.grid import Floats, GridOptions, make_grid
from stepfusion.samplers.implicit import ddim
from stepfusion.samplers.path import Path
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


def euler(
    path: Path,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float | None = None,
    s_noise: float = 1.0,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """Euler's method for the probability flow, first order, one evaluation a step.

    From a level with signal a and noise s to one with a', s':

        x' = a' x0 + s' eps,  eps = (x - a x0) / s

    That is sigma's Euler step on :class:`stepfusion.SigmaPath` (Karras et al. 2022, algorithm 1 without its
    correction), x + (t' - t) v on :class:`stepfusion.FlowPath`, and :func:`stepfusion.ddim` with eta = 0 on a
    :class:`stepfusion.NoiseSchedule` (Song et al. 2021, equation 12).

    Args:
        s_churn, s_min, s_max, s_noise: on :class:`stepfusion.SigmaPath`, noise that is added before each step, as in
            :func:`stepfusion.heun`.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    found = make_grid(path, steps, grid)
    churn = churned_levels(found, s_churn, s_min, s_max, s_noise)
    ends = found.signal[1:], found.noise[1:]
    columns = first_order((found.signal[:-1], churn.noise[:-1]), ends)
    columns["sigma"] = np.append(churn.sigma[1:], 0.0)
    churned = found.signal[1:], churn.noise[1:]
    return found.table(
        f"euler{churn.text}", columns, levels=churn.levels, ends=churned, start_scale=churn.start_scale
    )


def dpmpp_1s(path: Path, steps: int | None = None, **grid: Unpack[GridOptions]) -> StepTable:
    """DPM-Solver++ of first order (Lu et al. 2022, equation 8): :func:`euler` under its other name."""
    return replace(euler(path, steps, **grid), name="dpm-solver++ 1s")


def first_order(start: tuple[Floats, Floats], end: tuple[Floats, Floats]) -> dict[str, Any]:
    """next_x and next_x0 of a' x0 + s' (x - a x0) / s from pairs (a, s) to pairs (a', s')."""
    ratio = end[1] / start[1]
    return {"next_x": ratio, "next_x0": end[0] - ratio * start[0]}


def euler_ancestral(
    schedule: Path, steps: int | None = None, *, eta: float = 1.0, **grid: Unpack[GridOptions]
) -> StepTable:
    """k-diffusion's ancestral Euler (``sample_euler_ancestral``), on any path.

    With sigma = noise / signal and y = x / signal that is

        s_up   = eta sqrt(s_to^2 (s_from^2 - s_to^2) / s_from^2),  s_down = sqrt(s_to^2 - s_up^2)
        y_next = y + (y - x0) / s_from (s_down - s_from) + s_up z

    which, back in x, is DDIM's step with the same eta, eps re-derived from x0 (Song et al. 2021, equations 12 and
    16): so this is :func:`stepfusion.ddim` under its other name and with that library's defaults, noise and no clip.

    Args:
        eta: 1 is k-diffusion's default, 0 is Euler's method without noise.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    given: dict[str, Any] = {"clip": None, "spacing": None, **grid}
    if given["spacing"] is None and isinstance(schedule, NoiseSchedule):
        given["spacing"] = "trailing"
    return replace(ddim(schedule, steps, eta=eta, **given), name=f"euler ancestral, eta {float(eta):g}")
