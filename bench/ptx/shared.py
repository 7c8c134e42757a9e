"""The shared memory of blocks, what copies and products in flight do to it, and what the asynchronous proxy sees.

An access that a thread has issued and not waited for may happen at any time in between. Until somebody has waited, a
word that a cp.async will write can be neither read nor written, and one that a wgmma reads cannot be written.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stepfusion.bench.ptx.types import Array, Fault

_NEVER = np.iinfo(np.int32).max


class _Content(NamedTuple):
    bytes: Array
    holes: Array  # bits that depend on what nobody wrote
    written: Array  # of each byte: 255 if somebody wrote it, else 0


class _InFlight(NamedTuple):
    """Of every word of 32 bits: how many copies will write it, what (uint32), and how many products read it."""

    writes: Array
    coming: Array
    reads: Array


class SharedMemory:
    """``size`` bytes for each of ``blocks`` blocks. What registers have of holes is kept with the bytes."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        self._stride = -(-size // 16) * 16
        total = self._stride * blocks
        self._content = _Content(np.full(total, 255, np.uint8), np.zeros(total, np.uint8), np.zeros(total, np.uint8))
        self._flights: _InFlight | None = None  # most programs have none

    @property
    def words(self) -> int:
        """Words of 32 bits that :meth:`places` of one block lie in."""
        return self._stride // 4

    def read(self, addresses: Array, blocks: Array, size: int, count: int) -> tuple[Array, Array | None]:
        """``count`` elements of ``size`` bytes from each address of each block on: values and holes, [lanes, count].

        Raises:
            Fault: outside the memory, not aligned, never written, or about to be written.
        """
        places = self._places(addresses, blocks, size, count)
        content = _Content(*(part.view(f"u{size}")[places] for part in self._content))
        if self._flights is not None and self._flights.writes[self.places(addresses, blocks, size * count)].any():
            raise Fault("reads of shared memory that a cp.async, which nobody waited for, writes")
        if (content.written != np.iinfo(content.written.dtype).max).any():
            raise Fault("reads of shared memory that nobody wrote")
        return content.bytes, content.holes if content.holes.any() else None

    def write(self, addresses: Array, blocks: Array, values: Array, holes: Array | None) -> None:
        """The inverse of :meth:`read`."""
        self._check_idle(addresses, blocks, values.itemsize * values.shape[1])
        places = self._places(addresses, blocks, values.itemsize, values.shape[1])
        content = _Content(*(part.view(values.dtype) for part in self._content))
        content.bytes[places] = values
        content.holes[places] = 0 if holes is None else holes
        content.written[places] = np.iinfo(values.dtype).max

    def announce(self, addresses: Array, blocks: Array, values: Array) -> None:
        """A cp.async will write ``values``, uint32 [lanes, words]. Several may write the same.

        Raises:
            Fault: outside the memory, not aligned, or something else in flight uses the words.
        """
        width = 4 * values.shape[1]
        self._places(addresses, blocks, 4, values.shape[1])
        self._check_idle(addresses, blocks, width, values)
        places, flights = self.places(addresses, blocks, width), self._in_flight()
        np.add.at(flights.writes, places, 1)
        flights.coming[places] = values
        if (flights.coming[places] != values).any():
            raise Fault("copies of different values to one address")

    def arrive(self, addresses: Array, blocks: Array, values: Array) -> None:
        """Write what :meth:`announce` announced."""
        np.subtract.at(self._in_flight().writes, self.places(addresses, blocks, 4 * values.shape[1]), 1)
        places = self._places(addresses, blocks, 4, values.shape[1])
        for part, value in zip(self._content, (values, 0, 2**32 - 1), strict=True):
            part.view("u4")[places] = value

    def check(self, addresses: Array, blocks: Array, width: int) -> None:
        """Raises a Fault for ``width`` bytes that lie outside, or are not aligned to their number."""
        self._places(addresses, blocks, width, 1)

    def forget(self, addresses: Array, blocks: Array, width: int) -> None:
        """Make ``width`` bytes at each address what nobody has written."""
        self._check_idle(addresses, blocks, width)
        self._content.written[self._places(addresses, blocks, 1, width)] = 0

    def hold(self, places: Array) -> None:
        """A wgmma reads the words at :meth:`places` from now on."""
        np.add.at(self._in_flight().reads, places, 1)

    def release(self, places: Array) -> None:
        """It has read them."""
        np.subtract.at(self._in_flight().reads, places, 1)

    def places(self, addresses: Array, blocks: Array, width: int) -> Array:
        """Which words of all blocks, one after the other, ``width`` bytes from each address on lie in, [lanes, n]."""
        starts = addresses.astype(np.int64) + blocks * self._stride
        return np.asarray(starts[:, None] // 4 + np.arange(max(width // 4, 1)))

    def _in_flight(self) -> _InFlight:
        if self._flights is None:
            total = len(self._content.bytes) // 4
            self._flights = _InFlight(np.zeros(total, "i4"), np.zeros(total, "u4"), np.zeros(total, "i4"))
        return self._flights

    def _check_idle(self, addresses: Array, blocks: Array, width: int, same: Array | None = None) -> None:
        """Nothing in flight reads the words, or writes anything but ``same``."""
        if self._flights is None:
            return
        self._places(addresses, blocks, 1, width)
        places = self.places(addresses, blocks, width)
        if self._flights.reads[places].any():
            raise Fault("writes of shared memory that a wgmma, which nobody waited for, reads")
        busy = self._flights.writes[places] != 0
        if (busy if same is None else busy & (self._flights.coming[places] != same)).any():
            raise Fault("writes of shared memory that a cp.async, which nobody waited for, writes")

    def _places(self, addresses: Array, blocks: Array, size: int, count: int) -> Array:
        width = np.uint64(size * count)
        if (addresses + width > self.size).any() or (addresses % width).any():
            worst = int(addresses.max())
            raise Fault(f"shared address {worst} of {self.size}, {size * count} bytes: outside, or not aligned")
        starts = addresses.astype(np.int64) + blocks * self._stride
        return np.asarray(starts[:, None] // size + np.arange(count))


class Proxies:
    """Which words of shared memory the asynchronous proxy, through which products read, sees as they are.

    Ordinary stores and cp.async write through the generic proxy. For a wgmma or a tcgen05.mma to see it, a
    fence.proxy.async must lie on the way from the write to the product: of the writing thread behind its write, or of
    a thread behind a barrier that follows the write; and then a barrier, or the product of that thread itself (PTX
    ISA, "Causality order"). All threads of a warpgroup must have such a way, for PTX does not say which of them reads
    what.

    Args:
        words: of a block. block: of each thread.
    """

    def __init__(self, words: int, block: Array) -> None:
        self._block = block
        shape = (int(block[-1]) + 1, words)
        self._written = np.full(shape, -1, np.int32)  # barriers before the last write
        self._writer = np.zeros(shape, np.int32)
        self._seen = np.zeros(shape, np.int32)  # barriers from which on every thread's wgmma sees it
        self._fenced = np.full(len(block), -1, np.int32)  # barriers before a thread's last fence

    def wrote(self, places: Array, lanes: Array, barriers: int) -> None:
        """Threads ``lanes`` [n] write words [n, w]."""
        self._written.reshape(-1)[places] = barriers
        self._writer.reshape(-1)[places] = lanes[:, None]
        self._seen.reshape(-1)[places] = _NEVER

    def fence(self, lanes: Array, barriers: int) -> None:
        """Threads come to a fence.proxy.async."""
        self._fenced[lanes] = barriers
        fencing = np.zeros(len(self._block), bool)
        fencing[lanes] = True
        for block in np.unique(self._block[lanes]):
            seen = self._seen[block]
            ordered = fencing[self._writer[block]] | (self._written[block] < barriers)
            seen[ordered & (seen == _NEVER)] = barriers + 1

    def check(self, places: Array, lanes: Array, barriers: int, what: str = "wgmma") -> None:
        """Warpgroups of threads [n, 128], or single ones [n, 1], read words [n, w] by the instruction ``what``.

        Raises:
            Fault: they may not see what was written last.
        """
        by_all = self._seen.reshape(-1)[places] <= barriers
        by_itself = self._fenced[lanes].min(axis=1)[:, None] > self._written.reshape(-1)[places]
        if not (by_all | by_itself).all():
            raise Fault(f"a {what} of shared memory that no fence.proxy.async has made visible to it")
