"""mma.sync: products of matrices whose elements lie in the registers of a warp, in fragments that wgmma has as well.

Products of two numbers of half precision are exact in float32. How they are added is not known: PTX promises "at
least single precision", in any order, with any rounding (PTX ISA, "mma", Semantics). Here the sum is computed in
float64 and rounded once. In the worst case it errs by as much as PTX allows if each of the 16 additions of an
instruction cuts off what float32 does not hold, towards zero as tensor cores do: by 16 * 2^-23 of the sum of all
magnitudes. What is added to products that are all 0 stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepfusion.bench.ptx.arithmetic import from_bfloat16
from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.program import Instruction
from stepfusion.bench.ptx.registers import Source
from stepfusion.bench.ptx.threads import WARP, Threads
from stepfusion.bench.ptx.types import Array, Fault, Lanes

#: What a product and a sum of 16 may err by in the worst case, relative to the sum of the magnitudes of all addends.
SUM_ERROR = 16 * 2.0**-23
DEPTH = 16  # elements of half precision that one instruction multiplies along

_GROUP, _PLACE = np.arange(WARP) // 4, np.arange(WARP) % 4
_HALF = np.arange(2)


@dataclass(frozen=True)
class Matrices:
    """Matrices of many warps, float64 or float32 [..., rows, columns], and where they have holes, bool."""

    values: Array
    holes: Array

    def reshape(self, *shape: int) -> Matrices:
        """The same elements."""
        return Matrices(self.values.reshape(shape), self.holes.reshape(shape))


def elements(bits: Array, kind: str) -> Array:
    """Numbers of half precision from their bits."""
    return from_bfloat16(bits) if kind == "bf16" else bits.view("f2")


def multiply(a: Matrices, b: Matrices, c: Matrices, *, worst: bool) -> Matrices:
    """a b + c, float32 [..., m, n]. A hole spoils its row of ``a``, its column of ``b``, its element of ``c``."""
    product = a.values @ b.values
    total = product + c.values
    if worst:
        size = np.abs(a.values) @ np.abs(b.values)
        error = SUM_ERROR * np.where(size > 0, size + np.abs(c.values), 0)
        total = np.where(np.isfinite(total), total - np.sign(total) * error, total)
    holes = a.holes.any(-1, keepdims=True) | b.holes.any(-2, keepdims=True) | c.holes
    return Matrices(total.astype("f4"), holes)


def fragments_a(sources: Sequence[Source], kind: str, who: Array) -> Matrices:
    """Matrices of 16 x 16 elements from 4 registers of whole warps: [warps, 16, 16], rows first."""
    rows = (_GROUP + 8 * (np.arange(4) % 2)[:, None])[..., None] + 0 * _HALF
    columns = (2 * _PLACE + 8 * (np.arange(4) // 2)[:, None])[..., None] + _HALF
    return _halves(sources, kind, who, rows, columns, (DEPTH, DEPTH))


def fragments_b(sources: Sequence[Source], kind: str, who: Array) -> Matrices:
    """Matrices of 16 x 8 elements from 2 registers of whole warps, whose pairs follow one another along the 16."""
    rows = (2 * _PLACE + 8 * np.arange(2)[:, None])[..., None] + _HALF
    columns = _GROUP[:, None] + 0 * rows
    return _halves(sources, kind, who, rows, columns, (DEPTH, 8))


def _halves(
    sources: Sequence[Source], kind: str, who: Array, rows: Array, columns: Array, shape: tuple[int, int]
) -> Matrices:
    """Two elements in each register: register r of lane l holds those at ``rows`` and ``columns`` [r, l]."""
    values, holes = _registers(sources, who)
    result = Matrices(np.empty((len(values), *shape)), np.zeros((len(values), *shape), bool))
    result.values[:, rows, columns] = elements(values.view("u2").reshape(*values.shape, 2), kind)
    if holes is not None:
        result.holes[:, rows, columns] = holes.view("u2").reshape(*values.shape, 2) != 0
    return result


def _accumulator_places(registers: int) -> tuple[Array, Array]:
    """Rows and columns of 16 x n elements of float32, of register r of lane l [r, l]: four a lane for every 8."""
    register = np.arange(registers)[:, None]
    return _GROUP + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * _PLACE + register % 2


def accumulators(sources: Sequence[Source], who: Array) -> Matrices:
    """Matrices of 16 x n elements of float32, from n / 2 registers of whole warps: [warps, 16, n]."""
    values, holes = _registers(sources, who)
    rows, columns = _accumulator_places(len(sources))
    shape = (len(values), DEPTH, 2 * len(sources))
    result = Matrices(np.empty(shape, "f4"), np.zeros(shape, bool))
    result.values[:, rows, columns] = values.view("f4")
    if holes is not None:
        result.holes[:, rows, columns] = holes != 0
    return result


def store(threads: Threads, names: Sequence[object], matrices: Matrices, lanes: Lanes) -> None:
    """The inverse of :func:`accumulators`."""
    rows, columns = _accumulator_places(len(names))
    values = np.ascontiguousarray(matrices.values[:, rows, columns].transpose(1, 0, 2)).reshape(len(names), -1)
    holes = None
    if matrices.holes.any():
        holes = matrices.holes[:, rows, columns].transpose(1, 0, 2).reshape(len(names), -1) * np.uint32(2**32 - 1)
    for i, name in enumerate(names):
        threads.registers.target(name, "f32").write(lanes, values[i], None if holes is None else holes[i])


def _registers(sources: Sequence[Source], who: Array) -> tuple[Array, Array | None]:
    """Registers of whole warps, and their holes if there are any: uint32 [warps, registers, 32]."""

    def arranged(columns: list[Array]) -> Array:
        rows = np.stack([np.broadcast_to(column, who.shape) for column in columns])
        return np.ascontiguousarray(rows.reshape(len(columns), -1, WARP).transpose(1, 0, 2))

    values = arranged([source.read(who) for source in sources])
    found = [source.holes(who) for source in sources]
    if all(hole is None for hole in found):
        return values, None
    return values, arranged([np.zeros(1, "u4") if hole is None else hole for hole in found])


def compile_product(threads: Threads, instruction: Instruction, *, worst: bool) -> Step:
    """mma.sync of 16 x 8 x 16, half precision with sums in float32, by all lanes of a warp.

    PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
    """
    forms = {f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32": kind for kind in ("bf16", "f16")}
    operands = [arg for arg in instruction.args if isinstance(arg, tuple)]
    if instruction.op not in forms or len(instruction.args) != 4 or [len(arg) for arg in operands] != [4, 4, 2, 4]:
        raise Fault("unknown product of matrices")
    kind = forms[instruction.op]
    a, b, c = ([threads.registers.source(name, "b32") for name in names] for names in operands[1:])
    for name in operands[0]:
        threads.registers.target(name, "f32")

    def step(lanes: Lanes) -> None:
        who = threads.whole(lanes)
        factors = fragments_a(a, kind, who), fragments_b(b, kind, who)
        store(threads, operands[0], multiply(*factors, accumulators(c, who), worst=worst), lanes)

    return step
