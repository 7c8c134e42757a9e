"""The threads of some blocks that run together, the memory that they share, and the log of their accesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stepfusion.bench.ptx.memory import GlobalMemory
from stepfusion.bench.ptx.registers import Registers
from stepfusion.bench.ptx.shared import Proxies, SharedMemory
from stepfusion.bench.ptx.types import Array, Fault, Lanes

WARP = 32


@dataclass(frozen=True)
class Access:
    """One access of some threads, for the search for races; one that takes a while is there for every moment of it.

    Attributes:
        lanes: the threads [n]. blocks: their blocks, of the whole launch. addresses: of each one's first byte.
        barriers: how many bar.sync lie before it. fences: how many bar.warp.sync, of each. content: bytes [n, width].
    """

    space: str
    write: bool
    lanes: Array
    blocks: Array
    addresses: Array
    barriers: int
    fences: Array
    content: Array
    where: str


class Issue(NamedTuple):
    """When threads issued an access that happens later: barriers and fences (of each) before it, and its source."""

    barriers: int
    fences: Array
    where: str


@dataclass
class Threads:
    """The threads of some blocks that run together, and the memory that they share.

    Attributes:
        block: of each thread, counted from 0. first_block: of the launch. barriers: that the threads which run now
            have passed. fences: bar.warp.sync that each has passed. where: the source of the instruction that runs.
        log: accesses, or None to keep none. proxies: None in a program without wgmma and tcgen05.mma, to which all is
            the same. checks: called with words of shared memory [n, w] and the threads [n] that write them.
    """

    registers: Registers
    memory: GlobalMemory
    shared: SharedMemory
    parameters: dict[str, int]
    block: Array
    first_block: int = 0
    barriers: int = 0
    where: str = ""
    log: list[Access] | None = None
    proxies: Proxies | None = None
    checks: list[Callable[[Array, Array], None]] = field(default_factory=list)
    fences: Array = field(init=False)

    def __post_init__(self) -> None:
        self.fences = np.zeros(len(self.block), np.int64)

    def lanes(self, lanes: Lanes) -> Array:
        """The lanes as indices."""
        return np.arange(len(self.block)) if lanes is None else lanes

    def whole(self, lanes: Lanes, size: int = WARP) -> Array:
        """The lanes, in order, of whole warps, or of whole groups of ``size`` threads.

        Raises:
            Fault: not all lanes of a warp are there.
        """
        who = self.lanes(lanes)
        starts = who[::size]
        if (
            len(who) % size
            or (who.reshape(-1, size) != starts[:, None] + np.arange(size)).any()
            or (starts % size).any()
        ):
            name = "a shuffle or a matrix that not all lanes of a warp reach"
            raise Fault(name if size == WARP else "a wgmma that not all warps of a warpgroup reach")
        return who

    def load(self, space: str, addresses: Array, size: int, count: int, lanes: Array) -> tuple[Array, Array | None]:
        """Values and holes, [lanes, count]."""
        if space == "shared":
            values, holes = self.shared.read(addresses, self.block[lanes], size, count)
        else:
            values, holes = self.memory.access(addresses, size, count), None
        self.note(space, False, addresses, values, lanes)
        return values, holes

    def store(self, space: str, addresses: Array, values: Array, holes: Array | None, lanes: Array) -> None:
        """Write values [lanes, count]; to shared memory with their holes."""
        if space == "shared":
            self.shared.write(addresses, self.block[lanes], values, holes)
            self.check_write(addresses, values.itemsize * values.shape[1], lanes)
            self.wrote(addresses, values.itemsize * values.shape[1], lanes)
        elif holes is not None:
            raise Fault(f"{int((holes != 0).any(1).sum())} stores of what depends on registers that nobody wrote")
        else:
            self.memory.access(addresses, values.itemsize, values.shape[1], values)
        self.note(space, True, addresses, values, lanes)

    def check_write(self, addresses: Array, width: int, lanes: Array) -> None:
        """Threads write ``width`` bytes of shared memory at each address, which lie inside.

        Raises:
            Fault: of :attr:`checks`.
        """
        if self.checks:
            places = self.shared.places(addresses, self.block[lanes], width)
            for check in self.checks:
                check(places, lanes)

    def wrote(self, addresses: Array, width: int, lanes: Array) -> None:
        """``width`` bytes of shared memory at each address are new to the asynchronous proxy."""
        if self.proxies is not None:
            self.proxies.wrote(self.shared.places(addresses, self.block[lanes], width), lanes, self.barriers)

    def issue(self, lanes: Array) -> Issue:
        """This moment."""
        return Issue(self.barriers, self.fences[lanes], self.where)

    def note(
        self, space: str, write: bool, addresses: Array, values: Array, lanes: Array, issue: Issue | None = None
    ) -> None:
        """Log an access that happens now, or at any time from ``issue`` until now."""
        if self.log is None:
            return
        issue = self.issue(lanes) if issue is None else issue
        content = np.ascontiguousarray(values).view("u1").reshape(len(lanes), -1)
        blocks, now = self.block[lanes] + self.first_block, self.fences[lanes]
        for barriers in range(issue.barriers, self.barriers + 1):
            for later in range(int((now - issue.fences).max(initial=0)) + 1):
                fences = np.minimum(issue.fences + later, now)
                access = (lanes, blocks, addresses, barriers, fences, content, issue.where)
                self.log.append(Access(space, write, *access))
