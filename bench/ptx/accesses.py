"""Loads and stores, shuffles, elections, matrices: what passes between threads and memory, or threads of a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.program import Address, Instruction
from stepfusion.bench.ptx.threads import WARP, Threads
from stepfusion.bench.ptx.types import TYPES, Array, Fault, Lanes, bits

#: Modifiers that change what is cached, or how accesses are ordered between threads, and no value that one reads.
_HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "weak", "relaxed", "cta", "gpu", "sys"} | {
    f"L{level}::{hint}"
    for level in (1, 2)
    for hint in (
        *("evict_first", "evict_last", "evict_normal", "evict_unchanged"),
        *("no_allocate", "cache_hint", "64B", "128B", "256B"),
    )
}
_SPACES = ("param", "global", "shared")


def compile_access(threads: Threads, instruction: Instruction) -> Step:
    """ld and st of global, shared and parameter memory."""
    base, *parts = instruction.op.split(".")
    kinds = [p for p in parts if p in TYPES]
    words = [p for p in parts if p not in TYPES]
    spaces = [w for w in words if w in _SPACES]
    vectors = [w for w in words if w in ("v2", "v4", "v8")]
    hints = set(words) - {*spaces, *vectors}
    if len(spaces) != 1 or len(kinds) != 1 or len(vectors) > 1:
        raise Fault("a generic address, or an unknown form")
    if unknown := hints - _HINTS:
        raise Fault(f"unknown {', '.join(sorted(unknown))}")
    operands = instruction.args[: 2 + ("L2::cache_hint" in hints)]
    moved, address = (operands[1], operands[0]) if base == "st" else (operands[0], operands[1])
    registers = moved if isinstance(moved, tuple) else (moved,)
    fits = len(registers) == int(vectors[0][1:] if vectors else 1) and len(operands) == len(instruction.args)
    if not isinstance(address, Address) or not fits:
        raise Fault("operands that do not fit")
    if spaces[0] == "param":
        return _parameter(threads, base, kinds[0], registers, address)
    compiled = _store if base == "st" else _load
    return compiled(threads, spaces[0], kinds[0], registers, address)


def _parameter(threads: Threads, base: str, kind: str, registers: Sequence[object], address: Address) -> Step:
    if address.offset or base == "st" or len(registers) != 1 or address.base not in threads.parameters:
        raise Fault("unknown parameter")
    bits_of_it = np.array([threads.parameters[address.base]], "u8")
    value, target = bits_of_it.view(TYPES[kind])[:1], threads.registers.target(registers[0], kind)
    return lambda lanes: target.write(lanes, value, None)


def addresses_of(threads: Threads, address: Address) -> Callable[[Array], Array]:
    """The addresses of lanes, uint64."""
    base = threads.registers.source(address.base, threads.registers.width(address.base))
    offset = np.uint64(address.offset % 2**64)

    def read(lanes: Array) -> Array:
        if base.holes(lanes) is not None:
            raise Fault("an address that depends on what nobody wrote")
        return np.broadcast_to(base.read(lanes), lanes.shape).astype(np.uint64) + offset

    return read


def _load(threads: Threads, space: str, kind: str, registers: Sequence[object], address: Address) -> Step:
    addresses, dtype = addresses_of(threads, address), TYPES[kind]
    targets = [threads.registers.target(register, kind) for register in registers]

    def step(lanes: Lanes) -> None:
        who = threads.lanes(lanes)
        values, holes = threads.load(space, addresses(who), dtype.itemsize, len(targets), who)
        for i, target in enumerate(targets):
            column = np.ascontiguousarray(values[:, i]).view(dtype)
            target.write(lanes, column, None if holes is None else holes[:, i])

    return step


def _store(threads: Threads, space: str, kind: str, registers: Sequence[object], address: Address) -> Step:
    addresses = addresses_of(threads, address)
    sources = [threads.registers.source(register, bits(kind)) for register in registers]

    def step(lanes: Lanes) -> None:
        who = threads.lanes(lanes)
        values = np.stack([np.broadcast_to(source.read(who), who.shape) for source in sources], axis=1)
        found = [source.holes(who) for source in sources]
        holes = None
        if any(hole is not None for hole in found):
            holes = np.stack([np.zeros(who.shape, values.dtype) if hole is None else hole for hole in found], axis=1)
        threads.store(space, addresses(who), values, holes, who)

    return step


def compile_shuffle(threads: Threads, instruction: Instruction) -> Step:
    """shfl.sync, by all lanes of a warp: up, down, bfly and idx, in segments."""
    words = instruction.op.split(".")[1:]
    if words[:1] != ["sync"] or words[2:] != ["b32"] or words[1] not in _SOURCES or len(instruction.args) != 5:
        raise Fault("unknown shuffle")
    how, (out, *operands) = words[1], instruction.args
    value, by, limit, members = (threads.registers.source(operand, "b32") for operand in operands)
    target = threads.registers.target(out, "b32")

    def step(lanes: Lanes) -> None:
        who = threads.whole(lanes)
        if (members.read(who) != 0xFFFFFFFF).any() or any(s.holes(who) is not None for s in (by, limit, members)):
            raise Fault("a shuffle whose lanes are not all named, or depend on what nobody wrote")
        lane = who % WARP
        offset, clamp = (np.broadcast_to(s.read(who), lane.shape).astype(np.int64) for s in (by, limit))
        places = np.arange(len(who)) - lane + _source_lane(how, lane, offset & 31, clamp)
        hole = value.holes(who)
        shuffled = np.broadcast_to(value.read(who), who.shape)[places]
        target.write(lanes, shuffled, None if hole is None else np.broadcast_to(hole, who.shape)[places])

    return step


def compile_elect(threads: Threads, instruction: Instruction) -> Step:
    """elect.sync, by all lanes of a warp: the lowest of them is elected."""
    results = instruction.args[0] if len(instruction.args) == 2 else None
    if instruction.op != "elect.sync" or not isinstance(results, tuple) or len(results) != 2:
        raise Fault("unknown election")
    lane, elected = threads.registers.target(results[0], "b32"), threads.registers.target(results[1], "pred")
    members = threads.registers.source(instruction.args[1], "b32")

    def step(lanes: Lanes) -> None:
        who = threads.whole(lanes)
        if (members.read(who) != 0xFFFFFFFF).any() or members.holes(who) is not None:
            raise Fault("an election whose lanes are not all named, or depend on what nobody wrote")
        lane.write(lanes, np.zeros(who.shape, "u4"), None)
        elected.write(lanes, who % WARP == 0, None)

    return step


_SOURCES = ("up", "down", "bfly", "idx")


def _source_lane(how: str, lane: Array, offset: Array, clamp: Array) -> Array:
    """The lane from which each lane reads; its own if that one lies outside its segment (PTX manual, shfl.sync)."""
    segment = clamp >> 8 & 31
    lowest, last = lane & segment, (lane & segment) | (clamp & 31 & ~segment)
    if how == "up":
        source = lane - offset
        return np.where(source >= last, source, lane)
    source = {"down": lane + offset, "bfly": lane ^ offset, "idx": lowest | (offset & ~segment)}[how]
    return np.where(source <= last, source, lane)


def compile_matrix(threads: Threads, instruction: Instruction) -> Step:
    """ldmatrix and stmatrix of 8 x 8 elements of 16 bits.

    Row r of matrix k lies at the address of lane 8 k + r, in the k-th register of lanes 4 r .. 4 r + 3, two elements
    each; with .trans, of the matrix transposed.
    """
    base, *words = instruction.op.split(".")
    load = base == "ldmatrix"
    operands = instruction.args if load else instruction.args[::-1]
    registers, address = operands if len(operands) == 2 else ((), None)
    if not isinstance(registers, tuple) or not isinstance(address, Address):
        raise Fault("unknown matrix")
    transposed = "trans" in words
    if words != ["sync", "aligned", "m8n8", f"x{len(registers)}", *["trans"] * transposed, "shared", "b16"]:
        raise Fault("unknown matrix")
    turned = _transposed if transposed else lambda words: words
    addresses = addresses_of(threads, address)
    targets = [threads.registers.target(register, "b32") for register in registers if load]
    sources = [threads.registers.source(register, "b32") for register in registers if not load]

    def rows(who: Array, k: int) -> tuple[Array, Array]:
        """The addresses of matrix ``k``, and the lanes that give them."""
        where, givers = (v.reshape(-1, WARP)[:, 8 * k : 8 * k + 8].reshape(-1) for v in (addresses(who), who))
        return where, givers

    def step(lanes: Lanes) -> None:
        who = threads.whole(lanes)
        for k, target in enumerate(targets):
            where, givers = rows(who, k)
            values, holes = threads.load("shared", where, 4, 4, givers)
            target.write(lanes, turned(values).reshape(-1), None if holes is None else turned(holes).reshape(-1))
        for k, source in enumerate(sources):
            where, givers = rows(who, k)
            hole = source.holes(who)
            values = turned(np.broadcast_to(source.read(who), who.shape).reshape(-1, 4))
            holes = None if hole is None else turned(np.broadcast_to(hole, who.shape).reshape(-1, 4))
            threads.store("shared", where, values, holes, givers)

    return step


def _transposed(words: Array) -> Array:
    """Matrices of 8 x 8 elements of 16 bits, as words [8 matrices, 4], each with rows and columns exchanged."""
    elements = np.ascontiguousarray(words).view("u2").reshape(-1, 8, 8)
    return np.ascontiguousarray(elements.transpose(0, 2, 1)).reshape(-1, 8).view(words.dtype)
