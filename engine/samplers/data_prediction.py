"""Steps of exponential integrators in the predicted x0 (Lu et al. 2022, DPM-Solver++)."""

from __future__ import annotations

import math

from stepfusion.samplers.grid import Grid
from stepfusion.samplers.rows import STATE, Sum, combine


def data_step(
    grid: Grid, i: int, order: int, eta: float = 0.0, solver_type: str = "midpoint", *, bend_factor: float = 2.0
) -> Sum:
    """The state after step i as a sum of the state before it and of x0 at steps i, i - 1, i - 2.

    The equations stand in :func:`stepfusion.dpmpp_2m_sde` (order 2) and :func:`stepfusion.dpmpp_3m`, with
    ``bend_factor`` for the 2 of the latter.
    """
    lam = grid.half_log_snr
    h = float(lam[i + 1] - lam[i])
    k = (1 + eta) * h
    first = first_order(grid, i, i + 1, eta)
    if order == 1:
        return first
    signal = float(grid.signal[i + 1])
    d0 = _difference(i, h / float(lam[i] - lam[i - 1]))
    half = -math.expm1(-k) / 2 if solver_type == "midpoint" else math.expm1(-k) / k + 1
    if order == 2:
        return combine((1.0, first), (signal * half, d0))
    before, earlier = float(lam[i] - lam[i - 1]), float(lam[i - 1] - lam[i - 2])
    bend = combine((1.0, d0), (-1.0, _difference(i - 1, h / earlier)))
    third = bend_factor * ((math.expm1(-k) + k) / k**2 - 0.5)
    both = before + earlier
    slope = math.expm1(-k) / k + 1
    return combine((1.0, first), (signal * slope, d0), (signal * (slope * before - third * h) / both, bend))


def first_order(grid: Grid, start: int, end: int, eta: float = 0.0) -> Sum:
    """From level ``start`` of a grid to level ``end`` with x0 of the former."""
    if eta:
        h = float(grid.half_log_snr[end] - grid.half_log_snr[start])
        ratio = float(grid.noise[end] / grid.noise[start])
        ratio = ratio * math.exp(-eta * h) if ratio else 0.0
        return {STATE: ratio, start: -float(grid.signal[end]) * math.expm1(-(1 + eta) * h)}
    ratio = float(grid.noise[end] / grid.noise[start])
    return {STATE: ratio, start: float(grid.signal[end]) - ratio * float(grid.signal[start])}


def noise_of_step(grid: Grid, i: int, eta: float) -> float:
    """s' sqrt(1 - e^(-2 eta h)), 0 where a step ends without noise."""
    if grid.noise[i + 1] == 0 or eta == 0:
        return 0.0
    h = float(grid.half_log_snr[i + 1] - grid.half_log_snr[i])
    return float(grid.noise[i + 1]) * math.sqrt(-math.expm1(-2 * eta * h))


def _difference(i: int, inverse_ratio: float) -> Sum:
    """(x0_i - x0_(i - 1)) / r."""
    return {i: inverse_ratio, i - 1: -inverse_ratio}
