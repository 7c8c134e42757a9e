"""Matrices in shared memory as wgmma reads them: by a descriptor of 64 bits (PTX ISA, "wgmma: Shared Memory")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepfusion.bench.ptx.matrices import DEPTH
from stepfusion.bench.ptx.types import Array, Fault

CHUNK = 16  # bytes that lie together whatever the layout: 8 elements
_SWIZZLED_BYTES = np.array([16, 128, 64, 32])  # width of a row of the pattern, by the descriptor's mode


@dataclass(frozen=True)
class Descriptors:
    """What descriptors say ("Matrix Descriptor Format"), int64 each, in bytes.

    Attributes:
        start: the address of the first element. leading, stride: distances between parts of the layout, whose meaning
            depends on it. width: bytes of a row of the swizzled pattern; 16: nothing is swizzled.
    """

    start: Array
    leading: Array
    stride: Array
    width: Array

    @classmethod
    def of(cls, words: Array) -> Descriptors:
        """Decode uint64 words.

        Raises:
            Fault: a word has bits that mean nothing, or a pattern that does not begin where patterns repeat.
        """

        def field(first: int, bits: int) -> Array:
            return np.asarray((words >> np.uint64(first)) & np.uint64(2**bits - 1)).astype(np.int64)

        if any(field(first, bits).any() for first, bits in ((14, 2), (30, 2), (46, 3), (52, 10))):
            raise Fault("a descriptor of a matrix with bits that mean nothing")
        if field(49, 3).any():
            raise Fault("a descriptor of a matrix with a base offset, which is not known here")
        return cls(16 * field(0, 14), 16 * field(16, 14), 16 * field(32, 14), _SWIZZLED_BYTES[field(62, 2)])

    def chunks(self, rows: int, *, across: bool) -> Array:
        """Where the chunks of matrices of ``rows`` x 16 elements lie, uint64 [matrices, n].

        ``across``: a chunk goes along 8 rows instead of 8 of the 16 (M- or N-major); ordered for
        :func:`matrices`.
        The layouts are those of "Canonical Layouts", with T = 8 elements.
        """
        start, leading, stride, width = (
            v[:, None, None] for v in (self.start, self.leading, self.stride, self.width)
        )
        plain = width == CHUNK
        if (
            across
        ):  # ((T, w, m), (8, k)) : ((1, T, LBO), (wT, SBO)); unswizzled ((T, 1, m), (8, k)) : ((1, T, SBO), (T, LBO))
            depth, part = np.arange(DEPTH)[:, None], np.arange(rows // 8)
            within, beyond = part * CHUNK % width, part * CHUNK // width
            along = np.where(plain, beyond * stride, within + beyond * leading)
            places = along + depth % 8 * width + depth // 8 * np.where(plain, leading, stride)
        else:  # ((8, m), (T, 2)) : ((wT, SBO), (1, T)); unswizzled with LBO in place of the last T
            row, part = np.arange(rows)[:, None], np.arange(DEPTH // 8)
            places = row % 8 * width + row // 8 * stride + part * np.where(plain, leading, CHUNK)
        places = start + places
        # Swizzle<b, 4, 3>: bits 4 to 3 + b of an address change with those three above
        swizzled = places ^ (places >> 3 & (width - CHUNK))
        return np.asarray(swizzled.reshape(len(self.start), -1), np.uint64)


def matrices(chunks: Array, rows: int, *, across: bool) -> Array:
    """Chunks [matrices, n, 8 elements] as [matrices, rows, 16]."""
    if across:
        return np.ascontiguousarray(chunks.reshape(len(chunks), DEPTH, rows).transpose(0, 2, 1))
    return np.ascontiguousarray(chunks.reshape(len(chunks), rows, DEPTH))
