"""Quantiles of a symmetric Beta distribution, in NumPy alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_TERMS = 64  # of a series that at least halves from term to term
_BISECTIONS = 64


def beta_quantiles(probabilities: ArrayLike, shape: float = 0.6) -> NDArray[np.float64]:
    """Where Beta(shape, shape) has the given ``probabilities`` below: float64 in [0, 1], as they are ordered.

    The distribution function up to 1/2 is x^a / B(a, a) sum_n (1 - a)_n / (n! (a + n)) x^n, which a bisection in
    w = x^a inverts: it is almost linear in w. The other half is its mirror image.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    tail = np.minimum(p, 1 - p)
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5**shape)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = _lower_tail(middle, shape) < tail
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x: NDArray[np.float64] = ((low + high) / 2) ** (1 / shape)
    x = np.where(tail == 0, 0.0, x)
    return np.where(p > 0.5, 1 - x, x)


def _lower_tail(w: NDArray[np.float64], shape: float) -> NDArray[np.float64]:
    """The probability below x = w^(1/shape) <= 1/2."""
    x = w ** (1 / shape)
    total, term = np.zeros_like(x), np.ones_like(x)
    for n in range(_TERMS):
        total = total + term / (shape + n)
        term = term * x * (n + 1 - shape) / (n + 1)
    scale = math.exp(math.lgamma(2 * shape) - 2 * math.lgamma(shape))
    result: NDArray[np.float64] = w * total * scale
    return result
