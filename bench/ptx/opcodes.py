"""The instructions that compute a thread's value from its own registers: a table, and the forms of mov, cvt and setp.

An opcode is its name and modifiers without types (``mul.wide``, ``max.NaN``, ``add.rn``): what is not in a table is
an error, so that no modifier is passed over.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from stepfusion.bench.ptx import arithmetic as a
from stepfusion.bench.ptx import holes as h
from stepfusion.bench.ptx.program import Instruction
from stepfusion.bench.ptx.registers import Registers, Source
from stepfusion.bench.ptx.types import FLOATS, INTEGERS, TYPES, Array, Fault, Lanes, bits

Step: TypeAlias = Callable[[Lanes], None]


@dataclass(frozen=True)
class Operation:
    """What an opcode does.

    Attributes:
        operands: their types, a letter each: t the instruction's, w twice as wide, u u32, p a predicate.
        function: of the operands' values. rule: how holes travel. wide: so is the result's type.
    """

    operands: str
    function: a.Function
    rule: h.Rule = h.spoil
    wide: bool = False


def _moving(operands: str, function: a.Function, data: str) -> Operation:
    return Operation(operands, function, h.move(function, [letter == "t" for letter in data]))


def _select(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


#: Opcodes of integers, of bits and of predicates.
INTEGER: dict[str, Operation] = {
    "add": Operation("tt", operator.add),
    "sub": Operation("tt", operator.sub),
    "neg": Operation("t", operator.neg),
    "abs": Operation("t", np.abs),
    "min": Operation("tt", np.minimum),
    "max": Operation("tt", np.maximum),
    "mul.lo": Operation("tt", operator.mul),
    "mul.hi": Operation("tt", a.multiply_high),
    "mul.wide": Operation("tt", a.multiply_wide, wide=True),
    "mad.lo": Operation("ttt", lambda x, y, z: x * y + z),
    "mad.wide": Operation("ttw", lambda x, y, z: a.multiply_wide(x, y) + z, wide=True),
    "div": Operation("tt", a.divide(remainder=False)),
    "rem": Operation("tt", a.divide(remainder=True)),
    "and": Operation("tt", operator.and_, h.conjunction),
    "or": Operation("tt", operator.or_, h.disjunction),
    "xor": Operation("tt", operator.xor, h.union),
    "not": Operation("t", operator.invert, h.union),
    "lop3": Operation("tttt", a.logic3),
    "shl": _moving("tu", a.shift_left, "tu"),
    "shr": _moving("tu", a.shift_right, "tu"),
    "prmt": _moving("ttt", a.permute_bytes, "ttu"),
    "bfe": Operation("tuu", a.extract_bits),
    "bfi": Operation("ttuu", a.insert_bits),
    "selp": Operation("ttp", _select, h.choice),
} | {
    f"shf.{side}.{mode}": _moving("ttu", a.funnel_shift(left=side == "l", wrap=mode == "wrap"), "ttu")
    for side in "lr"
    for mode in ("wrap", "clamp")
}

#: Opcodes of two integers of 16 bits in one word.
_PAIRED_INTEGER = {
    name: Operation("tt", a.on_halves(getattr(operator, name)), h.spoil_each_half) for name in ("add", "sub")
}

#: Opcodes of half precision, of one number and of two in one word.
_HALF = {
    (kind, f"{name}{mode}"): Operation("ttt" if name == "fma" else "tt", a.in_half(name, kind))
    for kind in ("f16", "bf16")
    for name in ("add", "sub", "mul", "fma")
    for mode in (("", ".rn") if name != "fma" else (".rn",))
}
_PAIRED_HALF = {
    (f"{kind}x2", opcode): Operation(operation.operands, a.on_halves(operation.function), h.spoil_each_half)
    for (kind, opcode), operation in _HALF.items()
}

_SUMS = {name: Operation("tt", getattr(operator, name)) for name in ("add", "sub", "mul")}
#: Sums and products; and those of float32 that exist for two at once, all but mul with operands of half precision.
_ROUNDED = _SUMS | {f"{name}.rn": operation for name, operation in _SUMS.items()}
_PAIRED = _ROUNDED | {"fma.rn": Operation("ttt", a.fma)}
#: Opcodes of float64.
DOUBLE: dict[str, Operation] = _ROUNDED | {"neg": Operation("t", operator.neg)}


def _extremes() -> dict[str, Operation]:
    """max and min of two float32, and of three; with .NaN, or without; of two, with .xorsign.abs as well."""
    found = {}
    for name in ("max", "min"):
        for mode in ("", ".NaN"):
            pick = a.extreme(largest=name == "max", keep_nan=mode == ".NaN")
            found[f"{name}{mode}"] = Operation("tt", pick)
            found[f"{name}{mode}.xorsign.abs"] = Operation("tt", a.sign_apart(pick))
            found[f"{name}{mode} of 3"] = Operation("ttt", lambda x, y, z, pick=pick: pick(pick(x, y), z))
    return found


#: Opcodes of float32. For each, ``.ftz`` is accepted as well.
FLOAT: dict[str, Operation] = (
    _PAIRED | _extremes() | {"neg": Operation("t", operator.neg), "abs": Operation("t", np.abs)}
)
_APPROXIMATE = {"ex2.approx", "rsqrt.approx", "rcp.approx", "rcp.rn", "sqrt.approx", "sqrt.rn", "lg2.approx"}
_QUOTIENTS = {"div.full", "div.approx", "div.rn"}


class Compiler:
    """Turns instructions into functions of the lanes that run them.

    Args:
        registers: of the threads. approximations: what approximate instructions compute; kept by that name.
    """

    def __init__(self, registers: Registers, approximations: a.Approximations) -> None:
        self._registers, self.approximations = registers, approximations

    def compile(self, instruction: Instruction) -> Step:
        """The function of an instruction that is neither a jump, an access nor a synchronisation.

        Raises:
            Fault: the opcode, a modifier or a form of operands is not known.
        """
        base, *parts = instruction.op.split(".")
        kinds = [p for p in parts if p in TYPES]
        words = [p for p in parts if p not in TYPES]
        if base == "mov":
            return self._move(instruction, words, kinds)
        if base == "cvt":
            return self._convert(words, kinds, instruction.args)
        if base == "setp":
            return self._compare(words, kinds, instruction.args)
        return self._computed(base, words, kinds, instruction.args)

    def _mapped(self, function: a.Function, rule: h.Rule, out: object, kind: str, sources: Sequence[Source]) -> Step:
        """``out = function(*sources)``, with the holes that ``rule`` gives it."""
        target = self._registers.target(out, kind)
        width = 0 if kind == "pred" else TYPES[kind].itemsize // (2 if kind == "f32x2" else 1)

        def step(lanes: Lanes) -> None:
            values = [source.read(lanes) for source in sources]
            holes = [source.holes(lanes) for source in sources]
            spoilt = any(hole is not None for hole in holes)
            target.write(lanes, function(*values), rule(values, holes, width) if spoilt else None)

        return step

    def _computed(self, base: str, words: list[str], kinds: list[str], args: Sequence[object]) -> Step:
        if base == "createpolicy":  # a hint for the cache: 64 bits that nothing here looks at
            return self._mapped(lambda: np.zeros(1, np.uint64), h.union, args[0], "b64", [])
        opcode = ".".join([base, *(word for word in words if word != "ftz")])
        if base in ("max", "min") and len(args) == 4:
            opcode += " of 3"
        operation, kind, types = self._typed(opcode, kinds, flush="ftz" in words)
        if len(args) != 1 + len(types):
            raise Fault(f"{len(args) - 1} operands instead of {len(types)}")
        sources = [self._registers.source(arg, k) for arg, k in zip(args[1:], types, strict=True)]
        return self._mapped(operation.function, operation.rule, args[0], kind, sources)

    def _typed(self, opcode: str, kinds: list[str], *, flush: bool) -> tuple[Operation, str, list[str]]:
        """The operation, the type of its result, and those of its operands."""
        if opcode == "selp" and len(kinds) == 1 and not flush:
            return _integer(opcode, bits(kinds[0]))
        if kinds == ["f32"]:
            operation = self._float(opcode)
            if flush:
                operation = Operation(operation.operands, a.flushed(operation.function))
            return operation, "f32", ["f32"] * len(operation.operands)
        if flush:
            raise Fault("unknown instruction")
        if kinds == ["f64"] and opcode in DOUBLE:
            return DOUBLE[opcode], "f64", ["f64"] * len(DOUBLE[opcode].operands)
        if kinds == ["f32x2"] and opcode in _PAIRED:
            return _PAIRED[opcode], "f32x2", ["f32x2"] * len(_PAIRED[opcode].operands)
        if kinds in (["f32", "f16"], ["f32", "bf16"]) and opcode in _PAIRED and not opcode.startswith("mul"):
            mixed = _mixed(_PAIRED[opcode])
            return mixed, "f32", [kinds[1]] * (len(mixed.operands) - 1) + ["f32"]
        if len(kinds) == 1 and (found := _in_parts(opcode, kinds[0])) is not None:
            return found
        if len(kinds) != 1 or kinds[0] not in INTEGERS:
            raise Fault("unknown instruction")
        return _integer(opcode, kinds[0])

    def _float(self, opcode: str) -> Operation:
        if opcode in _APPROXIMATE | _QUOTIENTS:
            base, how = opcode.split(".")
            function = self.approximations.function(base, exact=how == "rn")
            return Operation("tt" if opcode in _QUOTIENTS else "t", function)
        if opcode not in FLOAT:
            raise Fault("unknown instruction")
        return FLOAT[opcode]

    def _move(self, instruction: Instruction, words: list[str], kinds: list[str]) -> Step:
        if words or len(kinds) != 1 or len(instruction.args) != 2:
            raise Fault("unknown mov")
        out, source = instruction.args
        kind = bits(kinds[0]) if kinds[0] in FLOATS and _is_register(source) else kinds[0]
        if isinstance(source, tuple):
            return self._pack(out, kind, source)
        if isinstance(out, tuple):
            return self._unpack(out, kind, self._registers.source(source, kind))
        if instruction.placeholder:
            registers = self._registers
            return lambda lanes: registers.punch(str(out), lanes)
        return self._mapped(lambda value: value, h.union, out, kind, [self._registers.source(source, kind)])

    def _pack(self, out: object, kind: str, parts: Sequence[str]) -> Step:
        """Several registers side by side in one, the first the lowest."""
        share, dtype = 8 * TYPES[kind].itemsize // len(parts), TYPES[bits(kind)]

        def joined(*values: Array) -> Array:
            result = values[0].astype(dtype)
            for i, value in enumerate(values[1:], 1):
                result = result | (value.astype(dtype) << dtype.type(share * i))
            return result

        sources = [self._registers.source(part, f"b{share}") for part in parts]
        return self._mapped(joined, h.move(joined, [True] * len(parts)), out, bits(kind), sources)

    def _unpack(self, parts: Sequence[str], kind: str, source: Source) -> Step:
        share = 8 * TYPES[kind].itemsize // len(parts)
        dtype, targets = TYPES[f"b{share}"], [self._registers.target(part, f"b{share}") for part in parts]

        def step(lanes: Lanes) -> None:
            value, hole = source.read(lanes), source.holes(lanes)
            for i, target in enumerate(targets):
                by = value.dtype.type(share * i)
                target.write(lanes, (value >> by).astype(dtype), None if hole is None else (hole >> by).astype(dtype))

        return step

    def _compare(self, words: list[str], kinds: list[str], args: Sequence[object]) -> Step:
        joins, how = [w for w in words if w in ("and", "or", "xor")], [w for w in words if w in a.COMPARISONS]
        if len(kinds) != 1 or len(how) != 1 or len(joins) + len(how) != len(words) or len(args) != 3 + len(joins):
            raise Fault("unknown comparison")
        compare = a.COMPARISONS[how[0]]
        sources = [self._registers.source(arg, kinds[0]) for arg in args[1:3]]
        if not joins:
            return self._mapped(compare, h.spoil, args[0], "pred", sources)
        third, join = self._registers.source(args[3], "pred"), INTEGER[joins[0]]

        def rule(values: Sequence[Array], holes: Sequence[Array | None], width: int) -> Array:
            spoilt = None if holes[0] is None and holes[1] is None else h.spoil(values[:2], holes[:2], 0)
            return join.rule([compare(*values[:2]), values[2]], [spoilt, holes[2]], 0)

        return self._mapped(lambda x, y, p: join.function(compare(x, y), p), rule, args[0], "pred", [*sources, third])

    def _convert(self, words: list[str], kinds: list[str], args: Sequence[object]) -> Step:
        if len(kinds) != 2 or len(args) != (3 if kinds[0].endswith("x2") else 2):
            raise Fault("unknown conversion")
        to, source = kinds
        function, rule = _conversion(to, source, words)
        return self._mapped(function, rule, args[0], to, [self._registers.source(arg, source) for arg in args[1:]])


def _in_parts(opcode: str, kind: str) -> tuple[Operation, str, list[str]] | None:
    """An operation of half precision, or of two numbers in one word, on bits; None: it is none of these."""
    if kind in ("s16x2", "u16x2"):
        operation = _PAIRED_INTEGER.get(opcode)
    else:
        operation = (_HALF | _PAIRED_HALF).get((kind, opcode))
    return None if operation is None else (operation, bits(kind), [bits(kind)] * len(operation.operands))


def _is_register(token: object) -> bool:
    return isinstance(token, str) and token.startswith("%")


def _integer(opcode: str, kind: str) -> tuple[Operation, str, list[str]]:
    """An operation of :data:`INTEGER`, the type of its result, and those of its operands."""
    if opcode not in INTEGER:
        raise Fault("unknown instruction")
    operation = INTEGER[opcode]
    wide = f"{kind[0]}{16 * TYPES[kind].itemsize}"
    letters = {"t": kind, "u": "u32", "p": "pred", "w": wide}
    return operation, wide if operation.wide else kind, [letters[letter] for letter in operation.operands]


def _mixed(operation: Operation) -> Operation:
    """float32 arithmetic whose operands but the last are of half precision."""

    def function(*operands: Array) -> Array:
        return operation.function(*(np.asarray(x, "f4") for x in operands))

    return Operation(operation.operands, function)


def _conversion(to: str, source: str, words: list[str]) -> tuple[a.Function, h.Rule]:
    """What cvt computes."""
    if to in ("f16x2", "bf16x2") and source == "f32" and words == ["rn"]:
        return _pair(to), h.spoil_halves
    if to not in FLOATS and source not in FLOATS and not words and not to.endswith("x2"):
        resize = _cast(TYPES[to])
        return resize, h.move(resize, [True])
    if to not in FLOATS and source in FLOATS and len(words) == 1 and words[0] in a.ROUNDINGS:
        if TYPES[to].itemsize > 4 or to.endswith("x2"):
            raise Fault("unknown conversion")
        return a.to_integer(a.ROUNDINGS[words[0]], TYPES[to]), h.spoil
    if to in FLOATS:
        narrower = source not in FLOATS or TYPES[to].itemsize < TYPES[source].itemsize
        if to == source or words != (["rn"] if narrower else []) or (to in ("f16", "bf16") and source != "f32"):
            raise Fault("unknown conversion")
        return _cast(np.dtype("f4") if to == "bf16" else TYPES[to]), h.spoil
    raise Fault("unknown conversion")


def _cast(dtype: np.dtype[np.generic]) -> a.Function:
    return lambda value: value.astype(dtype)


def _pair(to: str) -> a.Function:
    """Two float32 rounded to half precision, the first in the upper half."""

    def narrow(x: Array) -> Array:
        return a.to_bfloat16(x) if to == "bf16x2" else np.asarray(x, "f2").view("u2")

    return lambda upper, lower: narrow(lower) | (narrow(upper).astype("u4") << np.uint32(16))
