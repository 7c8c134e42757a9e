"""Between two noises: spherical interpolation, which keeps the length that a network expects of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepfusion import _checks

_PARALLEL = 1e-4  # radians: below, an arc is a line to the last bit of float32
_MOST = 1 << 20


def slerp(a: Tensor, b: Tensor, weights: int | Sequence[float]) -> Tensor:
    """Points of the great arc from ``a`` to ``b`` (Song et al. 2021, appendix D.5, equation 67)::

        sin((1 - w) theta) / sin(theta) * a + sin(w theta) / sin(theta) * b,    cos(theta) = <a, b> / (|a| |b|)

    Args:
        a, b: floating point [...], of one shape; each is one vector, whatever its shape.
        weights: each in [0, 1], where 0 is ``a`` and 1 is ``b``; or how many, evenly spaced with both ends.

    Returns:
        float32 [k, ...] (float64 if an argument is), computed in float64.

    Raises:
        TypeError, ValueError: naming the argument; ``a`` and ``b`` are zero, not finite, or point in opposite
            directions, between which there are many arcs.
    """
    chosen = check_weights(weights)
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = _checks.describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {given}")
        if not bool(value.isfinite().all()) or not bool(value.any()):
            raise ValueError(f"{name} must be finite and not all zero")
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(f"a and b must have one shape and device, got {list(a.shape)} and {list(b.shape)}")
    result = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    one, other = a.double(), b.double()
    angle = _angle(one / one.norm(), other / other.norm())
    if math.pi - angle < _PARALLEL:
        raise ValueError("a and b point in opposite directions: no arc between them is the shortest")
    points = []
    for w in chosen:
        if angle < _PARALLEL:
            points.append((1 - w) * one + w * other)
        else:
            points.append((math.sin((1 - w) * angle) * one + math.sin(w * angle) * other) / math.sin(angle))
    return torch.stack(points).to(result)


def check_weights(weights: int | Sequence[float]) -> list[float]:
    """The weights as floats in [0, 1]; TypeError or ValueError naming the argument."""
    if isinstance(weights, int) and not isinstance(weights, bool):
        count = _checks.integer("weights", weights, 2, _MOST)
        return [i / (count - 1) for i in range(count)]
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not weights:
        raise TypeError(f"weights must be how many, or a sequence of numbers in [0, 1], got {weights!r}")
    return [_checks.number("weights", w, 0.0, 1.0) for w in weights]


def _angle(one: Tensor, other: Tensor) -> float:
    """The angle between unit vectors, exact even if they are nearly parallel (Kahan 2006, section 12)."""
    return 2 * math.atan2(float((one - other).norm()), float((one + other).norm()))
