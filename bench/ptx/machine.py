"""Blocks of a launch in flight: which threads run next, and what they must reach together.

Threads that stand at one instruction run as one group, and the group that is furthest behind runs first, so that
branches join again. Between barriers all warps of a block may run side by side, or one after the other: a result that
depends on it is a race.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from stepfusion.bench.ptx.accesses import compile_access, compile_elect, compile_matrix, compile_shuffle
from stepfusion.bench.ptx.asynchronous import AsynchronousCopies
from stepfusion.bench.ptx.matrices import compile_product
from stepfusion.bench.ptx.opcodes import Compiler, Step
from stepfusion.bench.ptx.program import Instruction, Program
from stepfusion.bench.ptx.registers import Source
from stepfusion.bench.ptx.shared import Proxies
from stepfusion.bench.ptx.tensor_cores import TensorCores, uses_tensor_cores
from stepfusion.bench.ptx.threads import WARP, Threads
from stepfusion.bench.ptx.types import Array, Fault, Lanes
from stepfusion.bench.ptx.warpgroups import WARPGROUP, Warpgroups

#: Who comes first between barriers: all side by side, or one warp (or one thread of each warp) after the other.
ORDERS = ("together", "warps", "warps reversed", "threads", "threads reversed")

_END = 1 << 60
_BARRIER, _FENCE, _WARP, _WARPGROUP = "barrier", "fence", "warp", "warpgroup"
_BRANCH, _EXIT, _PLAIN = "branch", "exit", "plain"
#: As a warp, which may leave it out as a whole; and what lanes may have to stand still for.
_ALIGNED, _WAIT = "aligned", "wait"


class _Compiled(NamedTuple):
    kind: str
    step: Step
    target: int  # of a branch
    guard: Source | None
    negated: bool
    ready: Callable[[Array], Array] | None = None  # of a wait: which of some lanes need not stand still


class _Key(NamedTuple):
    """What a group waits for, in the order in which groups run.

    Attributes:
        barriers: passed by the group. warp: its turn among the warps. meetings: shuffles, matrices and fences passed.
        lane: its turn within a warp; -1: it waits for the others there. at: index of its next instruction.
    """

    barriers: int
    warp: int
    meetings: int
    lane: int
    at: int


class _Standing(NamedTuple):
    """Lanes that stand still until an mbarrier's phase completes, or for others of their warp that do."""

    key: _Key
    lanes: Array


def _nothing(lanes: Lanes) -> None:
    return None


