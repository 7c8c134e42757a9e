"""DPM-Solver++: multistep solvers of the diffusion ODE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers.levels import Visits, bounds_of_x0, ending_known, final_level, levels_to_visit
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Sequence[int] | Visits | None = None,
    spacing: str = "trailing",
    steps_offset: int = 0,
    prediction: str = "epsilon",
    clip: float | None = None,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
    lower_order_final: bool | None = None,
    final_alpha_cumprod: float | None = None,
) -> StepTable:
    """DPM-Solver++(2M), a multistep solver of second order (Lu et al. 2022, algorithm 2): good images in 15 steps.

    Its first row is of first order, and so is a last one that ends without noise, where h is infinite. It
    extrapolates from one row to the next, so rows should not grow in h: with spacings that reach down to t = 0
    ("leading", "linspace") the row before the last does, and a few steps of it may be worse than DDIM's.

    Args:
        clip: None by default, as in the authors' code: where x0 reaches a clip, its difference to the row before says
            nothing of where it goes.
        lower_order_final: make the last row of first order too; by default with fewer than 15 steps, as the authors'
            code does.
        Others: as in :func:`ddim`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    visits, abar = levels_to_visit(schedule, steps, timesteps, spacing, steps_offset, prediction, None)
    bounds = bounds_of_x0(clip, threshold, sample_max_value, len(visits))
    if lower_order_final is None:
        lower_order_final = len(visits) < 15
    lower_order_final = _checks.boolean("lower_order_final", lower_order_final)
    abar_prev = np.append(abar[1:], final_level(schedule, final_alpha_cumprod, abar.dtype))
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(np.append(abar, abar_prev[-1:]) / (1 - np.append(abar, abar_prev[-1:]))) / 2
    h = np.diff(half_log_snr)
    history = np.zeros(len(visits))
    history[1:] = h[1:] / (2 * h[:-1])
    if lower_order_final or abar_prev[-1] == 1:
        history[-1] = 0.0
    columns = algebra.dpmpp_2m(abar, abar_prev, history, prediction=prediction)
    columns |= bounds
    return StepTable.from_columns("dpm-solver++ 2m", prediction, schedule, visits, ending_known(columns))
