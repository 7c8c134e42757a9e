"""How bits that nobody wrote travel through an instruction: from its operands' holes to its result's.

What moves bits (shifts, permutations, conversions of integers) moves holes with them; a logical and with a written 0
closes a hole, and so does a choice between equal bits. Everything else spoils its whole result. So no bit is called
written that is not, and the few idioms that compilers use on masked elements are seen through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from stepfusion.bench.ptx.arithmetic import Function
from stepfusion.bench.ptx.types import Array

#: values of the operands, their holes (None: none), width of the result in bytes (0: a predicate) -> its holes
Rule: TypeAlias = Callable[[Sequence[Array], Sequence[Array | None], int], Array]


def _full(width: int) -> Array:
    return np.array(True) if width == 0 else np.array(256**width - 1, f"u{width}")


def spoil(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
    """Any hole in an operand makes the whole result one."""
    touched = np.zeros((), bool)
    for hole in holes:
        if hole is not None:
            touched = touched | (hole != 0)
    full = _full(width)
    return np.where(touched, full, np.zeros_like(full))


def spoil_halves(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
    """Two values in one word, from two operands: each spoils its own half, the first the upper."""
    half = width // 2
    upper, lower = (spoil(values, [hole], half).astype(f"u{width}") for hole in holes)
    return np.asarray(upper << upper.dtype.type(8 * half) | lower)


def spoil_each_half(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
    """Two results in one word, of the halves of each operand: a half is spoilt by the same half of an operand."""
    half = 4 * width  # bits
    found = union(values, holes, width)
    halves = [(found >> found.dtype.type(shift)) & found.dtype.type((1 << half) - 1) for shift in (0, half)]
    lower, upper = (spoil(values, [part], width) >> found.dtype.type(half) for part in halves)
    return np.asarray(upper << upper.dtype.type(half) | lower)


def move(function: Function, data: Sequence[bool]) -> Rule:
    """An instruction that moves bits moves holes as well. ``data``: which operands move; the others say where to."""

    def moved(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
        operands = [
            (np.zeros_like(value) if hole is None else hole.view(value.dtype)) if is_data else value
            for value, hole, is_data in zip(values, holes, data, strict=True)
        ]
        result = np.asarray(function(*operands))
        result = result if result.dtype == bool else result.view(f"u{width}")
        directions = [hole for hole, is_data in zip(holes, data, strict=True) if not is_data]
        return result | spoil(values, directions, width)

    return moved


def _hole(values: Array, hole: Array | None) -> Array:
    return np.zeros((), values.dtype) if hole is None else hole.view(values.dtype)


def conjunction(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
    """and: a written 0 on one side closes the other side's hole."""
    a, b = values
    ha, hb = map(_hole, values, holes)
    return np.asarray((ha & hb) | (ha & b) | (hb & a))


def disjunction(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
    """or: a written 1 on one side closes the other side's hole."""
    a, b = values
    ha, hb = map(_hole, values, holes)
    return np.asarray((ha & hb) | (ha & ~b) | (hb & ~a))


def union(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
    """xor, not and moves of one operand: a bit of the result has a hole if that bit of an operand has one."""
    result = np.zeros((), bool if width == 0 else f"u{width}")
    for hole in holes:
        result = result if hole is None else result | hole
    return np.asarray(result)


def choice(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
    """selp: the holes of what is chosen; of both, and of what differs, where the predicate is one itself."""
    dtype = f"u{width}"
    a, b = (np.ascontiguousarray(v).view(dtype) for v in values[:2])
    ha, hb = (np.zeros((), dtype) if h is None else h for h in holes[:2])
    chosen = np.where(values[2], ha, hb)
    return chosen if holes[2] is None else np.where(holes[2], ha | hb | (a ^ b), chosen)
