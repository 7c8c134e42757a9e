"""wgmma: asynchronous products of matrices by the 128 threads of a warpgroup (PTX ISA, "Asynchronous Warpgroup Level
Matrix Multiply-Accumulate Instructions").

The result of a product is computed when it is issued, and kept from everybody until all is waited for: an access of a
register of a product in flight is a fault, and so is a write of shared memory that it reads. For the search for races
a warpgroup reads as two of its warps do, at every moment from the issue to the wait, so that any thread that writes
there meanwhile is another one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stepfusion.bench.ptx.asynchronous import Groups, number
from stepfusion.bench.ptx.descriptors import CHUNK, Descriptors, load
from stepfusion.bench.ptx.matrices import (
    DEPTH,
    Matrices,
    accumulators,
    fragments_a,
    multiply,
    store,
)
from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.program import Instruction, Operand, Program, operand_names
from stepfusion.bench.ptx.registers import Source
from stepfusion.bench.ptx.threads import WARP, Issue, Threads
from stepfusion.bench.ptx.types import Array, Fault, Lanes

WARPGROUP = 4 * WARP
_ROWS = 64
_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
_FENCED, _TOUCHED = 0, 1  # a product of n columns leaves 1 + n: another one of that size needs no fence


@dataclass(frozen=True)
class _Read:
    """Chunks of 16 bytes of shared memory that products in flight read.

    Attributes:
        lanes: the threads of each warpgroup [n, 128]. group: of each, counted from 0. chunks: addresses [n, c].
        content: uint8 [n, c, 16]. issue: of all threads.
    """

    lanes: Array
    group: Array
    chunks: Array
    content: Array
    issue: Issue

    def part(self, chosen: Array) -> _Read:
        """Some of them."""
        fences = self.issue.fences.reshape(-1, WARPGROUP)[chosen].reshape(-1)
        columns: dict[str, Any] = {n: getattr(self, n)[chosen] for n in ("lanes", "group", "chunks", "content")}
        return replace(self, issue=self.issue._replace(fences=fences), **columns)


@dataclass(frozen=True)
class _Product:
    """An instruction: type of A and B, registers, operands and signs."""

    columns: int
    kind: str
    out: tuple[str, ...]
    sums: list[Source]
    a: Source | list[Source]
    b: Source
    keep: Source
    signs: tuple[int, int]
    across: tuple[bool, bool]
    rows: Array  # of the registers in the table of what was touched


class Warpgroups:
    """The instructions of wgmma in a program, and what they keep of its registers and its shared memory.

    Args:
        worst: sums err by as much as PTX allows.
    """

    def __init__(self, threads: Threads, program: Program, *, worst: bool) -> None:
        self._threads, self._worst = threads, worst
        self._groups = Groups(len(threads.block))
        self._pending: list[_Read] = []
        self._whole = program.threads % WARPGROUP == 0
        products = [i.args for i in program.code if _PRODUCT.fullmatch(i.op)]
        names = dict.fromkeys(name for args in products for group in args[:2] for name in _tuple(group))
        self._rows = {name: row for row, name in enumerate(names)}
        shape = (len(names), len(threads.block))
        self._touched = np.full(shape, _TOUCHED, np.int16)  # since the last wgmma.fence
        self._last = np.zeros(shape, np.int32)  # which group uses it, counted from 1

    def compile(self, instruction: Instruction) -> Step:
        """An instruction of wgmma; that of a product is run by whole warpgroups, the others by whole warps."""
        op, args = instruction.op, instruction.args
        if op == "wgmma.fence.sync.aligned" and not args:
            return self._fence
        if op == "wgmma.commit_group.sync.aligned" and not args:
            return lambda lanes: self._groups.commit(self._threads.whole(lanes))
        if op == "wgmma.wait_group.sync.aligned" and len(args) == 1:
            newest = number(args[0], "the number of groups")
            return lambda lanes: self._wait(self._threads.whole(lanes), newest)
        product = self._product(instruction)
        return lambda lanes: self._multiply(product, lanes)

    def watched(self, instruction: Instruction, step: Step) -> Step:
        """The step of another instruction, which may not use the registers of a product in flight."""
        names = [name for name in operand_names(instruction.args) if name in self._rows]
        if not names:
            return step
        rows = np.array([self._rows[name] for name in names])

        def checked(lanes: Lanes) -> None:
            who = self._threads.lanes(lanes)
            self._check_idle(rows, who)
            self._touched[rows[:, None], who] = _TOUCHED
            step(lanes)

        return checked

    def finish(self) -> None:
        """The threads have ended: log what is in flight."""
        for read in self._pending:
            self._note(read)

    def _product(self, instruction: Instruction) -> _Product:
        match = _PRODUCT.fullmatch(instruction.op)
        if match is None:
            raise Fault("unknown instruction of a warpgroup")
        columns, args = int(match[1]), instruction.args
        in_registers = len(args) > 1 and isinstance(args[1], tuple)
        if columns % 8 or not 8 <= columns <= 256 or len(args) != 8 - in_registers or not self._whole:
            raise Fault("unknown product of a warpgroup")
        out, a, b, keep, *numbers = args
        if not isinstance(out, tuple) or len(out) != columns // 2 or (isinstance(a, tuple) and len(a) != 4):
            raise Fault("operands that do not fit")
        try:
            sign_a, sign_b, *turns = (int(str(n)) for n in numbers)
        except ValueError:
            raise Fault("signs and transpositions must be numbers") from None
        turns = [0] * in_registers + turns
        if not {sign_a, sign_b} <= {1, -1} or not set(turns) <= {0, 1}:
            raise Fault("unknown sign or transposition")
        source = self._threads.registers.source
        return _Product(
            *(columns, match[2], out),
            sums=[source(name, "b32") for name in out],
            a=[source(name, "b32") for name in a] if isinstance(a, tuple) else source(a, "b64"),
            b=source(b, "b64"),
            keep=source(keep, "pred"),
            signs=(sign_a, sign_b),
            across=(turns[0] == 1, turns[1] == 1),
            rows=np.array([self._rows[name] for name in (*out, *_tuple(a))]),
        )

    def _fence(self, lanes: Lanes) -> None:
        self._touched[:, self._threads.whole(lanes)] = _FENCED

    def _check_idle(self, rows: Array, lanes: Array) -> None:
        if (self._last[rows[:, None], lanes] > self._groups.complete[lanes]).any():
            raise Fault("a register of a wgmma that nobody waited for")

    def _multiply(self, product: _Product, lanes: Lanes) -> None:
        who = self._threads.whole(lanes, WARPGROUP)
        groups = len(who) // WARPGROUP
        self._order(product, who)
        sums = accumulators(product.sums, who).reshape(groups, _ROWS, product.columns)
        keep = _one(product.keep, who)[:, None, None] != 0
        sums = Matrices(np.where(keep, sums.values, np.float32(0)), keep & sums.holes)
        if isinstance(product.a, list):
            a = fragments_a(product.a, product.kind, who).reshape(groups, _ROWS, DEPTH)
        else:
            a = self._read(product.a, product.kind, _ROWS, who, across=product.across[0])
        b = self._read(product.b, product.kind, product.columns, who, across=product.across[1])
        turned = Matrices(b.values.transpose(0, 2, 1) * product.signs[1], b.holes.transpose(0, 2, 1))
        result = multiply(replace(a, values=a.values * product.signs[0]), turned, sums, worst=self._worst)
        store(self._threads, product.out, result.reshape(4 * groups, DEPTH, product.columns), lanes)

    def _order(self, product: _Product, who: Array) -> None:
        """Check that the registers may be used, and note that they are in flight."""
        cells = product.rows[:, None], who
        touched = self._touched[cells]
        if ((touched != _FENCED) & (touched != 1 + product.columns)).any():
            raise Fault("registers that were used, and no wgmma.fence since")
        self._touched[product.rows[: len(product.out), None], who] = 1 + product.columns
        self._last[cells] = self._groups.committed[who] + 1

    def _read(self, source: Source, kind: str, rows: int, who: Array, *, across: bool) -> Matrices:
        """A matrix in shared memory, of each warpgroup: [n, rows, 16]."""
        threads, lanes = self._threads, who.reshape(-1, WARPGROUP)
        chunks = Descriptors.of(_one(source, who)).chunks(rows, across=across)
        blocks, issue = threads.block[lanes[:, 0]], threads.issue(who)
        matrix, content = load(threads.shared, chunks, blocks, kind, rows, across=across)
        places = threads.shared.places(chunks.reshape(-1), np.repeat(blocks, chunks.shape[1]), CHUNK)
        threads.shared.hold(places)
        if threads.proxies is not None:
            threads.proxies.check(places.reshape(len(lanes), -1), lanes, threads.barriers)
        group = self._groups.committed[lanes[:, 0]]
        self._pending.append(_Read(lanes, group, chunks, content, issue))
        return matrix

    def _wait(self, lanes: Array, newest: int) -> None:
        """What a product reads is free once all warps of its warpgroup have waited."""
        self._groups.wait(lanes, newest)
        waiting = []
        for read in self._pending:
            done = self._groups.complete[read.lanes].min(axis=1) > read.group
            if done.any():
                self._release(read.part(done))
            if not done.all():
                waiting.append(read.part(~done) if done.any() else read)
        self._pending = waiting

    def _release(self, read: _Read) -> None:
        blocks = np.repeat(self._threads.block[read.lanes[:, 0]], read.chunks.shape[1])
        self._threads.shared.release(self._threads.shared.places(read.chunks.reshape(-1), blocks, CHUNK))
        self._note(read)

    def _note(self, read: _Read) -> None:
        fences = read.issue.fences.reshape(-1, WARPGROUP)
        count = read.chunks.shape[1]
        for lane in (0, WARP):
            lanes, since = (np.repeat(column[:, lane], count) for column in (read.lanes, fences))
            issue = read.issue._replace(fences=since)
            content = read.content.reshape(-1, CHUNK)
            self._threads.note("shared", False, read.chunks.reshape(-1), content, lanes, issue)


def _tuple(operand: Operand) -> tuple[str, ...]:
    """The registers of an operand that is several; a single one holds a descriptor."""
    return operand if isinstance(operand, tuple) else ()


def _one(source: Source, who: Array) -> Array:
    """An operand that must be the same for all threads of a warpgroup; one value for each."""
    if source.holes(who) is not None:
        raise Fault("a descriptor or a predicate that depends on what nobody wrote")
    values = np.broadcast_to(source.read(who), who.shape).reshape(-1, WARPGROUP)
    if (values != values[:, :1]).any():
        raise Fault("a descriptor or a predicate that the threads of a warpgroup do not agree on")
    return values[:, 0]
