"""The noisiest level that a sampler visits, given as lambda = log(signal / noise)."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from stepfusion import _checks
from stepfusion.samplers.schedule import NoiseSchedule

_LOWEST_LAMBDA = -5.1  # of the authors' code, with epsilon prediction


def timesteps_in_bound(
    schedule: NoiseSchedule, steps: int | None, timesteps: Any, prediction: str, lambda_min_clipped: float | None
) -> int | None:
    """How many timesteps, from the first on, steps are spaced over; None if there is no bound.

    A bound by default gives way to steps that do not fit below it.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    given = lambda_min_clipped is not None
    if given and timesteps is not None:
        raise ValueError("lambda_min_clipped and timesteps exclude each other, got both")
    if not isinstance(schedule, NoiseSchedule) or timesteps is not None or not (given or prediction == "epsilon"):
        return None
    bound = _LOWEST_LAMBDA if lambda_min_clipped is None else checked_lambda(lambda_min_clipped)
    with np.errstate(divide="ignore"):
        total = int((np.log(schedule.snr) / 2 >= bound).sum())
    if not given:
        whole = isinstance(steps, int) and total < steps <= schedule.num_timesteps
        return schedule.num_timesteps if whole or total == 0 else total
    if total == 0 or (isinstance(steps, int) and steps > total):
        wanted = "of which there must be one" if total == 0 else f"fewer than steps = {steps}"
        raise ValueError(f"lambda_min_clipped = {bound:g} leaves {total} timesteps, {wanted}")
    return total


def checked_lambda(value: float) -> float:
    """``lambda_min_clipped`` checked: a number, or minus infinity for no bound; TypeError or ValueError if not."""
    if isinstance(value, numbers.Real) and float(value) == -math.inf:
        return -math.inf
    return _checks.number("lambda_min_clipped", value)
