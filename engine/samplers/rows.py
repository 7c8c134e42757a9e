"""Rows of solvers that remember: written as sums over a state and over evaluations, solved for what a row has.

A solver of several evaluations goes from a state x_s to x_t by x_t = A x_s + sum_j w_j m_j with what its evaluations
left, m_j. A row does not have x_s, but the state that the row before it made, which is such a sum too: x = B x_s +
sum_j v_j m_j. Hence x_t = A / B x + sum_j (w_j - A / B v_j) m_j, and the m_j are this row's own evaluation and what
earlier rows left in the history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STATE = -1  # in a sum: the state that the sum starts from
X0 = -2  # in a sum: the x0 of the row itself, if what rows keep is something else
_HISTORY = ("next_prev", "next_prev2", "next_prev3")

#: Weights by the number of an evaluation, :data:`STATE` or :data:`X0`.
Sum = dict[int, float]


def combine(*terms: tuple[float, Mapping[int, float]]) -> Sum:
    """factor * sum + factor * sum + ..."""
    result: Sum = {}
    for factor, weights in terms:
        for key, weight in weights.items():
            result[key] = result.get(key, 0.0) + factor * weight
    return result


@dataclass
class RowWriter:
    """The columns of rows that are added one after the other; evaluation j is that of row j."""

    rows: list[dict[str, float]] = field(default_factory=list)
    _state: Sum = field(default_factory=lambda: {STATE: 1.0})
    _kept: list[int] = field(default_factory=list)

    def add(
        self,
        reached: Mapping[int, float],
        *,
        evaluation: tuple[float, float] = (0.0, 1.0),
        keep: bool = True,
        then: Mapping[int, float] | None = None,
        sigma: float = 0.0,
    ) -> None:
        """A row that ends at the state ``reached``.

        Args:
            reached: the state as a sum, with the STATE that the rows so far refer to.
            evaluation: (p, q), the row's own evaluation is p * x + q * x0; by default it is x0.
            keep: leave the evaluation in the history.
            then: the same state as a sum for the rows that follow, with the STATE that they refer to; by default it
                is that STATE itself.
            sigma: of the noise that is added.
        """
        number = len(self.rows)
        factor = reached[STATE] / self._state[STATE]
        weights = combine((1.0, reached), (-factor, self._state))
        row = {"next_x": factor, "next_x0": weights.pop(X0, 0.0), "sigma": sigma}
        del weights[STATE]
        own = weights.pop(number, 0.0)
        row["next_x"] += own * evaluation[0]
        row["next_x0"] += own * evaluation[1]
        for key, weight in weights.items():
            if weight:
                row[_HISTORY[self._kept.index(key)]] = weight
        if keep:
            row["keep_x"], row["keep_x0"] = evaluation
            self._kept = [number, *self._kept][: len(_HISTORY)]
        self.rows.append(row)
        self._state = {STATE: 1.0} if then is None else dict(then)

    def columns(self) -> dict[str, Any]:
        """The columns, float64 [R]; what no row has is left out.

        What no later row reads is not kept.
        """
        names = {name for row in self.rows for name in row}
        columns = {name: np.array([row.get(name, 0.0) for row in self.rows]) for name in sorted(names)}
        if not any((columns[name] != 0).any() for name in _HISTORY if name in columns):
            columns.pop("keep_x", None)
            columns.pop("keep_x0", None)
        return columns
