"""Integer, bit and predicate instructions against Python's integers; each class has a neighbour that must differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from stepfusion_testing.written_ptx import compute

MOD = 2**32
RNG = np.random.default_rng(0)
A, B, C = (RNG.integers(0, MOD, 32, dtype="u8").astype("u4") for _ in range(3))
SMALL = B >> 20 | 1
COUNTS = np.arange(32, dtype="u4") * 2


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def lut(table: int) -> Callable[[int, int, int], int]:
    def function(x: int, y: int, z: int) -> int:
        bits = (table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1 for i in range(32))
        return sum(bit << i for i, bit in enumerate(bits))

    return function


def halves(x: int, y: int, function: Callable[[int, int], int]) -> int:
    return (function(x >> 16, y >> 16) & 0xFFFF) << 16 | function(x & 0xFFFF, y & 0xFFFF) & 0xFFFF


def permuted(selector: int) -> Callable[[int, int], int]:
    def function(x: int, y: int) -> int:
        choices = [selector >> 4 * i & 15 for i in range(4)]
        pool = [(y << 32 | x) >> 8 * i & 255 for i in range(8)]
        return sum((pool[c & 7] if c < 8 else 255 * (pool[c & 7] >> 7)) << 8 * i for i, c in enumerate(choices))

    return function


def field(position: int, length: int) -> Callable[[int], int]:
    """bfe.s32, bit by bit as the PTX manual has it."""

    def function(x: int) -> int:
        if length == 0:
            return 0
        sign = x >> min(position + length - 1, 31) & 1
        bits = (x >> (position + i) & 1 if i < length and position + i < 32 else sign for i in range(32))
        return sum(bit << i for i, bit in enumerate(bits))

    return function


def inserted(position: int, length: int) -> Callable[[int, int], int]:
    mask = ((1 << length) - 1) << position
    return lambda x, y: (y & ~mask) | ((x << position) & mask)


# instructions, a neighbour that must give another result, operands, and what is right
EXACT: list[tuple[str, str, Sequence[np.ndarray], Callable[..., int]]] = [
    ("add.s32 D, A, B", "sub.s32 D, A, B", (A, B), lambda x, y: x + y),
    ("sub.s32 D, A, B", "sub.s32 D, B, A", (A, B), lambda x, y: x - y),
    ("add.s16x2 D, A, B", "add.s32 D, A, B", (A, B), lambda x, y: halves(x, y, lambda p, q: p + q)),
    ("sub.u16x2 D, A, B", "sub.u16x2 D, B, A", (A, B), lambda x, y: halves(x, y, lambda p, q: p - q)),
    ("neg.s32 D, A", "not.b32 D, A", (A,), lambda x: -x),
    ("abs.s32 D, A", "neg.s32 D, A", (A,), lambda x: abs(signed(x))),
    ("min.s32 D, A, B", "min.u32 D, A, B", (A, B), lambda x, y: min(signed(x), signed(y))),
    ("max.u32 D, A, B", "max.s32 D, A, B", (A, B), max),
    ("mul.lo.s32 D, A, B", "mul.hi.s32 D, A, B", (A, B), lambda x, y: x * y),
    ("mul.hi.u32 D, A, B", "mul.hi.s32 D, A, B", (A, B), lambda x, y: x * y >> 32),
    ("mul.hi.s32 D, A, B", "mul.hi.u32 D, A, B", (A, B), lambda x, y: signed(x) * signed(y) >> 32),
    ("mul.hi.u32 D, A, -845247145", "mul.hi.u32 D, A, 845247145", (A,), lambda x: x * 0xCD9E8D57 >> 32),
    ("mad.lo.s32 D, A, B, C", "mad.lo.s32 D, A, C, B", (A, B, C), lambda x, y, z: x * y + z),
    ("div.s32 D, A, B", "div.u32 D, A, B", (A, SMALL), lambda x, y: int(signed(x) / y)),
    ("div.u32 D, A, B", "rem.u32 D, A, B", (A, SMALL), lambda x, y: x // y),
    ("rem.s32 D, A, B", "rem.u32 D, A, B", (A, SMALL), lambda x, y: int(math.fmod(signed(x), y))),
    ("and.b32 D, A, B", "or.b32 D, A, B", (A, B), lambda x, y: x & y),
    ("or.b32 D, A, B", "xor.b32 D, A, B", (A, B), lambda x, y: x | y),
    ("xor.b32 D, A, B", "and.b32 D, A, B", (A, B), lambda x, y: x ^ y),
    ("not.b32 D, A", "neg.s32 D, A", (A,), lambda x: ~x),
    ("lop3.b32 D, A, B, C, 0x96", "lop3.b32 D, A, B, C, 0x97", (A, B, C), lut(0x96)),
    ("lop3.b32 D, A, B, C, 0xE8", "lop3.b32 D, A, B, C, 0x1A", (A, B, C), lut(0xE8)),
    ("shl.b32 D, A, 5", "shr.u32 D, A, 5", (A,), lambda x: x << 5),
    ("shl.b32 D, A, B", "shl.b32 D, A, 1", (A, COUNTS), lambda x, n: x << n if n < 32 else 0),
    ("shr.u32 D, A, B", "shr.s32 D, A, B", (A, COUNTS), lambda x, n: x >> n),
    ("shr.s32 D, A, B", "shr.u32 D, A, B", (A, COUNTS), lambda x, n: signed(x) >> n),
    (
        "shf.l.wrap.b32 D, A, B, C",
        "shf.l.clamp.b32 D, A, B, C",
        (A, B, COUNTS),
        lambda x, y, n: (y << 32 | x) << n % 32 >> 32,
    ),
    (
        "shf.r.clamp.b32 D, A, B, C",
        "shf.r.wrap.b32 D, A, B, C",
        (A, B, COUNTS),
        lambda x, y, n: (y << 32 | x) >> min(n, 32),
    ),
    ("prmt.b32 D, A, B, 0x3340U", "prmt.b32 D, A, B, 0x3341U", (A, B), permuted(0x3340)),
    ("prmt.b32 D, A, B, 0x89AB", "prmt.b32 D, A, B, 0x0123", (A, B), permuted(0x89AB)),
    ("bfe.u32 D, A, 28, 8", "bfe.s32 D, A, 28, 8", (A,), lambda x: x >> 28),
    ("bfe.s32 D, A, 2, 7", "bfe.u32 D, A, 2, 7", (A,), field(2, 7)),
    ("bfe.s32 D, A, 28, 8", "bfe.u32 D, A, 28, 8", (A,), field(28, 8)),
    ("bfe.s32 D, A, 0, 32", "bfe.s32 D, A, 5, 0", (A,), field(0, 32)),
    ("bfi.b32 D, A, B, 2, 7", "bfi.b32 D, B, A, 2, 7", (A, B), inserted(2, 7)),
    ("bfi.b32 D, A, B, 28, 8", "bfi.b32 D, A, B, 28, 0", (A, B), inserted(28, 8)),
    (
        "mul.wide.u32 %rd6, A, B; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 D, %rd6",
        "mul.wide.s32 %rd6, A, B; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 D, %rd6",
        (A, B),
        lambda x, y: x * y >> 32,
    ),
    (
        "cvt.u64.u32 %rd6, C; mad.wide.s32 %rd6, A, -3, %rd6; mov.b64 {_, D}, %rd6",
        "cvt.u64.u32 %rd6, C; mad.wide.u32 %rd6, A, -3, %rd6; mov.b64 {_, D}, %rd6",
        (A, B, C),
        lambda x, y, z: signed(x) * -3 + z >> 32,
    ),
    (
        "cvt.s64.s32 %rd6, A; mad.lo.s64 %rd6, %rd6, 56, %rd6; mov.b64 {_, D}, %rd6",
        "cvt.u64.u32 %rd6, A; mad.lo.s64 %rd6, %rd6, 56, %rd6; mov.b64 {_, D}, %rd6",
        (A,),
        lambda x: signed(x) * 57 >> 32,
    ),
    (
        "mov.b32 {%rs1, %rs2}, A; mov.b32 D, {%rs2, %rs1}",
        "mov.b32 {%rs1, %rs2}, A; mov.b32 D, {%rs1, %rs2}",
        (A,),
        lambda x: x >> 16 | x << 16,
    ),
    (
        "mov.b64 %rd6, {A, B}; shr.u64 %rd6, %rd6, 4; cvt.u32.u64 D, %rd6",
        "mov.b64 %rd6, {B, A}; shr.u64 %rd6, %rd6, 4; cvt.u32.u64 D, %rd6",
        (A, B),
        lambda x, y: (y << 32 | x) >> 4,
    ),
    (
        "cvt.u16.u32 %rs1, A; mul.hi.u16 %rs1, %rs1, 21846; shr.u16 %rs1, %rs1, 1; cvt.u32.u16 D, %rs1",
        "cvt.u16.u32 %rs1, A; mul.lo.s16 %rs1, %rs1, 21846; shr.u16 %rs1, %rs1, 1; cvt.u32.u16 D, %rs1",
        (A,),
        lambda x: ((x & 65535) * 21846 >> 16) >> 1,
    ),
    (
        "cvt.u16.u32 %rs1, A; mul.lo.s16 %rs1, %rs1, 43; cvt.s32.s16 D, %rs1",
        "cvt.u16.u32 %rs1, A; mul.lo.s16 %rs1, %rs1, 43; cvt.u32.u16 D, %rs1",
        (A,),
        lambda x: signed(x * 43 & 65535, 16),
    ),
    (
        "cvt.u16.u32 %rs1, A; cvt.s32.s8 D, %rs1",
        "cvt.u16.u32 %rs1, A; cvt.u32.u8 D, %rs1",
        (A,),
        lambda x: signed(x & 255, 8),
    ),
    (
        "setp.lt.s32 %p1, A, 0; selp.b32 D, 5, B, %p1",
        "setp.lo.u32 %p1, A, 0; selp.b32 D, 5, B, %p1",
        (A, B),
        lambda x, y: 5 if x >= MOD // 2 else y,
    ),
    (
        "setp.lt.s32 %p1, A, 0; setp.lt.and.u32 %p2, B, 2147483648, %p1; setp.ge.or.u32 %p3, A, B, !%p2;"
        "selp.b32 D, 1, 0, %p3",
        "setp.lt.s32 %p1, A, 0; setp.lt.and.u32 %p2, B, 2147483648, %p1; setp.ge.xor.u32 %p3, A, B, %p2;"
        "selp.b32 D, 1, 0, %p3",
        (A, B),
        lambda x, y: int(x >= y or not (y < 2**31 <= x)),
    ),
    (
        "mov.pred %p1, -1; setp.lt.s32 %p2, A, 0; xor.pred %p3, %p1, %p2; not.pred %p4, %p3; and.pred %p5, %p4, %p1;"
        "or.pred %p6, %p5, %p3; and.pred %p6, %p6, %p5; selp.b32 D, 1, 0, %p6",
        "mov.pred %p1, 0; setp.lt.s32 %p2, A, 0; xor.pred %p6, %p1, %p2; not.pred %p6, %p6; selp.b32 D, 1, 0, %p6",
        (A,),
        lambda x: int(x >= 2**31),
    ),
    (
        "mov.b32 D, 3; setp.lt.s32 %p1, A, 0; @%p1 mov.b32 D, 4; @!%p1 add.s32 D, D, 6",
        "mov.b32 D, 3; setp.lt.s32 %p1, A, 0; @!%p1 mov.b32 D, 4; @%p1 add.s32 D, D, 6",
        (A,),
        lambda x: 4 if x >= MOD // 2 else 9,
    ),
]


@pytest.mark.parametrize(("instructions", "neighbour", "operands", "right"), EXACT, ids=[case[0] for case in EXACT])
def test_the_result_is_exact(
    instructions: str, neighbour: str, operands: Sequence[np.ndarray], right: Callable[..., int]
) -> None:
    want = np.array([right(*(int(v) for v in values)) % MOD for values in zip(*operands, strict=True)], "u4")
    assert np.array_equal(compute(instructions, *operands), want)
    assert not np.array_equal(compute(neighbour, *operands), want)


def test_a_division_by_zero_is_all_ones() -> None:
    assert (compute("div.u32 D, A, B", A, 0) == MOD - 1).all()
