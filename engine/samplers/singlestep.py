"""Single-step DPM-Solver++: groups of rows that all go from the state where their group began."""

from __future__ import annotations

import math
from typing import Unpack

import numpy as np

from stepfusion import _checks
from stepfusion.samplers.data_prediction import first_order
from stepfusion.samplers.grid import Grid, GridOptions, make_grid
from stepfusion.samplers.path import Path
from stepfusion.samplers.rows import RowWriter, Sum, combine
from stepfusion.samplers.table import StepTable


def dpmpp_2s(
    path: Path, steps: int | None = None, *, lower_order_final: bool = False, **grid: Unpack[GridOptions]
) -> StepTable:
    """DPM-Solver++(2S), a single-step solver of second order (Lu et al. 2022, algorithm 1).

    Two rows go together from s over r to t. With h = lambda_t - lambda_s, r0 = (lambda_r - lambda_s) / h and x0_s,
    x0_r at the two evaluations:

        x_r = first-order step from x_s
        x_t = noise_t / noise_s x_s - signal_t (e^-h - 1) (x0_s + (x0_r - x0_s) / (2 r0))

    As in the authors' code and diffusers' DPMSolverSinglestepScheduler, both r and t are levels of the grid: N steps
    are N evaluations. A row that is left over, or that ends without noise, is of first order.

    Args:
        lower_order_final: make the last row of first order in any case.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _singlestep(path, steps, 2, lower_order_final, grid)


def dpmpp_3s(
    path: Path, steps: int | None = None, *, lower_order_final: bool = False, **grid: Unpack[GridOptions]
) -> StepTable:
    """DPM-Solver++(3S), a single-step solver of third order (Lu et al. 2022).

    As :func:`stepfusion.dpmpp_2s` with three rows from s over q and r to t; r1 = (lambda_q - lambda_s) / h, r0 =
    (lambda_r - lambda_s) / h, d0 = (x0_q - x0_s) / r1, d1 = (x0_r - x0_s) / r0, D1 = (r0 d0 - r1 d1) / (r0 - r1),
    D2 = 2 (d1 - d0) / (r0 - r1):

        x_t = noise_t / noise_s x_s - signal_t (e^-h - 1) x0_s + signal_t ((e^-h - 1) / h + 1) D1
              - signal_t ((e^-h - 1 + h) / h^2 - 1/2) D2

    and x_r as in :func:`stepfusion.dpmpp_2s`, with (e^-h - 1) / h + 1 in place of -(e^-h - 1) / 2. That is diffusers'
    ``solver_type="heun"``.
    """
    return _singlestep(path, steps, 3, lower_order_final, grid)


def _singlestep(
    path: Path, steps: int | None, order: int, lower_order_final: bool, options: GridOptions
) -> StepTable:
    lower_order_final = _checks.boolean("lower_order_final", lower_order_final)
    grid = make_grid(path, steps, options, bounded="epsilon")
    orders = _orders(grid, order, lower_order_final)
    writer = RowWriter()
    for i, this_order in enumerate(orders):
        reached = _STEPS[this_order](grid, i, order)
        goes_on = i + 1 < len(orders) and orders[i + 1] > 1
        writer.add(reached, then=reached if goes_on else None)
    return grid.table(f"dpm-solver++ {order}s", writer.columns())


def _orders(grid: Grid, order: int, lower_order_final: bool) -> list[int]:
    """1, 2, ... in groups; a step from a level without signal stands alone."""
    alone = [1] if np.isinf(grid.half_log_snr[0]) else []
    orders = (alone + list(range(1, order + 1)) * len(grid))[: len(grid)]
    if lower_order_final or np.isinf(grid.half_log_snr[-1]):
        orders[-1] = 1
    return orders


def _first(grid: Grid, i: int, order: int) -> Sum:
    del order
    return first_order(grid, i, i + 1)


def _second(grid: Grid, i: int, order: int) -> Sum:
    lam, start = grid.half_log_snr, i - 1
    h = float(lam[i + 1] - lam[start])
    slope = _slope(start, i, h / float(lam[i] - lam[start]))
    weight = -math.expm1(-h) / 2 if order == 2 else math.expm1(-h) / h + 1
    return combine((1.0, first_order(grid, start, i + 1)), (float(grid.signal[i + 1]) * weight, slope))


def _third(grid: Grid, i: int, order: int) -> Sum:
    del order
    lam, start = grid.half_log_snr, i - 2
    signal, h = float(grid.signal[i + 1]), float(lam[i + 1] - lam[start])
    r1, r0 = float(lam[i - 1] - lam[start]) / h, float(lam[i] - lam[start]) / h
    d0, d1 = _slope(start, i - 1, 1 / r1), _slope(start, i, 1 / r0)
    first = combine((r0 / (r0 - r1), d0), (-r1 / (r0 - r1), d1))
    second = combine((2 / (r0 - r1), d1), (-2 / (r0 - r1), d0))
    of_first = signal * (math.expm1(-h) / h + 1)
    of_second = -signal * ((math.expm1(-h) + h) / h**2 - 0.5)
    return combine((1.0, first_order(grid, start, i + 1)), (of_first, first), (of_second, second))


def _slope(start: int, later: int, inverse_ratio: float) -> Sum:
    return {later: inverse_ratio, start: -inverse_ratio}


_STEPS = {1: _first, 2: _second, 3: _third}
