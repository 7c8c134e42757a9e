"""The scalar types of PTX as NumPy holds them, and the error of everything that a GPU would not do."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Lanes: TypeAlias = Array | None  #: indices of threads among those that run together; None: all of them

_INTEGERS = {f"{k}{8 * w}": np.dtype(f"{'i' if k == 's' else 'u'}{w}") for k in "bus" for w in (1, 2, 4, 8)}

#: Type in PTX -> dtype in a register. bfloat16 and pairs are held as their bits.
TYPES: dict[str, np.dtype[Any]] = _INTEGERS | {
    "pred": np.dtype(bool),
    "f16": np.dtype("f2"),
    "bf16": np.dtype("u2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "s16x2": np.dtype("u4"),
    "u16x2": np.dtype("u4"),
    "f32x2": np.dtype("u8"),
}
INTEGERS = frozenset({*_INTEGERS, "pred"})
FLOATS = frozenset({"f16", "bf16", "f32", "f64"})


class Fault(Exception):
    """What a GPU would trap on or leave undefined, or what this interpreter does not know."""


def bits(kind: str) -> str:
    """The type without a meaning that is as wide as ``kind``: b32 for f32."""
    return kind if kind == "pred" else f"b{8 * TYPES[kind].itemsize}"


def ones(dtype: np.dtype[Any]) -> Any:
    """All bits of a bool or of an unsigned integer."""
    return np.bool_(True) if dtype.kind == "b" else np.iinfo(dtype).max
