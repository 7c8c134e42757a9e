"""UniPC: a predictor and a corrector of any order that share their evaluations (Zhao et al. 2023)."""

from __future__ import annotations

import math
from typing import Any, Unpack

import numpy as np

from stepfusion import _checks
from stepfusion.samplers.data_prediction import first_order
from stepfusion.samplers.dpm_solver import step_orders
from stepfusion.samplers.grid import Grid, GridOptions, make_grid
from stepfusion.samplers.path import Path
from stepfusion.samplers.rows import STATE, X0, RowWriter, Sum, combine
from stepfusion.samplers.table import StepTable

VARIANTS = ("bh1", "bh2")


def unipc(
    path: Path,
    steps: int | None = None,
    *,
    order: int = 2,
    variant: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """UniPC of order 1, 2 or 3 (Zhao et al. 2023, algorithms 5 to 8; diffusers' UniPCMultistepScheduler).

    The row at level t corrects the state that the row before it predicted there, and predicts the next. With m_0 of
    the step before, m_t of the row, m_k of older ones, r_k = (lambda_k - lambda_0) / h, and B = -h ("bh1") or
    e^-h - 1 ("bh2"), a step from s to t is

        x_t = noise_t / noise_s x_s - signal_t (e^-h - 1) m_0 - signal_t B sum_k rho_k (m_k - m_0) / r_k

    The corrector's sum has m_t with r = 1, the predictor's has not; their rho solve sum_k r_k^(n-1) rho_k =
    b_n for n = 1 .. order. The corrected x_s stands in the state of the row before and the history, for that is
    linear in it.

    Args:
        order: of predictor and corrector; the first steps have lower ones. The error of the whole is one order
            higher, for the corrector sees one evaluation more.
        variant: "bh1" or "bh2".
        predict_x0: m is x0; False takes eps, with the signal and the noise, and h and -h, exchanged.
        lower_order_final: lower the order of the last steps to the number of steps that are left, as diffusers does.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    order = _checks.integer("order", order, 1, 3)
    _checks.choice("variant", variant, VARIANTS)
    predict_x0 = _checks.boolean("predict_x0", predict_x0)
    lower_order_final = _checks.boolean("lower_order_final", lower_order_final)
    found = make_grid(path, steps, grid, bounded="epsilon")
    if not predict_x0 and found.signal[0] == 0:
        raise ValueError("predict_x0 must be True where the first level has no signal, got False")
    name = f"unipc {order}, {variant}" + ("" if predict_x0 else ", eps")
    return found.table(name, _Solver(found, variant, predict_x0).write(step_orders(found, order, lower_order_final)))


class _Solver:
    """The sums of UniPC's steps on a grid."""

    def __init__(self, grid: Grid, variant: str, predict_x0: bool) -> None:
        self.grid, self.variant, self.predict_x0 = grid, variant, predict_x0
        self.lam = [float(value) for value in grid.half_log_snr]

    def write(self, orders: list[int]) -> dict[str, Any]:
        """The columns of rows whose predictors have these orders."""
        writer = RowWriter()
        predicted: Sum = {STATE: 1.0}
        for i, order in enumerate(orders):
            corrected: Sum = {STATE: 1.0}
            if i > 0:
                corrected = predicted if math.isinf(self.lam[i - 1]) else self._step(i - 1, orders[i - 1], True)
            predicted = self._step(i, order, False)
            rest = {key: weight for key, weight in predicted.items() if key != STATE}
            reached = combine((predicted[STATE], corrected), (1.0, rest))
            writer.add(reached, evaluation=self._evaluation(i), then=predicted)
        return writer.columns()

    def _evaluation(self, i: int) -> tuple[float, float]:
        """What a row's m is: x0, or eps = (x - signal x0) / noise."""
        if self.predict_x0:
            return 0.0, 1.0
        return 1 / float(self.grid.noise[i]), -float(self.grid.signal[i] / self.grid.noise[i])

    def _step(self, i: int, order: int, corrects: bool) -> Sum:
        """x at level i + 1 as a sum of x at level i and of evaluations, with that of i + 1 if it corrects."""
        first, factor = self._first(i)
        if math.isinf(self.lam[i + 1]) or math.isinf(self.lam[i]):
            return first
        h = self.lam[i + 1] - self.lam[i]
        ratios = [(self.lam[i - k] - self.lam[i]) / h for k in range(1, order)]
        weights = self._rhos([*ratios, 1.0], -h if self.predict_x0 else h, corrects)
        places = [i - k for k in range(1, order)] + ([i + 1] if corrects else [])
        terms = [
            (factor * rho / r, {place: 1.0, i: -1.0})
            for rho, r, place in zip(weights, [*ratios, 1.0], places, strict=False)
        ]
        return combine((1.0, first), *terms)

    def _first(self, i: int) -> tuple[Sum, float]:
        """The first-order step, and what the differences of evaluations are multiplied with beside rho."""
        grid = self.grid
        h = self.lam[i + 1] - self.lam[i]
        if self.predict_x0:
            return first_order(grid, i, i + 1), -float(grid.signal[i + 1]) * self._b_of(-h)
        if grid.noise[i + 1] == 0:
            return {STATE: 0.0, X0: float(grid.signal[i + 1])}, 0.0
        noise, ratio = float(grid.noise[i + 1]), float(grid.signal[i + 1] / grid.signal[i])
        return {STATE: ratio, i: noise - ratio * float(grid.noise[i])}, -noise * self._b_of(h)

    def _b_of(self, hh: float) -> float:
        return hh if self.variant == "bh1" else math.expm1(hh)

    def _rhos(self, ratios: list[float], hh: float, corrects: bool) -> list[float]:
        """rho of the differences to older evaluations and, if it corrects, to the newer one.

        A single one is 1/2, as in the authors' code, where the system would have it nearly so.
        """
        order = len(ratios)
        if not corrects:
            ratios = ratios[:-1]
        if len(ratios) <= 1:
            return [0.5] * len(ratios)
        phi, factorial, b = math.expm1(hh) / hh - 1, 1, []
        for n in range(1, order + 1):
            b.append(phi * factorial / self._b_of(hh))
            factorial *= n + 1
            phi = phi / hh - 1 / factorial
        powers = np.array([[r**n for r in ratios] for n in range(len(ratios))])
        return [float(rho) for rho in np.linalg.solve(powers, b[: len(ratios)])]
