"""DPM-Solver++: multistep solvers of the diffusion ODE."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers.levels import Visits, bounds_of_x0, ending_known, final_level, levels_to_visit
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

_LOWEST_LAMBDA = -5.1  # of the authors' code, with epsilon prediction


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
    lambda_min_clipped: float | None = None,
) -> StepTable:
    """DPM-Solver++(2M), a multistep solver of second order (Lu et al. 2022, algorithm 2): good images in 15 steps.

    Its first row is of first order, and so is a last one that ends without noise, where h is infinite. It
    extrapolates from one row to the next, so rows should not grow in h: with spacings that reach down to t = 0
    ("leading", "linspace") the row before the last does, and a few steps of it may be worse than DDIM's.

    Args:
        clip: None by default, as in the authors' code: if x0 reaches a clip, its difference to the row before says
            nothing of where it goes.
        lower_order_final: make the last row of first order too; by default with fewer than 15 steps, as the authors'
            code does.
        lambda_min_clipped: the noisiest level to visit, as lambda = log(signal / noise): ``steps`` are spaced over
            the timesteps from there down. By default -5.1, as in the authors' code, for networks that return epsilon,
            and no bound for others. With less signal than that, x0 is a small difference divided by a number that is
            almost 0, and what a bfloat16 network rounds stays in the image. The linear schedule of 1000 timesteps
            ends at -5.06 and is visited whole; the cosine schedule goes on to -9.9. ``-math.inf`` is no bound, and
            ``timesteps`` has none.
        Others: as in :func:`ddim`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    total = timesteps_in_bound(schedule, steps, timesteps, prediction, lambda_min_clipped)
    visits, abar = levels_to_visit(schedule, steps, timesteps, spacing, steps_offset, prediction, None, total=total)
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
    columns["keep_x0"] = np.append(history[1:] != 0, False).astype(np.float64)  # only what the next row reads
    columns |= bounds
    return StepTable.from_columns("dpm-solver++ 2m", prediction, schedule, visits, ending_known(columns))


def timesteps_in_bound(
    schedule: NoiseSchedule, steps: int | None, timesteps: Any, prediction: str, lambda_min_clipped: float | None
) -> int | None:
    """How many timesteps, from the first on, :func:`dpmpp_2m` spaces its steps over; None if there is no bound.

    A bound by default gives way to steps that do not fit below it.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    given = lambda_min_clipped is not None
    if given and timesteps is not None:
        raise ValueError("lambda_min_clipped and timesteps exclude each other, got both")
    if not isinstance(schedule, NoiseSchedule) or timesteps is not None or not (given or prediction == "epsilon"):
        return None
    bound = _LOWEST_LAMBDA if lambda_min_clipped is None else _lambda(lambda_min_clipped)
    with np.errstate(divide="ignore"):
        total = int((np.log(schedule.snr) / 2 >= bound).sum())
    if not given:
        whole = isinstance(steps, int) and total < steps <= schedule.num_timesteps
        return schedule.num_timesteps if whole or total == 0 else total
    if total == 0 or (isinstance(steps, int) and steps > total):
        wanted = "of which there must be one" if total == 0 else f"fewer than steps = {steps}"
        raise ValueError(f"lambda_min_clipped = {bound:g} leaves {total} timesteps, {wanted}")
    return total


def _lambda(value: float) -> float:
    """``lambda_min_clipped`` checked: a number, or minus infinity for no bound."""
    if isinstance(value, numbers.Real) and float(value) == -math.inf:
        return -math.inf
    return _checks.number("lambda_min_clipped", value)