class Machine:
    """Runs the threads of some blocks from the first instruction to the last.

    Args:
        compiler: of the instructions that compute. order: one of :data:`ORDERS`.

    Attributes:
        reached: which instructions threads came to, one bool each.
    """

    def __init__(self, program: Program, threads: Threads, compiler: Compiler, order: str) -> None:
        self._program, self._threads, self._compiler = program, threads, compiler
        self.reached = np.zeros(len(program.code) + 1, bool)
        self._copies = AsynchronousCopies(threads)
        self._warpgroups = Warpgroups(threads, program, worst=compiler.approximations.worst)
        self._tensor: TensorCores | None = None  # most programs have none
        if uses_tensor_cores(program):
            self._tensor = TensorCores(threads, program, worst=compiler.approximations.worst)
        self._standing: list[_Standing] = []
        if any(instruction.op.startswith(("wgmma", "tcgen05.mma")) for instruction in program.code):
            threads.proxies = Proxies(threads.shared.words, threads.block)
        self._code = [self._compile(instruction) for instruction in program.code]
        self._exited = np.zeros(len(threads.block), bool)
        self._heap: list[tuple[_Key, int, Array]] = []
        self._pushes = 0
        self._at = 0
        number = np.arange(len(threads.block)) % program.threads
        warp = number // WARP if order != "together" else 0 * number
        lane = number % WARP if order.startswith("threads") else 0 * number
        reverse = order.endswith("reversed")
        self._turns = [turn.max() - turn if reverse else turn for turn in (warp, lane)]
        last = number // WARPGROUP * WARPGROUP + (0 if reverse else WARPGROUP - 1)
        self._last_turn = self._turns[0][np.minimum(last, program.threads - 1)]  # of the warps of one's warpgroup

    def _compile(self, instruction: Instruction) -> _Compiled:
        ready = None
        try:
            if self._tensor is not None and instruction.op.startswith("mbarrier.try_wait"):
                ready, step = self._tensor.compile_wait(instruction)
                kind, target = _WAIT, 0
            else:
                kind, step, target = self._kind(instruction)
            guard = self._threads.registers.source(instruction.guard, "pred") if instruction.guard else None
            if not instruction.op.startswith("wgmma"):
                step = self._warpgroups.watched(instruction, step)
            if self._tensor is not None:
                step = self._tensor.watched(instruction, step)
        except Fault as error:
            raise Fault(f"{instruction.text} ({instruction.where}): {error}") from error
        if guard is not None and kind in (_BARRIER, _FENCE, _WARP, _WARPGROUP):
            raise Fault(f"{instruction.text} ({instruction.where}): a synchronisation under a predicate")
        return _Compiled(kind, step, target, guard, instruction.negated, ready)

    def _kind(self, instruction: Instruction) -> tuple[str, Step, int]:
        op, args = instruction.op, instruction.args
        if op in ("bra", "bra.uni"):
            if str(args[0]) not in self._program.labels:
                raise Fault("an unknown label")
            return _BRANCH, _nothing, self._program.labels[str(args[0])]
        if op in ("ret", "exit"):
            return _EXIT, _nothing, 0
        if op in ("bar.sync", "bar.warp.sync") and args in (("0",), ("-1",)):
            return (_FENCE if "warp" in op else _BARRIER), _nothing, 0
        base = op.split(".")[0]
        if base == "shfl":
            return _WARP, compile_shuffle(self._threads, instruction), 0
        if base in ("ldmatrix", "stmatrix"):
            return _WARP, compile_matrix(self._threads, instruction), 0
        if base == "mma":
            return _WARP, compile_product(self._threads, instruction, worst=self._compiler.approximations.worst), 0
        if base == "wgmma":
            return _WARPGROUP if "mma_async" in op else _WARP, self._warpgroups.compile(instruction), 0
        if base == "elect":
            return _WARP, compile_elect(self._threads, instruction), 0
        if self._tensor is not None and base in ("tcgen05", "mbarrier"):
            aligned, step = self._tensor.compile(instruction)
            return _ALIGNED if aligned else _PLAIN, step, 0
        if op in ("fence.proxy.async", "fence.proxy.async.shared") and not args:
            return _PLAIN, self._proxy_fence, 0
        if op.startswith("cp.async."):
            return _PLAIN, self._copies.compile(instruction), 0
        if base in ("ld", "st"):
            return _PLAIN, compile_access(self._threads, instruction), 0
        return _PLAIN, self._compiler.compile(instruction), 0

    def _proxy_fence(self, lanes: Lanes) -> None:
        if self._threads.proxies is not None:
            self._threads.proxies.fence(self._threads.lanes(lanes), self._threads.barriers)

    def run(self) -> None:
        """Run until every thread has ended.

        Raises:
            Fault: naming the instruction and its line of the source.
        """
        self._release(np.arange(len(self._threads.block)), 0, 0, 0)
        while self._heap or self._standing:
            self._check_progress()
            key, _, lanes = heapq.heappop(self._heap)
            groups = [lanes]
            while self._heap and self._heap[0][0] == key:
                groups.append(heapq.heappop(self._heap)[2])
            lanes = np.sort(np.concatenate(groups)) if len(groups) > 1 else lanes
            self._threads.barriers = key.barriers
            try:
                if key.lane == -1:
                    self._come(lanes, key)
                else:
                    self._advance(lanes, key)
            except Fault as error:
                instruction = self._program.code[self._at]
                raise Fault(f"{instruction.text} ({instruction.where}): {error}") from error
            self._wake()
        self._copies.finish()
        self._warpgroups.finish()
        if self._tensor is not None:
            self._tensor.finish()

    def _come(self, lanes: Array, key: _Key) -> None:
        """Lanes meet, unless others of their warps stand still: then they do so, too."""
        warps = [standing.lanes // WARP for standing in self._standing if key.warp != -1]
        if warps and np.isin(lanes // WARP, np.concatenate(warps)).any():
            self._standing.append(_Standing(key, lanes))
            return
        self._meet(lanes, key.at)
        self._release(lanes, key.barriers, key.meetings, key.at + 1)

    def _check_progress(self) -> None:
        """Whoever stands still, somebody else of the block can still run.

        Raises:
            Fault: what they wait for never happens.
        """
        if not self._standing:
            return
        key = min(standing.key for standing in self._standing)
        if not self._heap or self._heap[0][0].barriers > key.barriers:
            instruction = self._program.code[key.at]
            raise Fault(f"{instruction.text} ({instruction.where}): a wait for a phase that never completes")

    def _wake(self) -> None:
        """Let go on who no longer has to stand still."""
        if self._tensor is None or not self._tensor.mbarriers.changed:
            return
        self._tensor.mbarriers.changed = False
        waiting, self._standing = self._standing, []
        for key, lanes in waiting:
            ready = self._code[key.at].ready
            on = np.ones(len(lanes), bool) if ready is None else ready(lanes)
            if on.any():
                self._push(key, lanes[on])
            if not on.all():
                self._standing.append(_Standing(key, lanes[~on]))

    def _push(self, key: _Key, lanes: Array) -> None:
        self._pushes += 1
        heapq.heappush(self._heap, (key, self._pushes, lanes))

    def _release(self, lanes: Array, barriers: int, meetings: int, at: int) -> None:
        """Let threads go on from ``at``, each in its turn."""
        turns = self._turns[0][lanes] * WARP + self._turns[1][lanes]
        for turn in np.unique(turns):
            key = _Key(barriers, int(turn) // WARP, meetings, int(turn) % WARP, at)
            self._push(key, lanes[turns == turn])

    def _meet(self, lanes: Array, at: int) -> None:
        """What threads do together, once all of them have come."""
        self._at, self._threads.where = at, self._program.code[at].where
        compiled = self._code[at]
        if compiled.kind == _BARRIER:
            blocks = self._threads.block
            waiting = np.bincount(blocks[lanes], minlength=blocks[-1] + 1)
            alive = np.bincount(blocks[~self._exited], minlength=blocks[-1] + 1)
            if ((waiting != 0) & (waiting != alive)).any():
                raise Fault("a barrier that not all threads of a block reach")
            self._share(lanes, blocks=True)
        elif compiled.kind == _FENCE:
            self._threads.fences[lanes] += 1
            self._share(lanes, blocks=False)
        else:
            compiled.step(self._narrowed(lanes))

    def _share(self, lanes: Array, *, blocks: bool) -> None:
        if self._tensor is not None:
            self._tensor.meet(lanes, blocks=blocks)

    def _narrowed(self, lanes: Array) -> Lanes:
        return None if len(lanes) == len(self._threads.block) else lanes

    def _advance(self, lanes: Array, key: _Key) -> None:
        """Run a group until it synchronises, parts, ends, or comes to where another of its turn stands."""
        first = self._heap[0][0] if self._heap else None
        limit = first.at if first is not None and first[:4] == key[:4] else _END
        group, at = self._narrowed(lanes), key.at
        while at < limit:
            self._at = at
            self.reached[at] = True
            compiled = self._code[at]
            active, everyone = (group, True) if compiled.guard is None else self._guarded(compiled, group, lanes)
            if active is not None and not len(active):
                at += 1
            elif compiled.kind == _PLAIN:
                self._threads.where = self._program.code[at].where
                compiled.step(active)
                at += 1
            else:
                self._leave(compiled, key, at, lanes, lanes if everyone or active is None else active)
                return
        self._push(key._replace(at=at), lanes)

    def _guarded(self, compiled: _Compiled, group: Lanes, lanes: Array) -> tuple[Lanes, bool]:
        """Who of a group runs an instruction, and whether that is everyone."""
        assert compiled.guard is not None
        if compiled.guard.holes(group) is not None:
            raise Fault("a predicate that depends on what nobody wrote")
        on = np.broadcast_to(compiled.guard.read(group) != compiled.negated, lanes.shape)
        return (group, True) if on.all() else (lanes[on], False)

    def _leave(self, compiled: _Compiled, key: _Key, at: int, lanes: Array, active: Array) -> None:
        """The end of a group: it waits for others, jumps or ends."""
        if compiled.kind == _BARRIER:
            self._push(_Key(key.barriers + 1, -1, 0, -1, at), lanes)
            return
        if compiled.kind == _WARPGROUP:  # behind all of its warps' turns
            turns = self._last_turn[lanes]
            for turn in np.unique(turns):
                self._push(_Key(key.barriers, int(turn), key.meetings + 1, -1, at), lanes[turns == turn])
            return
        if compiled.kind in (_FENCE, _WARP, _ALIGNED):
            self._push(key._replace(meetings=key.meetings + 1, lane=-1, at=at), active)
        elif compiled.kind == _WAIT:
            self._stand(compiled, key, at, active)
        elif compiled.kind == _BRANCH:
            self._push(key._replace(at=compiled.target), active)
        else:
            self._exited[active] = True
        if len(active) < len(lanes):
            self._push(key._replace(at=at + 1), np.setdiff1d(lanes, active, assume_unique=True))

    def _stand(self, compiled: _Compiled, key: _Key, at: int, lanes: Array) -> None:
        """Lanes come to a wait."""
        assert compiled.ready is not None
        self._threads.where = self._program.code[at].where
        on = compiled.ready(lanes)
        if on.any():
            compiled.step(lanes[on])
            self._push(key._replace(at=at + 1), lanes[on])
        if not on.all():
            self._standing.append(_Standing(key._replace(at=at), lanes[~on]))


def special_registers(program: Program, blocks: Sequence[tuple[int, ...]], grid: Sequence[int]) -> dict[str, Array]:
    """The read-only registers of the threads of ``blocks``, uint32."""
    thread = np.tile(np.arange(program.threads, dtype="u4"), len(blocks))
    lane, threads = thread % np.uint32(WARP), _one(program.threads)
    special: dict[str, Array] = {"%tid.x": thread, "%laneid": lane, "%ntid.x": threads}
    for axis, name in enumerate("xyz"):
        special[f"%ctaid.{name}"] = np.repeat(np.array([block[axis] for block in blocks], "u4"), program.threads)
        special[f"%nctaid.{name}"] = _one(grid[axis])
    for name in "yz":
        special |= {f"%tid.{name}": _one(0), f"%ntid.{name}": _one(1)}
    return special


def _one(number: int) -> Array:
    """A register that holds the same for every thread."""
    return np.array([number], "u4")
