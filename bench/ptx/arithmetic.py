"""What instructions compute, on arrays with one value for each thread.

Floats are IEEE: one rounding, to nearest, halves to even, subnormals kept. Approximations of the hardware (ex2,
rsqrt, rcp, div.full) are correctly rounded here, or off by as much as the PTX manual allows
(:class:`Approximations`). NaNs have NumPy's payload, unless PTX says 0x7fffffff.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from stepfusion.bench.ptx.types import Array, Fault

Function: TypeAlias = Callable[..., Array]

_LEAST_NORMAL = np.float32(2.0**-126)
_NAN = np.array([0x7FFFFFFF], "u4").view("f4")[0]


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float32, rounded once."""
    return np.asarray(_fma_to_odd(a, b, c), "f4")


def _fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32 in float64, rounded to odd, so that another rounding cannot err."""
    product, addend = np.asarray(a, "f8") * b, np.asarray(c, "f8")  # the product is exact
    total = product + addend
    share = total - product
    lost = (product - (total - share)) + (addend - share)  # Knuth's two-sum
    bits = np.array(np.broadcast_to(total, np.broadcast(total, lost).shape), "f8").view("i8")
    inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    bits = bits + np.where(inexact, np.where((lost > 0) == (bits >= 0), 1, -1), 0)
    return np.asarray(bits.view("f8"))


def _to_odd(x: Array) -> Array:
    """float64 as float32, towards zero, with the last bit set where that is not exact."""
    nearest = np.asarray(x, "f4")
    bits = np.ascontiguousarray(nearest).view("u4")
    towards = bits - (np.abs(np.asarray(nearest, "f8")) > np.abs(x)).astype("u4")
    rounded = np.where((nearest == x) | np.isnan(x), bits, towards | np.uint32(1))
    return rounded.astype("u4").view("f4")


def in_half(operation: str, kind: str) -> Function:
    """add, sub, mul or fma of float16 or bfloat16 as their bits, rounded once."""

    def compute(*bits: Array) -> Array:
        one = np.float32(1)
        x, y, *z = (np.asarray(v.view("f2"), "f4") if kind == "f16" else from_bfloat16(v) for v in bits)
        operands = {"add": (x, one, y), "sub": (x, one, -y), "mul": (x, y, np.float32(-0.0))}
        exact = _fma_to_odd(*operands.get(operation, (x, y, *z)))
        return np.asarray(exact, "f2").view("u2") if kind == "f16" else to_bfloat16(_to_odd(exact))

    return compute


def extreme(*, largest: bool, keep_nan: bool) -> Function:
    """max and min of float32. -0 is less than +0; a NaN is the result if ``keep_nan``, else the other operand is."""

    def order(x: Array) -> Array:
        bits = np.ascontiguousarray(x).view("i4")
        return np.asarray(bits ^ ((bits >> 31) & 0x7FFFFFFF))

    def pick(a: Array, b: Array) -> Array:
        a, b = np.broadcast_arrays(np.asarray(a, "f4"), np.asarray(b, "f4"))
        result = np.where((order(a) > order(b)) == largest, a, b)
        if keep_nan:
            return np.where(np.isnan(a) | np.isnan(b), _NAN, result)
        return np.where(np.isnan(a), np.where(np.isnan(b), _NAN, b), np.where(np.isnan(b), a, result))

    return pick


def sign_apart(pick: Function) -> Function:
    """``pick`` with the modifiers xorsign and abs: of the absolute values, with the sign of the operands' product."""

    def picked(a: Array, b: Array) -> Array:
        a, b = np.asarray(a, "f4"), np.asarray(b, "f4")
        result = pick(np.abs(a), np.abs(b))
        signed = np.where(np.signbit(a) != np.signbit(b), -result, result)
        return np.where(np.isnan(result), result, signed)

    return picked


def on_halves(function: Function) -> Function:
    """``function`` of 16 bits, on both halves of words of 32."""

    def halves(x: Array) -> Array:
        return np.ascontiguousarray(x).view("u2").reshape(-1, 2)

    def both(*words: Array) -> Array:
        return np.ascontiguousarray(function(*map(halves, words))).view("u4")[:, 0]

    return both


def flush(x: Array) -> Array:
    """Subnormal float32 become zeros of their sign."""
    return np.where(np.abs(x) < _LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def flushed(function: Function) -> Function:
    """``function`` with the modifier ftz: subnormal operands and results are zeros."""
    return lambda *operands: flush(function(*map(flush, operands)))


def to_bfloat16(x: Array) -> Array:
    """float32 to the bits of the nearest bfloat16, halves to even; NaN is 0x7fff."""
    bits = np.ascontiguousarray(x, "f4").view("u4")
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype("u2")


def from_bfloat16(bits: Array) -> Array:
    """The float32 that these bits of a bfloat16 are."""
    return (bits.astype("u4") << np.uint32(16)).view("f4")


#: Approximate instruction -> its function in float64, and the relative error that the PTX manual allows.
_APPROXIMATE: dict[str, tuple[Function, float]] = {
    "ex2": (np.exp2, 2.0**-22),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.4),
    "rcp": (lambda x: 1 / x, 2.0**-23),
    "sqrt": (np.sqrt, 2.0**-23),
    "lg2": (np.log2, 2.0**-22),
    "div": (operator.truediv, 2.0**-22),
}


