"""Linear multistep methods in the flow's own direction: DEIS, iPNDM, and PLMS."""

from __future__ import annotations

import math
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.samplers.dpm_solver import step_orders
from stepfusion.samplers.grid import Grid, GridOptions, make_grid
from stepfusion.samplers.path import Path
from stepfusion.samplers.rows import STATE, X0, RowWriter, Sum, combine
from stepfusion.samplers.table import StepTable

#: Adams-Bashforth's weights of the newest and of older derivatives, for even steps.
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def deis(
    path: Path,
    steps: int | None = None,
    *,
    order: int = 3,
    lower_order_final: bool | None = None,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """DEIS in log rho (Zhang & Chen 2023, "tAB-DEIS"; diffusers' DEISMultistepScheduler).

    With rho = noise / signal, dy/drho = eps for y = x / signal, and eps is a polynomial in log rho through its last
    values:

        x' = signal' (x / signal + sum_j w_j eps_j),   w_j = integral of l_j(log rho) from rho to rho'

    Rows keep eps = (x - signal x0) / noise.

    Args:
        order: 1, 2, 3 or 4; the first rows have lower ones.
        lower_order_final: make the last rows of lower order; by default with fewer than 15 steps.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    order = _checks.integer("order", order, 1, 4)
    found = make_grid(path, steps, grid, bounded="epsilon")
    if lower_order_final is None:
        lower_order_final = len(found) < 15
    orders = step_orders(found, order, _checks.boolean("lower_order_final", lower_order_final))
    writer = RowWriter()
    for i, this_order in enumerate(orders):
        log_rho = -found.half_log_snr[i - this_order + 1 : i + 2][
            ::-1
        ]  # the end of the step, and back from its start
        weights = _integrals(log_rho) if this_order > 1 else []
        reached = _multistep(found, i, [float(found.signal[i + 1]) * w for w in weights])
        writer.add(reached, evaluation=_velocity(found.noise[i], found.signal[i]))
    return found.table(f"deis {order}", writer.columns())


def ipndm(path: Path, steps: int | None = None, *, order: int = 4, **grid: Unpack[GridOptions]) -> StepTable:
    """iPNDM: Adams-Bashforth of up to fourth order (Liu et al. 2022; Zhang & Chen 2023), with lower orders at first.

    With y = x / c and u = noise / c, where c is the signal (on :class:`stepfusion.FlowPath` 1), and d = (y - x0) / u:

        x' = c' (y + (u' - u) sum_j b_j d_j),  b = (3, -1) / 2, (23, -16, 5) / 12 or (55, -59, 37, -9) / 24

    These are the weights of even steps in u, whatever the spacing is: only with even ones is its order more than 1.
    Rows keep d, which is eps, or on a flow the velocity.

    Args:
        order: 1 to 4.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    order = _checks.integer("order", order, 1, 4)
    found = make_grid(path, steps, grid, bounded="any")  # y is x divided by the signal
    first = 0 if found.scale[0] > 0 else 1  # a derivative by an infinite u says nothing of the next one
    writer = RowWriter()
    for i in range(len(found)):
        weights = _ADAMS_BASHFORTH[max(1, min(order, i - first + 1))]
        writer.add(_adams_bashforth(found, i, i, weights), evaluation=_velocity(found.noise[i], found.scale[i]))
    return found.table(f"ipndm {order}", writer.columns())


def plms(path: Path, steps: int | None = None, *, order: int = 4, **grid: Unpack[GridOptions]) -> StepTable:
    """Pseudo linear multistep sampling (Liu et al. 2022, equation 12; latent diffusion's PLMS, diffusers' PNDM).

    As :func:`stepfusion.ipndm`, but its first step has two evaluations, whose mean it takes: N + 1 for N steps. Its
    second row is at the level where the first one ended:

        x'' = x~ + c' (u' - u) / 2 (d' - d)

    Args:
        order: 2 to 4.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    order = _checks.integer("order", order, 2, 4)
    found = make_grid(path, steps, grid, bounded="any")  # y is x divided by the signal
    if found.scale[0] == 0:
        raise ValueError(f"plms cannot start at the level {found.levels[0]}, which has no signal: use ipndm")
    writer = RowWriter()
    at = [0] if len(found) == 1 else [0, 1, *range(1, len(found))]
    for row, i in enumerate(at):
        evaluation = _velocity(found.noise[i], found.scale[i])
        if row == 1:
            half = float(found.scale[1] * (found.time[1] - found.time[0])) / 2
            writer.add({STATE: 1.0, 1: half, 0: -half}, evaluation=evaluation, keep=False)
        else:
            weights = _ADAMS_BASHFORTH[min(order, i + 1)]
            writer.add(_adams_bashforth(found, i, row, weights), evaluation=evaluation)
    ends = np.array([1, 1, *range(2, len(found) + 1)][: len(at)])
    pairs = found.signal[ends], found.noise[ends]
    return found.table(f"plms {order}", writer.columns(), levels=found.levels[at], ends=pairs)


def _adams_bashforth(grid: Grid, i: int, row: int, weights: tuple[float, ...]) -> Sum:
    """The state after step i, whose row has this number; rows from 2 on of PLMS follow row 0 after row 1."""
    length = float(grid.scale[i + 1] * (grid.time[i + 1] - grid.time[i])) if len(weights) > 1 else 0.0
    older = [row - k - (1 if row != i and row - k < 2 else 0) for k in range(1, len(weights))]
    terms = [(length * w, {j: 1.0, row: -1.0}) for w, j in zip(weights[1:], older, strict=True)]
    return combine((1.0, _first(grid, i)), *terms)


def _multistep(grid: Grid, i: int, weights: list[float]) -> Sum:
    """The state after step i: a first-order step, and weights of the differences of older evaluations to its own."""
    terms = [(w, {i - k: 1.0, i: -1.0}) for k, w in enumerate(weights[1:], 1)]
    return combine((1.0, _first(grid, i)), *terms)


def _first(grid: Grid, i: int) -> Sum:
    ratio = float(grid.noise[i + 1] / grid.noise[i])
    return {STATE: ratio, X0: float(grid.signal[i + 1]) - ratio * float(grid.signal[i])}


def _velocity(noise: Any, scale: Any) -> tuple[float, float]:
    """(x / c - x0) / u as weights of x and x0; with c = signal it is eps."""
    return 1 / float(noise), -float(scale / noise)


def _integrals(log_rho: NDArray[np.float64]) -> list[float]:
    """The integrals of Lagrange's polynomials in log rho over rho, from the second entry to the first.

    ``log_rho``: the end, and then the nodes, the newest first.
    """
    start, nodes = float(log_rho[1]), log_rho[1:] - log_rho[1]
    length = float(log_rho[0] - log_rho[1])
    z = (_NODES + 1) / 2 * length
    measure = _WEIGHTS / 2 * length * np.exp(z) * math.exp(start)
    result = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        polynomial = np.prod((z[:, None] - others) / (node - others), axis=1)
        result.append(float((measure * polynomial).sum()))
    return result
