"""Global memory, which is the host's; every access is checked.

A byte of global memory is outside every tensor of the launch, fresh (allocated, and nobody wrote it) or written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepfusion.bench.ptx.types import Array, Fault

OUTSIDE, FRESH, WRITTEN = range(3)


@dataclass(frozen=True)
class Extent:
    """Memory that a tensor spans.

    Attributes:
        address: of its first byte. size: bytes up to its last. states: of each byte, uint8; None: all are written.
    """

    address: int
    size: int
    states: Array | None = None


class _Span:
    """Extents that overlap, as one: the bytes themselves, and their states."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self.start = min(e.address for e in extents)
        self.end = max(e.address + e.size for e in extents)
        buffer = (ctypes.c_uint8 * (self.end - self.start)).from_address(self.start)
        self.bytes = np.ctypeslib.as_array(buffer)
        self.states: Array | None = None
        if any(e.states is not None for e in extents):
            self.states = np.full(len(self.bytes), OUTSIDE, np.uint8)
            for e in extents:
                part = self.states[e.address - self.start :][: e.size]
                np.maximum(part, WRITTEN if e.states is None else e.states, out=part)


class GlobalMemory:
    """What a launch may touch."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._spans: list[_Span] = []
        together: list[Extent] = []
        end = 0
        for extent in sorted((e for e in extents if e.size), key=lambda e: e.address):
            if together and extent.address >= end:
                self._spans.append(_Span(together))
                together = []
            end = max(end, extent.address + extent.size) if together else extent.address + extent.size
            together.append(extent)
        if together:
            self._spans.append(_Span(together))
        self._starts = np.array([s.start for s in self._spans], np.uint64)
        self._ends = np.array([s.end for s in self._spans], np.uint64)

    def access(self, addresses: Array, size: int, count: int, values: Array | None = None) -> Array:
        """Read ``count`` elements of ``size`` bytes from each address on, or write ``values``; both [lanes, count].

        Raises:
            Fault: an address outside every tensor, or not aligned to the width of the access; a read of bytes that
                nobody wrote.
        """
        which = self._find(addresses, size * count)
        result = np.empty((len(addresses), count), f"u{size}")
        for index in np.unique(which):
            here = which == index
            span = self._spans[index]
            offsets = (addresses[here] - np.uint64(span.start)).astype(np.int64)
            _check_states(span, offsets, size * count, writing=values is not None)
            view, places = _elements(span, offsets, size, count)
            if values is None:
                result[here] = np.ascontiguousarray(view[places]).view(f"u{size}")
            else:
                view[places] = np.ascontiguousarray(values[here]).view(view.dtype)
        return result if values is None else values

    def _find(self, addresses: Array, width: int) -> Array:
        """The span of every address."""
        if not self._spans:
            raise Fault(f"{len(addresses)} accesses, but the launch has no tensor")
        which = np.searchsorted(self._starts, addresses, "right") - 1
        ends = addresses + np.uint64(width)
        bad = (which < 0) | (ends > self._ends[which]) | (ends < addresses)
        crooked = addresses % np.uint64(width) != 0
        if bad.any() or crooked.any():
            first = int(addresses[bad if bad.any() else crooked][0])
            counts = f"{int(bad.sum())} accesses outside every tensor, {int(crooked.sum())} misaligned"
            raise Fault(f"{counts}, first at {first:#x}, {width} bytes")
        return which

    def snapshot(self) -> list[tuple[Array, Array | None]]:
        """Copies of all bytes and states."""
        return [(s.bytes.copy(), None if s.states is None else s.states.copy()) for s in self._spans]

    def restore(self, snapshot: Sequence[tuple[Array, Array | None]]) -> None:
        """Put back what :meth:`snapshot` returned."""
        for span, (content, states) in zip(self._spans, snapshot, strict=True):
            span.bytes[:] = content
            if span.states is not None:
                span.states[:] = states

    def states(self, address: int, size: int) -> Array:
        """The states of ``size`` bytes from ``address`` on, which lie in one span."""
        span = next(s for s in self._spans if s.start <= address < s.end)
        if span.states is None:
            return np.full(size, WRITTEN, np.uint8)
        return span.states[address - span.start :][:size].copy()


def _check_states(span: _Span, offsets: Array, width: int, *, writing: bool) -> None:
    if span.states is None:
        return
    places = offsets[:, None] + np.arange(width)
    states = span.states[places]
    if (states == OUTSIDE).any():
        raise Fault(f"{int((states == OUTSIDE).any(1).sum())} accesses between the elements of a tensor")
    if writing:
        span.states[places] = WRITTEN
    elif (states == FRESH).any():
        raise Fault(f"{int((states == FRESH).any(1).sum())} reads of what nobody wrote")


def _elements(span: _Span, offsets: Array, size: int, count: int) -> tuple[Array, Array]:
    """The span as elements, and where in it the accesses are. A span that starts between two elements stays bytes."""
    if span.start % size:
        return span.bytes, offsets[:, None] + np.arange(size * count)
    view = span.bytes[: len(span.bytes) // size * size].view(f"u{size}")
    return view, offsets[:, None] // size + np.arange(count)