class Approximations:
    """ex2, rsqrt, rcp, sqrt, lg2 and div of float32, computed in float64 and rounded.

    That is correct rounding for roots and quotients. With ``worst``, those that are approximations in hardware err by
    the whole bound, upwards or downwards as a bit of a hash of the operand says: the same each time.
    """

    def __init__(self, *, worst: bool = False) -> None:
        self.worst = worst

    def function(self, name: str, *, exact: bool) -> Function:
        """The instruction ``name``; ``exact``: it has a rounding in its name."""
        compute, bound = _APPROXIMATE[name]

        def approximate(*operands: Array) -> Array:
            value = compute(*(np.asarray(x, "f8") for x in operands))
            if self.worst and not exact:
                value = value * (1 + bound * _sign(operands[-1]))
            return np.asarray(value, "f4")

        return approximate


def _sign(x: Array) -> Array:
    """1 or -1 for each float32, as if by chance."""
    hashed = np.ascontiguousarray(x, "f4").view("u4") * np.uint32(0x9E3779B1)
    return 1.0 - 2.0 * (hashed >> np.uint32(31))


def shift_left(a: Array, by: Array) -> Array:
    """shl: bits that are shifted out are lost, more than the width is all of them."""
    width = a.dtype.itemsize * 8
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a: Array, by: Array) -> Array:
    """shr: filled with the sign of a signed operand, else with zeros."""
    width = a.dtype.itemsize * 8
    shifted = a >> np.minimum(by, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < width, shifted, 0).astype(a.dtype)


def funnel_shift(*, left: bool, wrap: bool) -> Function:
    """shf: the upper (left) or lower half of two words, shifted together."""

    def funnel(low: Array, high: Array, by: Array) -> Array:
        by = (by & 31 if wrap else np.minimum(by, 32)).astype("u8")
        both = (high.astype("u8") << np.uint64(32)) | low
        return ((both << by) >> np.uint64(32) if left else both >> by).astype("u4")

    return funnel


def divide(*, remainder: bool) -> Function:
    """div and rem of integers up to 32 bits, towards zero. What a GPU makes of a division by 0 is all ones."""

    def quotient(a: Array, b: Array) -> Array:
        if a.dtype.itemsize > 4:
            raise Fault("unknown division of 64 bits")
        wide, by = a.astype("i8"), b.astype("i8")
        whole = np.trunc(wide / np.where(by == 0, 1, by)).astype("i8")
        result = wide - whole * by if remainder else whole
        return np.where(by == 0, -1, result).astype(a.dtype)

    return quotient


def extract_bits(a: Array, position: Array, length: Array) -> Array:
    """bfe: ``length`` bits from ``position`` on, extended by their sign if the type has one."""
    position = np.minimum(position & 255, 63).astype("i8")
    length = np.minimum(length & 255, 32).astype("i8")
    wide = a.astype("i8")
    field = (wide >> position) & ((1 << length) - 1)
    sign = (wide >> np.minimum(position + np.maximum(length, 1) - 1, 31)) & 1
    negative = (a.dtype.kind == "i") & (sign == 1) & (length > 0)
    return np.asarray(np.where(negative, field | -(1 << length), field), a.dtype)


def insert_bits(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: ``b`` with ``length`` bits from ``position`` on replaced by the lowest of ``a``."""
    position = np.minimum(position & 255, 32).astype("i8")
    mask = ((1 << np.minimum(length & 255, 32).astype("i8")) - 1) << position
    return np.asarray((b & ~mask) | ((a.astype("i8") << position) & mask), "u4")


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of eight, or eight times its sign."""
    pool: Array = a.astype("u8") | (b.astype("u8") << np.uint64(32))
    result: Array = np.zeros(1, np.uint64)
    for i in range(4):
        choice = (selector.astype("u8") >> np.uint64(4 * i)) & np.uint64(15)
        byte = (pool >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | (np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * i))
    return result.astype("u4")


def logic3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: any function of three bits, by its table of eight."""
    if table.size != 1:
        raise Fault("a table that is no constant")
    result = np.zeros_like(a)
    for i in range(8):
        if table.item() >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def multiply_high(a: Array, b: Array) -> Array:
    """mul.hi: the upper half of the product of integers up to 32 bits."""
    wide = multiply_wide(a, b)
    return np.asarray(wide >> wide.dtype.type(8 * a.dtype.itemsize), a.dtype)


def multiply_wide(a: Array, b: Array) -> Array:
    """mul.wide: the whole product of integers up to 32 bits, twice as wide."""
    if a.dtype.itemsize > 4:
        raise Fault("unknown product of 64 bits")
    double = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return np.asarray(a.astype(double) * b.astype(double))


def to_integer(round_to: Callable[[Array], Array], dtype: np.dtype[Any]) -> Function:
    """cvt of a float to an integer up to 32 bits: NaN is 0, and what does not fit is the nearest that does."""
    limits = np.iinfo(dtype)

    def convert(x: Array) -> Array:
        whole: Array = np.clip(np.nan_to_num(round_to(x.astype("f8"))), limits.min, limits.max)
        return whole.astype("i8").astype(dtype)

    return convert


ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _ordered(compare: Function) -> Function:
    return lambda a, b: compare(a, b) & (a == a) & (b == b)


def _or_unordered(compare: Function) -> Function:
    return lambda a, b: compare(a, b) | (a != a) | (b != b)


def _comparisons() -> dict[str, Function]:
    """setp's: of integers lo, ls, hi and hs are unsigned; of floats those with a u hold for NaN too."""
    plain = {name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")}
    return (
        plain
        | {f"{name}u": _or_unordered(compare) for name, compare in plain.items()}
        | {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
        | {"ne": _ordered(operator.ne), "neu": operator.ne}
        | {"num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b)}
    )


COMPARISONS = _comparisons()
