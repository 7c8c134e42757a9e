"""What threads know of each other's work that is not done when it is issued: uses of memory, and products.

A bar.sync orders the threads of a block. So does an mbarrier, for who waits for it: that thread knows what the
mbarrier's phase stands for, and after the next bar.sync its block does (PTX ISA, "Causality order").
"""

from __future__ import annotations

import numpy as np

from stepfusion.bench.ptx.types import Array, Fault

_SEVERAL = -2


class Uses:
    """Who used each of ``count`` things last, and which uses are still going on."""

    def __init__(self, count: int) -> None:
        self._going_on = np.zeros(count, np.int16)
        self._barriers = np.full(count, -1, np.int32)  # before the end of the last use
        self._by = np.full(count, -1, np.int32)

    def begin(self, places: Array) -> None:
        """Uses that go on until :meth:`end`."""
        np.add.at(self._going_on, places, 1)

    def end(self, places: Array, by: Array, barriers: int) -> None:
        """They are over, and their users know it."""
        np.subtract.at(self._going_on, places, 1)
        self.once(places, by, barriers)

    def once(self, places: Array, by: Array, barriers: int) -> None:
        """Uses that are over at once."""
        others = (self._barriers[places] == barriers) & (self._by[places] != by)
        users = np.where(others, _SEVERAL, by)
        self._barriers[places], self._by[places] = barriers, users
        self._by[places[self._by[places] != users]] = _SEVERAL

    def settled(self, places: Array, by: Array, barriers: int) -> Array:
        """Which are over for ``by``: their own, and what lies before a bar.sync."""
        ordered = (self._barriers[places] < barriers) | (self._by[places] == by)
        return np.asarray(ordered & (self._going_on[places] == 0))


class Completion:
    """Which products of its block each thread knows to be complete.

    A block's products are numbered from 1 in the order of their issue by its one thread that issues any, and complete
    in that order (PTX ISA, "tcgen05.commit").

    Args:
        block: of each thread.

    Attributes:
        known: of each thread, int64: the products up to this one are complete.
    """

    def __init__(self, block: Array) -> None:
        self._block = block
        self.known = np.zeros(len(block), np.int64)
        self._issued = np.zeros(int(block[-1]) + 1, np.int64)
        self._issuer = np.full(len(self._issued), -1, np.int64)

    def issue(self, lanes: Array) -> Array:
        """The numbers of products that threads issue.

        Raises:
            Fault: another thread of a block issues products as well.
        """
        blocks = self._block[lanes]
        issuer = self._issuer[blocks]
        if len(np.unique(blocks)) < len(blocks) or ((issuer != -1) & (issuer != lanes)).any():
            raise Fault("a tcgen05.mma by several threads of a block, whose order is not known here")
        self._issuer[blocks] = lanes
        self._issued[blocks] += 1
        return self._issued[blocks]

    def committed(self, lanes: Array) -> Array:
        """Up to which product a tcgen05.commit of each thread speaks of: those that the thread has issued."""
        blocks = self._block[lanes]
        return np.where(self._issuer[blocks] == lanes, self._issued[blocks], 0)

    def learn(self, lanes: Array, products: Array) -> None:
        """Threads come to know that products up to these are complete."""
        self.known[lanes] = np.maximum(self.known[lanes], products)

    def share(self, lanes: Array, groups: Array) -> None:
        """Threads of the same group, of ``groups`` [n], come to know what one of them knows."""
        most = np.zeros(int(groups.max()) + 1, np.int64)
        np.maximum.at(most, groups, self.known[lanes])
        self.known[lanes] = most[groups]
