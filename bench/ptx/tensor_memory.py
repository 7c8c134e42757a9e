"""Tensor memory: 128 lanes x 512 columns of 32 bits for each block (PTX ISA, "Tensor Memory").

An address has its lane in the upper 16 bits and its column in the lower. Blocks are given columns from the last on,
so that nobody gets by with an address that is not the allocated one. Warp w reaches lanes 32 (w % 4) to 31 further
on. What nobody has written is a hole. A load or a store goes on until its warp waits for it: what it writes may not
be used before, and another warp needs a bar.sync as well; a tcgen05.fence is not asked for, which Triton leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from stepfusion.bench.ptx.accesses import addresses_of
from stepfusion.bench.ptx.asynchronous import number
from stepfusion.bench.ptx.matrices import Matrices
from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.ordering import Completion, Uses
from stepfusion.bench.ptx.program import Address, Instruction, Operand, Program, operand_names
from stepfusion.bench.ptx.threads import WARP, Threads
from stepfusion.bench.ptx.types import Array, Fault, Lanes

LANES, COLUMNS = 128, 512
_HALF = 16  # lanes that are used together
_HALVES = LANES // _HALF
_MOVE = re.compile(r"tcgen05\.(ld|st)\.sync\.aligned\.(32x32b|16x32bx2)\.x(1|2|4|8|16|32|64|128)\.b32")
_ALLOCATE = "tcgen05.alloc.cta_group::1.sync.aligned.shared.b32"
_FREE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32"
_KEEP = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned"


class _Places(NamedTuple):
    """What a move of whole warps touches: block of each [n, 1, 1], lane [n, 32, 1], column [n, 32, registers]."""

    block: Array
    lane: Array
    column: Array

    @property
    def elements(self) -> tuple[Array, Array, Array]:
        """Of arrays [blocks, columns, lanes]."""
        return self.block, self.column, self.lane

    @property
    def halves(self) -> _Places:
        """One lane for every 16."""
        return self._replace(lane=self.lane[:, ::_HALF], column=self.column[:, ::_HALF])


class _Move(NamedTuple):
    """A load or a store of warps [n] that goes on, and the cells that it uses [n, c]."""

    warps: Array
    cells: Array


class TensorMemory:
    """The tensor memory of some blocks, and the instructions that allocate, load and store it."""

    def __init__(self, threads: Threads, program: Program, completion: Completion) -> None:
        self._threads, self._completion = threads, completion
        self._warps = program.threads // WARP
        blocks = int(threads.block[-1]) + 1
        shape = (blocks, COLUMNS, LANES)
        self._values, self._closed = np.zeros(shape, "u4"), np.zeros(shape, "u4")  # closed: bits that are no holes
        self._owner = np.zeros((blocks, COLUMNS), np.int64)  # the number of the allocation, from 1
        self._allocations = 0
        self._closing = np.zeros(blocks, bool)  # no more allocations
        cells = blocks * COLUMNS * _HALVES
        self._stored, self._loaded = Uses(cells), Uses(cells)
        self._product, self._shape = np.zeros(cells, np.int64), np.zeros(cells, np.int64)  # the last, and its form
        self._moves: dict[str, list[_Move]] = {"ld": [], "st": []}
        names = dict.fromkeys(name for i in program.code for name in _loaded(i))
        self._rows = {name: row for row, name in enumerate(names)}
        self._loading = np.zeros((len(names), len(threads.block)), bool)

    def compile(self, instruction: Instruction) -> Step:
        """``tcgen05.alloc``, ``.dealloc``, ``.relinquish_alloc_permit``, ``.ld``, ``.st`` and ``.wait``."""
        op, args = instruction.op, instruction.args
        if op in ("tcgen05.wait::ld.sync.aligned", "tcgen05.wait::st.sync.aligned") and not args:
            kind = op.split("::")[1][:2]
            return lambda lanes: self._wait(kind, self._threads.whole(lanes))
        if op == _KEEP and not args:
            return self._relinquish
        if op in (_ALLOCATE, _FREE) and len(args) == 2:
            return self._compile_columns(op, args)
        match = _MOVE.fullmatch(op)
        if match is None:
            raise Fault("unknown instruction of tensor memory")
        return self._compile_move((match[1], match[2], int(match[3])), args)

    def watched(self, instruction: Instruction, step: Step) -> Step:
        """The step of another instruction, which may not use the registers of a load that goes on."""
        rows = np.array(
            [self._rows[name] for name in operand_names(instruction.args) if name in self._rows], np.int64
        )
        if not len(rows):
            return step

        def checked(lanes: Lanes) -> None:
            self._check_idle(rows, self._threads.lanes(lanes))
            step(lanes)

        return checked

    def finish(self) -> None:
        """The threads have ended.

        Raises:
            Fault: something is still allocated.
        """
        if self._owner.any():
            raise Fault("tensor memory that is still allocated at the end of its block")

    # Matrices that products add to

    def begin_product(
        self, lanes: Array, addresses: Array, size: tuple[int, int], keep: Array
    ) -> tuple[Matrices, Callable[[Matrices, Array], None]]:
        """The sums [n, rows, columns] that products of threads [n] add to: those that are there where ``keep`` holds.

        Also what writes the new ones, float32, for products of given numbers. Row r lies in lane r, or, of 64 rows,
        16 lie in each warp's lanes (PTX ISA, "Data Path Layout Organization", layouts D and F). Products of one shape
        on one matrix follow one another; before anything else the thread must know that the last is complete.
        """
        rows, columns = size
        first, column = addresses >> np.uint64(16), (addresses & np.uint64(0xFFFF)).astype(np.int64)
        if not np.isin(first, (0,) if rows == LANES else (0, _HALF)).all():
            raise Fault("sums of a product that begin in a lane they must not")
        row = np.arange(rows)
        within = row if rows == LANES else row // _HALF * WARP + row % _HALF
        block = self._threads.block[lanes]
        places = _Places(
            *(block[:, None, None], (first.astype(np.int64)[:, None] + within)[:, :, None]),
            column=column[:, None, None] + np.arange(columns) + 0 * row[:, None],
        )
        self._check_allocated(places)
        cells = self._cells(places.halves)
        form = (addresses.astype(np.int64) * 2 + (rows == LANES)) * COLUMNS + columns
        follows = self._shape[cells] == form[:, None]
        known = np.where(follows, np.iinfo(np.int64).max, self._completion.known[lanes, None])
        self._check(cells, lanes // WARP, known)
        self._check_loads(cells, lanes // WARP)
        index = places.elements
        sums = Matrices(np.zeros((len(lanes), *size), "f4"), np.zeros((len(lanes), *size), bool))
        if keep.any():
            kept = keep[:, None, None]
            values = np.where(kept, self._values[index].view("f4"), sums.values)
            sums = Matrices(values, kept & (~self._closed[index] != 0))

        def write(result: Matrices, numbers: Array) -> None:
            self._values[index] = result.values.view("u4")
            self._closed[index] = np.where(result.holes, 0, np.uint32(2**32 - 1))
            self._product[cells], self._shape[cells] = numbers[:, None], form[:, None]

        return sums, write

    # Allocation

    def _compile_columns(self, op: str, args: tuple[Operand, ...]) -> Step:
        count = number(args[1], "the number of columns")
        if count not in (32, 64, 128, 256, 512):
            raise Fault(f"{count} columns of tensor memory, which are no power of two from 32 on")
        if op == _ALLOCATE:
            if not isinstance(args[0], Address):
                raise Fault("operands that do not fit")
            addresses = addresses_of(self._threads, args[0])
            return lambda lanes: self._allocate(self._threads.whole(lanes), addresses, count)
        addresses = addresses_of(self._threads, Address(str(args[0]), 0))
        return lambda lanes: self._free(self._threads.whole(lanes), addresses, count)

    def _allocate(self, who: Array, addresses: Callable[[Array], Array], count: int) -> None:
        leaders, targets = who[::WARP], _one(addresses(who))
        starts = [self._reserve(block, count) for block in self._threads.block[leaders]]
        self._threads.store("shared", targets, np.array(starts, "u4")[:, None], None, leaders)

    def _reserve(self, block: int, count: int) -> int:
        """The first of ``count`` columns that are free."""
        if self._closing[block]:
            raise Fault("a tcgen05.alloc behind a tcgen05.relinquish_alloc_permit")
        starts = range(COLUMNS - count, -1, -count)
        start = next((s for s in starts if not self._owner[block, s : s + count].any()), None)
        if start is None:
            raise Fault(f"{count} columns of tensor memory that are not there")
        self._allocations += 1
        self._owner[block, start : start + count] = self._allocations
        return start

    def _free(self, who: Array, addresses: Callable[[Array], Array], count: int) -> None:
        """Nothing in the columns may still be used."""
        leaders, starts = who[::WARP], _one(addresses(who)).astype(np.int64)
        blocks = self._threads.block[leaders]
        columns = starts[:, None] + np.arange(count)
        owner = self._owner[blocks[:, None], columns] if (columns < COLUMNS).all() else np.zeros((1, 1))
        edges = np.stack([starts - 1, starts + count])
        beyond = (edges >= 0) & (edges < COLUMNS) & (self._owner[blocks, edges % COLUMNS] == owner[:, 0])
        if not owner.all() or (owner != owner[:, :1]).any() or beyond.any():
            raise Fault("a tcgen05.dealloc of what was not allocated together")
        everywhere = _Places(blocks[:, None, None], np.arange(0, LANES, _HALF)[None, :, None], columns[:, None, :])
        cells = self._cells(everywhere)
        self._check(cells, leaders // WARP, self._known(who))
        self._check_loads(cells, leaders // WARP)
        self._owner[blocks[:, None], columns] = 0
        self._closed[blocks[:, None], columns] = 0

    def _relinquish(self, lanes: Lanes) -> None:
        self._closing[self._threads.block[self._threads.whole(lanes)]] = True

    # Loads and stores

    def _compile_move(self, form: tuple[str, str, int], args: tuple[Operand, ...]) -> Step:
        kind, shape, count = form
        split, operands = 0, list(args)
        if shape == "16x32bx2" and len(operands) == 3:
            split = number(operands.pop(2 if kind == "ld" else 1), "the offset of the second half")
        names, address = (operands if kind == "ld" else operands[::-1]) if len(operands) == 2 else ((), "")
        if not isinstance(names, tuple) or not isinstance(address, Address):
            raise Fault("operands that do not fit")
        if len(names) != count or (shape == "16x32bx2") != (len(args) == 3):
            raise Fault("operands that do not fit")
        addresses = addresses_of(self._threads, address)

        def places(who: Array) -> _Places:
            return self._places(_one(addresses(who)), who, len(names), None if shape == "32x32b" else split)

        return (self._load if kind == "ld" else self._store)(names, places)

    def _load(self, names: tuple[str, ...], places: Callable[[Array], _Places]) -> Step:
        targets = [self._threads.registers.target(name, "b32") for name in names]
        rows = np.array([self._rows[name] for name in names])

        def step(lanes: Lanes) -> None:
            who = self._threads.whole(lanes)
            where = places(who)
            cells = self._cells(where.halves)
            self._check_idle(rows, who)
            self._check(cells, who[::WARP] // WARP, self._known(who))
            self._loaded.begin(cells)
            self._moves["ld"].append(_Move(who[::WARP] // WARP, cells))
            self._loading[rows[:, None], who] = True
            values, holes = self._values[where.elements], ~self._closed[where.elements]
            for i, target in enumerate(targets):
                hole = holes[:, :, i].reshape(-1)
                target.write(lanes, values[:, :, i].reshape(-1), hole if hole.any() else None)

        return step

    def _store(self, names: tuple[str, ...], places: Callable[[Array], _Places]) -> Step:
        sources = [self._threads.registers.source(name, "b32") for name in names]

        def step(lanes: Lanes) -> None:
            who = self._threads.whole(lanes)
            where = places(who)
            cells = self._cells(where.halves)
            self._check(cells, who[::WARP] // WARP, self._known(who))
            self._check_loads(cells, who[::WARP] // WARP)
            self._stored.begin(cells)
            self._moves["st"].append(_Move(who[::WARP] // WARP, cells))
            for i, source in enumerate(sources):
                index = (where.block[..., 0], where.column[..., i], where.lane[..., 0])
                hole = source.holes(who)
                holes = np.zeros(1, "u4") if hole is None else hole
                self._values[index] = np.broadcast_to(source.read(who), who.shape).reshape(-1, WARP)
                self._closed[index] = ~np.broadcast_to(holes, who.shape).reshape(-1, WARP)

        return step

    def _places(self, addresses: Array, who: Array, count: int, split: int | None) -> _Places:
        """Where the registers of warps lie (PTX ISA, "Matrix fragments for shape .32x32b" and ".16x32bx2").

        Of the first, lane l of a warp has a lane of its own; of the second, lanes 16 to 31 have those of lanes 0 to
        15, ``split`` columns further on.
        """
        first, column = (
            (addresses >> np.uint64(16)).astype(np.int64),
            (addresses & np.uint64(0xFFFF)).astype(np.int64),
        )
        own = who[::WARP] // WARP % self._warps % 4 * WARP
        lane = np.arange(WARP)
        if ((first - own < 0) | (first - own >= WARP)).any():
            raise Fault("lanes of tensor memory that belong to another warp")
        if ((first - own) % (WARP if split is None else _HALF)).any():
            raise Fault("a lane of tensor memory that such an access cannot begin in")
        within, further = (lane, 0 * lane) if split is None else (lane % _HALF, lane // _HALF * split)
        lanes = first[:, None] + within
        columns = (column[:, None] + further)[:, :, None] + np.arange(count)
        places = _Places(self._threads.block[who[::WARP]][:, None, None], lanes[:, :, None], columns)
        self._check_allocated(places)
        return places._replace(column=columns)

    def _wait(self, kind: str, who: Array) -> None:
        """The loads or the stores of warps are over."""
        warps, uses = who[::WARP] // WARP, self._loaded if kind == "ld" else self._stored
        left = []
        for move in self._moves[kind]:
            over = np.isin(move.warps, warps)
            uses.end(move.cells[over], move.warps[over][:, None], self._threads.barriers)
            if not over.all():
                left.append(_Move(move.warps[~over], move.cells[~over]))
        self._moves[kind] = left
        if kind == "ld":
            self._loading[:, who] = False

    # What may be used

    def _cells(self, places: _Places) -> Array:
        """The cells of 16 lanes x 1 column, [n, c]."""
        cells = (places.block * COLUMNS + places.column) * _HALVES + places.lane // _HALF
        return np.asarray(cells.reshape(len(cells), -1))

    def _known(self, who: Array) -> Array:
        """Up to which product all threads of each warp know, [warps, 1]."""
        return np.asarray(self._completion.known[who].reshape(-1, WARP).min(axis=1)[:, None])

    def _check_allocated(self, places: _Places) -> None:
        inside = places.column < COLUMNS
        if not inside.all() or not self._owner[places.block, places.column].all():
            raise Fault("tensor memory that is not allocated")

    def _check(self, cells: Array, warps: Array, known: Array) -> None:
        """Nothing that writes the cells goes on, for all that warps know."""
        if (self._product[cells] > known).any():
            raise Fault("tensor memory that a tcgen05.mma writes, and the thread does not know that it is complete")
        if not self._stored.settled(cells, warps[:, None], self._threads.barriers).all():
            raise Fault(
                "tensor memory of a tcgen05.st, and no tcgen05.wait::st, or no barrier to another warp, since"
            )

    def _check_loads(self, cells: Array, warps: Array) -> None:
        if not self._loaded.settled(cells, warps[:, None], self._threads.barriers).all():
            raise Fault(
                "tensor memory of a tcgen05.ld, and no tcgen05.wait::ld, or no barrier to another warp, since"
            )

    def _check_idle(self, rows: Array, who: Array) -> None:
        if self._loading[rows[:, None], who].any():
            raise Fault("a register of a tcgen05.ld, and no tcgen05.wait::ld since")


def _loaded(instruction: Instruction) -> Iterable[str]:
    """The registers that an instruction loads from tensor memory."""
    out = instruction.args[0] if instruction.op.startswith("tcgen05.ld") and instruction.args else ()
    return out if isinstance(out, tuple) else ()


def _one(addresses: Array) -> Array:
    """An address that all threads of a warp must give, one for each."""
    rows = addresses.reshape(-1, WARP)
    if (rows != rows[:, :1]).any():
        raise Fault("an address that the threads of a warp do not agree on")
    return rows[:, 0]
