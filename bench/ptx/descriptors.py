"""Matrices in shared memory as wgmma and tcgen05.mma read them: by a descriptor of 64 bits.

PTX ISA, "Asynchronous wgmma: Shared Memory Matrix Layout" and "tcgen05: Shared memory descriptor". Both have the same
canonical layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stepfusion.bench.ptx.matrices import DEPTH, Matrices, elements
from stepfusion.bench.ptx.shared import SharedMemory
from stepfusion.bench.ptx.types import Array, Fault

CHUNK = 16  # bytes that lie together whatever the layout: 8 elements
_NONE, _UNKNOWN = 0, -1


@dataclass(frozen=True)
class _Format:
    """Bits that are 0, (first, count) each; fields of 3 bits that are not (first, value); the mode's first bit; and
    the width in bytes of a row of the swizzled pattern, by mode."""

    empty: tuple[tuple[int, int], ...]
    fixed: tuple[tuple[int, int], ...]
    mode: int
    widths: tuple[int, ...]


_FORMATS = {
    "wgmma": _Format(((14, 2), (30, 2), (46, 3), (52, 10)), (), 62, (16, 128, 64, 32)),
    # a version, and 128 bytes whose atoms have 32 instead of 16, which is not known here
    "tcgen05": _Format(((14, 2), (30, 2), (53, 8)), ((46, 1),), 61, (16, _UNKNOWN, 128, _NONE, 64, _NONE, 32, _NONE)),
}


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
    def of(cls, words: Array, what: str = "wgmma") -> Descriptors:
        """Decode uint64 words of an instruction ``what``: wgmma or tcgen05.

        Raises:
            Fault: a word has bits that mean nothing, or a pattern that does not begin where patterns repeat.
        """
        form = _FORMATS[what]

        def field(first: int, bits: int) -> Array:
            return np.asarray((words >> np.uint64(first)) & np.uint64(2**bits - 1)).astype(np.int64)

        if any(field(*place).any() for place in form.empty) or any((field(f, 3) != v).any() for f, v in form.fixed):
            raise Fault("a descriptor of a matrix with bits that mean nothing")
        if field(49, 3).any():
            raise Fault("a descriptor of a matrix with a base offset, which is not known here")
        width = np.array(form.widths)[field(form.mode, 64 - form.mode)]
        if (what == "tcgen05" and field(52, 1).any()) or (width == _UNKNOWN).any():
            raise Fault(
                "a descriptor of a matrix with an absolute distance or with atoms of 32 bytes, not known here"
            )
        if (width == _NONE).any():
            raise Fault("a descriptor of a matrix with a mode that means nothing")
        return cls(16 * field(0, 14), 16 * field(16, 14), 16 * field(32, 14), width)

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


def load(
    shared: SharedMemory, chunks: Array, blocks: Array, kind: str, rows: int, *, across: bool
) -> tuple[Matrices, Array]:
    """The matrices of ``blocks`` [n] at :meth:`Descriptors.chunks`, [n, rows, 16], and their bytes [n, chunks, 16].

    Raises:
        Fault: of :meth:`SharedMemory.read`.
    """
    bits, holes = shared.read(chunks.reshape(-1), np.repeat(blocks, chunks.shape[1]), 2, CHUNK // 2)
    values = matrices(elements(bits, kind).reshape(*chunks.shape, -1), rows, across=across)
    spoilt = np.zeros(bits.shape, bool) if holes is None else holes != 0
    found = Matrices(values.astype("f8"), matrices(spoilt.reshape(*chunks.shape, -1), rows, across=across))
    return found, np.ascontiguousarray(bits).view("u1").reshape(*chunks.shape, CHUNK)
