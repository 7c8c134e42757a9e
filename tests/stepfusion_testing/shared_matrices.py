"""Matrices in shared memory by the tables of the PTX ISA, for instructions that read them by a descriptor."""

from __future__ import annotations

import numpy as np

from stepfusion.bench.ptx.arithmetic import from_bfloat16, to_bfloat16

T = 8
#: Width of a row of the swizzled pattern in T elements, by its name.
WIDTHS = {"none": 1, "128": 8, "64": 4, "32": 2}
PARTS = 8  # a matrix has more room than it needs: distances that no default would be


def placed(mode: str, across: bool, rows: int) -> tuple[np.ndarray, int, int, int]:
    """Where element [row, k] of ``rows`` x 16 lies, in bytes, by the table "Canonical Layouts" of the PTX ISA.

    Also the leading and the stride byte offset that say so, and how many bytes it takes.
    """
    width = WIDTHS[mode]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    pattern = 8 * width * T  # elements of 8 rows of the pattern
    if across:
        inner = row % T + row // T % width * T + k % 8 * width * T
        outer = row // (T * width)
        leading, stride = (pattern * (outer.max() + 1), pattern) if mode == "none" else (pattern, pattern * PARTS)
        far, near = (stride, leading) if mode == "none" else (leading, stride)
        elements = inner + outer * far + k // 8 * near
    else:  # ((8, m), (T, 2)) : ((w T, SBO), (1, T or LBO))
        leading, stride = (pattern * PARTS * 4, pattern) if mode == "none" else (0, pattern)
        elements = row % 8 * width * T + row // 8 * stride + k % T + k // T * (leading if mode == "none" else T)
    addresses = 2 * elements
    bits = {"none": 0, "32": 1, "64": 2, "128": 3}[mode]  # Swizzle<bits, 4, 3>
    swizzled = addresses ^ ((addresses >> 7 & (2**bits - 1)) << 4)
    size = -(-(int(swizzled.max()) + 2) // 1024) * 1024
    return swizzled, 2 * int(leading), 2 * int(stride), size


def half(values: np.ndarray, kind: str) -> np.ndarray:
    return to_bfloat16(values.astype("f4")) if kind == "bf16" else values.astype("f2").view("u2")


def number(bits: np.ndarray, kind: str) -> np.ndarray:
    return (from_bfloat16(bits) if kind == "bf16" else bits.view("f2")).astype("f8")
