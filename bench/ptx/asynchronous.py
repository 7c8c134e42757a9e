"""cp.async: copies from global to shared memory that arrive when their thread waits for them, and not before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stepfusion.bench.ptx.accesses import addresses_of
from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.program import Address, Instruction
from stepfusion.bench.ptx.threads import Issue, Threads
from stepfusion.bench.ptx.types import Array, Fault, Lanes

_SIZES = {"ca": (4, 8, 16), "cg": (16,)}
_HINTS = {"L2::64B", "L2::128B", "L2::256B"}


class Groups:
    """How many groups of asynchronous operations each thread has committed, and how many of them are complete."""

    def __init__(self, threads: int) -> None:
        self.committed, self.complete = np.zeros(threads, np.int64), np.zeros(threads, np.int64)

    def commit(self, lanes: Array) -> None:
        """What threads have issued since their last group is the next group."""
        self.committed[lanes] += 1

    def wait(self, lanes: Array, newest: int) -> None:
        """All groups but the ``newest`` ones of each thread complete."""
        self.complete[lanes] = np.maximum(self.complete[lanes], self.committed[lanes] - newest)


def number(operand: object, name: str) -> int:
    """An operand that must be a number that is not negative."""
    try:
        value = int(str(operand), 0)
    except ValueError:
        value = -1
    if value < 0:
        raise Fault(f"{name} must be a number, got {operand}")
    return value


@dataclass(frozen=True)
class _Copies:
    """Copies of one instruction that have not arrived.

    Attributes:
        lanes: the threads [n]. group: of each, counted from 0. targets, sources: addresses [n]. sizes: bytes read of
            each. content: what they will write, uint32 [n, words].
    """

    lanes: Array
    group: Array
    targets: Array
    sources: Array
    sizes: Array
    content: Array
    issue: Issue

    def part(self, chosen: Array) -> _Copies:
        """Some of them."""
        names = ("lanes", "group", "targets", "sources", "sizes", "content")
        columns: dict[str, Any] = {name: getattr(self, name)[chosen] for name in names}
        return replace(self, issue=self.issue._replace(fences=self.issue.fences[chosen]), **columns)


class AsynchronousCopies:
    """cp.async and what waits for it (PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy").

    A thread's copies arrive when it waits for their group, at the latest moment that PTX allows. Until then nobody
    may touch what they write. For the search for races they read and write at every moment from their issue on.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._groups = Groups(len(threads.block))
        self._pending: list[_Copies] = []

    def compile(self, instruction: Instruction) -> Step:
        """``cp.async.{ca,cg}.shared.global``, ``.commit_group``, ``.wait_group`` and ``.wait_all``."""
        words, args = instruction.op.split(".")[2:], instruction.args
        if words == ["commit_group"] and not args:
            return lambda lanes: self._groups.commit(self._threads.lanes(lanes))
        if words == ["wait_all"] and not args:
            return self._wait_for_all
        if words == ["wait_group"] and len(args) == 1:
            newest = number(args[0], "the number of groups")
            return lambda lanes: self._wait(self._threads.lanes(lanes), newest)
        return self._copy(words, instruction)

    def finish(self) -> None:
        """The threads have ended: log what is in flight."""
        for copies in self._pending:
            self._note(copies)

    def _copy(self, words: list[str], instruction: Instruction) -> Step:
        args = instruction.args
        known = words[0] in _SIZES and words[1:3] == ["shared", "global"] and set(words[3:]) <= _HINTS
        if not known or len(args) not in (3, 4) or not all(isinstance(address, Address) for address in args[:2]):
            raise Fault("unknown asynchronous copy")
        size = number(args[2], "the size of a copy")
        if size not in _SIZES[words[0]]:
            raise Fault(f"a copy of {size} bytes")
        targets, sources = (addresses_of(self._threads, arg) for arg in args[:2] if isinstance(arg, Address))
        given = self._threads.registers.source(args[3] if len(args) == 4 else args[2], "u32")

        def step(lanes: Lanes) -> None:
            who = self._threads.lanes(lanes)
            if given.holes(who) is not None:
                raise Fault("a size that depends on what nobody wrote")
            sizes = np.broadcast_to(given.read(who), who.shape).astype(np.int64)
            if (sizes > size).any():
                raise Fault(f"{int(sizes.max())} bytes of a copy of {size}")
            self._issue(who, targets(who), sources(who), sizes, size)

        return step

    def _issue(self, lanes: Array, targets: Array, sources: Array, sizes: Array, size: int) -> None:
        content = np.zeros((len(lanes), size), np.uint8)
        for length in np.unique(sizes[sizes > 0]):
            some = sizes == length
            content[some, :length] = self._read(sources[some], int(length), size)
        words = content.view("u4")
        self._threads.shared.announce(targets, self._threads.block[lanes], words)
        self._threads.check_write(targets, size, lanes)
        group = self._groups.committed[lanes]
        self._pending.append(_Copies(lanes, group, targets, sources, sizes, words, self._threads.issue(lanes)))

    def _read(self, sources: Array, length: int, size: int) -> Array:
        """The first ``length`` bytes at each address, which must be a multiple of ``size``; uint8 [n, length]."""
        if (sources % np.uint64(size)).any():
            raise Fault(f"{int((sources % np.uint64(size) != 0).sum())} misaligned copies of {size} bytes")
        if length == size:
            return self._threads.memory.access(sources, 4, size // 4).view("u1")
        single = [self._threads.memory.access(sources + np.uint64(i), 1, 1) for i in range(length)]
        return np.concatenate(single, axis=1)

    def _wait_for_all(self, lanes: Lanes) -> None:
        """As if they were one more group, and that one waited for."""
        who = self._threads.lanes(lanes)
        self._groups.commit(who)
        self._wait(who, 0)

    def _wait(self, lanes: Array, newest: int) -> None:
        self._groups.wait(lanes, newest)
        waiting = []
        for copies in self._pending:
            arrived = copies.group < self._groups.complete[copies.lanes]
            if arrived.any():
                self._arrive(copies.part(arrived))
            if not arrived.all():
                waiting.append(copies.part(~arrived) if arrived.any() else copies)
        self._pending = waiting

    def _arrive(self, copies: _Copies) -> None:
        self._threads.shared.arrive(copies.targets, self._threads.block[copies.lanes], copies.content)
        self._threads.wrote(copies.targets, 4 * copies.content.shape[1], copies.lanes)
        self._note(copies)

    def _note(self, copies: _Copies) -> None:
        self._threads.note("shared", True, copies.targets, copies.content, copies.lanes, copies.issue)
        for length in np.unique(copies.sizes[copies.sizes > 0]):
            some = copies.part(copies.sizes == length)
            content = np.ascontiguousarray(some.content).view("u1")[:, :length]
            self._threads.note("global", False, some.sources, content, some.lanes, some.issue)
