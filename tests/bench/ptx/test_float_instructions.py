"""Floating-point instructions against exact fractions, float64 and PyTorch's conversions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from stepfusion.bench.ptx.launch import Options
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.written_ptx import compute, run

F4 = np.float32
NAN, INF = F4("nan"), F4("inf")
RNG = np.random.default_rng(1)
CANONICAL = 0x7FFFFFFF


def any_bits() -> np.ndarray:
    return RNG.integers(0, 2**32, 32, dtype="u8").astype("u4").view("f4")


def moderate() -> np.ndarray:
    return (RNG.standard_normal(32) * 2.0 ** RNG.integers(-20, 20, 32)).astype("f4")


def nearest(x: Fraction) -> np.float32:
    """The float32 nearest to a fraction, halves to even, subnormals and overflow included."""
    if x == 0:
        return F4(0)
    exponent = -126
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    value = round(x / unit) * unit
    return F4(math.copysign(math.inf, value)) if abs(value) >= Fraction(2) ** 128 else F4(float(value))


def products() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Operands of a b + c: ordinary ones; ties and near ties with a tiny rest; results among the subnormals."""
    cases = [(moderate(), moderate(), moderate()) for _ in range(4)]
    for _ in range(4):
        a = F4(1) + RNG.integers(0, 2**12, 32).astype("f4") * F4(2.0**-23)
        c = (RNG.integers(2**23, 2**24, 32) * 2.0 ** RNG.integers(-3, 30, 32)).astype("f4")
        cases.append((a, a[::-1].copy(), c * RNG.choice([-1, 1], 32).astype("f4")))
    for scale in (2.0**-49, 2.0**-20):
        c = (RNG.integers(0, 2**24, 32) * 2.0**-149).astype("f4")
        cases.append((moderate() * F4(2.0**-100), moderate() * F4(scale), c))
    return cases


def test_fma_rounds_once() -> None:
    twice = 0
    for a, b, c in products():
        want = [
            nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
            for x, y, z in zip(a, b, c, strict=True)
        ]
        assert np.array_equal(compute("fma.rn.f32 D, A, B, C", a, b, c, kind="f4"), np.array(want, "f4"))
        rounded = compute("mul.rn.f32 D, A, B; add.rn.f32 D, D, C", a, b, c, kind="f4")
        twice += int((rounded != np.array(want, "f4")).sum())
    assert twice > 0  # the control: a product rounded on its own differs


@pytest.mark.parametrize("mode", ["", ".rn"])
@pytest.mark.parametrize(
    ("op", "neighbour", "right"),
    [
        ("add", "sub", np.add),
        ("sub", "add", np.subtract),
        ("mul", "add", np.multiply),
    ],
)
def test_sums_and_products(op: str, neighbour: str, mode: str, right: Callable[..., np.ndarray]) -> None:
    a, b = moderate(), moderate()
    want = right(a, b)
    assert np.array_equal(compute(f"{op}{mode}.f32 D, A, B", a, b, kind="f4"), want)
    assert not np.array_equal(compute(f"{neighbour}{mode}.f32 D, A, B", a, b, kind="f4"), want)


@pytest.mark.parametrize("mode", ["", ".rn"])
@pytest.mark.parametrize(("op", "right"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_sums_and_products_of_float64(op: str, mode: str, right: Callable[..., np.ndarray]) -> None:
    """In float64, and rounded to float32 at the end: in float32 from the start they are others."""
    a, b = moderate(), moderate()
    third = F4(1 / 3)
    wide = "cvt.f64.f32 %rd6, A; cvt.f64.f32 %rd7, B; cvt.f64.f32 %rd8, C; mul.rn.f64 %rd6, %rd6, %rd8;"
    got = compute(
        f"{wide} {op}{mode}.f64 %rd6, %rd6, %rd7; neg.f64 %rd6, %rd6; cvt.rn.f32.f64 D, %rd6", a, b, third, kind="f4"
    )
    assert np.array_equal(got, -right(a.astype("f8") * np.float64(third), b.astype("f8")).astype("f4"))
    assert not np.array_equal(got, -right(a * third, b))


def test_two_at_once() -> None:
    a, b, c = moderate(), moderate(), moderate()
    pairs = "mov.b64 %rd6, {A, B}; mov.b64 %rd7, {C, A};"
    for op, right in (("add.rn", np.add), ("sub", np.subtract), ("mul.rn", np.multiply)):
        halves = [
            compute(f"{pairs} {op}.f32x2 %rd8, %rd6, %rd7; mov.b64 {{{names}}}, %rd8", a, b, c, kind="f4")
            for names in ("D, _", "_, D")
        ]
        assert np.array_equal(halves[0], right(a, c))
        assert np.array_equal(halves[1], right(b, a))
    fused = compute(f"{pairs} fma.rn.f32x2 %rd8, %rd6, %rd7, %rd6; mov.b64 {{_, D}}, %rd8", a, b, c, kind="f4")
    assert np.array_equal(fused, compute("fma.rn.f32 D, B, A, B", a, b, c, kind="f4"))
    assert not np.array_equal(halves[0], halves[1])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_operands_of_half_precision(name: str, dtype: torch.dtype) -> None:
    a, b = moderate(), moderate()
    half = torch.from_numpy(a).to(dtype)
    bits = half.view(torch.int16).numpy().view("u2").astype("u4")
    for op, right in (("add.rn", np.add), ("sub", np.subtract)):
        got = compute(f"cvt.u16.u32 %rs1, A; {op}.f32.{name} D, %rs1, B", bits, b, kind="f4")
        assert np.array_equal(got, right(half.float().numpy(), b))
        assert not np.array_equal(got, right(a, b))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_arithmetic_of_half_precision(kind: str) -> None:
    """Of one number, and of two in a word; rounded once. Integers of the same bits have other sums."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    tiny = torch.tensor([5e-8, -6e-8, 6e-5, -0.0]).repeat(8)
    a, b, c = (torch.from_numpy(moderate()).to(dtype) for _ in range(3))
    b[::2] = tiny[::2].to(dtype)
    words = [x.view(torch.int16).numpy().view("u2").astype("u4") for x in (a, b, c)]
    double = [x.double() for x in (a, b, c)]
    for op, right in (
        ("add", double[0] + double[1]),
        ("add.rn", double[0] + double[1]),
        ("sub", double[0] - double[1]),
        ("mul.rn", double[0] * double[1]),
        ("fma.rn", torch.addcmul(double[2], double[0], double[1])),
    ):
        want = right.to(dtype).view(torch.int16).numpy().view("u2")
        third = ", %rs3" if op == "fma.rn" else ""
        loads = "cvt.u16.u32 %rs1, A; cvt.u16.u32 %rs2, B; cvt.u16.u32 %rs3, C;"
        got = compute(f"{loads} {op}.{kind} %rs1, %rs1, %rs2{third}; cvt.u32.u16 D, %rs1", *words)
        assert np.array_equal(got, want)
        pairs = "shl.b32 A, A, 16; shl.b32 B, B, 16; shl.b32 C, C, 16;"
        got = compute(f"{pairs} {op}.{kind}x2 D, A, B{', C' if third else ''}", *words)
        assert np.array_equal(got >> 16, want)
        assert (got & 0xFFFF == 0).all()
    sums = compute("add.u32 D, A, B", *words[:2])
    assert not np.array_equal(sums & 0xFFFF, compute(f"add.{kind}x2 D, A, B", *words[:2]) & 0xFFFF)


def test_a_sum_of_half_precision_is_not_rounded_twice() -> None:
    """1 + 2**-10 and almost half a unit more: float32 has only the half, a tie, which would be rounded up."""
    factors, odd = (2**-6 * (1 + 2**-10), 2**-5 * (1 - 2**-10)), 1 + 2**-10
    a, b, c = (np.array([x], "f2").view("u2").astype("u4") for x in (*factors, odd))
    assert (compute("fma.rn.f16x2 D, A, B, C", a, b, c) == c).all()
    assert np.float16(np.float32(factors[0] * factors[1] + odd)) == 1 + 2**-9


@pytest.mark.parametrize("instruction", ["max.f16x2 D, A, B", "and.f16x2 D, A, B", "mad.lo.bf16x2 D, A, B, A"])
def test_numbers_of_half_precision_are_no_integers(instruction: str) -> None:
    with pytest.raises(Fault, match="unknown instruction"):
        compute(instruction, 1, 2)


def test_subnormals_are_kept_unless_flushed() -> None:
    tiny = F4(2.0**-100), F4(-(2.0**-40))
    assert (compute("mul.f32 D, A, B", *tiny, kind="f4") == F4(-(2.0**-140))).all()
    assert (compute("mul.ftz.f32 D, A, B", *tiny) == 0x80000000).all()


EXTREMES = [
    ("max.f32", NAN, 2.0, 2.0),
    ("max.f32", 2.0, NAN, 2.0),
    ("min.f32", NAN, 2.0, 2.0),
    ("max.f32", -0.0, 0.0, 0.0),
    ("max.f32", 0.0, -0.0, 0.0),
    ("min.f32", 0.0, -0.0, -0.0),
    ("min.f32", -0.0, 0.0, -0.0),
    ("max.NaN.f32", 1.0, -INF, 1.0),
    ("min.NaN.f32", 1.0, -INF, -INF),
    ("max.f32", -1.5, -2.5, -1.5),
    ("min.xorsign.abs.f32", -1.5, 1.0, -1.0),
    ("min.xorsign.abs.f32", -0.5, -1.0, 0.5),
    ("min.NaN.xorsign.abs.f32", -INF, 1.0, -1.0),
    ("min.NaN.xorsign.abs.f32", -0.0, 1.0, -0.0),
    ("max.xorsign.abs.f32", 1.5, -2.5, -2.5),
    ("max.NaN.xorsign.abs.f32", -1.5, -0.0, 1.5),
    ("min.xorsign.abs.f32", NAN, -2.0, -2.0),
    ("max.xorsign.abs.f32", -2.0, -NAN, 2.0),
]


@pytest.mark.parametrize(("op", "a", "b", "want"), EXTREMES)
def test_min_and_max(op: str, a: float, b: float, want: float) -> None:
    assert (compute(f"{op} D, A, B", F4(a), F4(b)) == F4(want).view("u4")).all()


@pytest.mark.parametrize("op", ["max", "min"])
def test_a_nan_wins_only_where_the_opcode_says_so(op: str) -> None:
    for a, b in ((NAN, F4(1)), (F4(1), NAN)):
        assert (compute(f"{op}.NaN.f32 D, A, B", a, b) == CANONICAL).all()
        assert (compute(f"{op}.f32 D, A, B", a, b, kind="f4") == 1).all()
    assert (compute(f"{op}.f32 D, A, B", NAN, NAN) == CANONICAL).all()
    assert (compute(f"{op}.NaN.xorsign.abs.f32 D, A, B", F4(-1), NAN) == CANONICAL).all()
    assert (compute(f"{op}.xorsign.abs.f32 D, A, B", NAN, -NAN) == CANONICAL).all()


@pytest.mark.parametrize(("op", "right"), [("max", np.maximum), ("min", np.minimum)])
def test_min_and_max_of_three(op: str, right: Callable[..., np.ndarray]) -> None:
    a, b, c = moderate(), moderate(), moderate()
    assert np.array_equal(compute(f"{op}.f32 D, A, B, C", a, b, c, kind="f4"), right(right(a, b), c))
    for operands in ((NAN, a, b), (a, NAN, b), (a, b, NAN)):
        assert np.array_equal(compute(f"{op}.f32 D, A, B, C", *operands, kind="f4"), right(a, b))
        assert (compute(f"{op}.NaN.f32 D, A, B, C", *operands) == CANONICAL).all()


def unordered(x: float, y: float) -> bool:
    return math.isnan(x) or math.isnan(y)


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y and not unordered(x, y),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


@pytest.mark.parametrize("name", [*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan"])
def test_comparisons(name: str) -> None:
    values = np.array([0.0, -0.0, 1.0, -1.0, np.inf, np.nan], "f4")
    a, b = (v.reshape(-1)[:32] for v in np.meshgrid(values, values[[0, 2, 3, 4, 5]]))
    a, b = np.resize(a, 32), np.resize(b, 32)
    if name in ("num", "nan"):
        want = [unordered(x, y) == (name == "nan") for x, y in zip(a, b, strict=True)]
    else:
        want = [
            COMPARISONS[name[:2]](x, y) or (len(name) == 3 and unordered(x, y)) for x, y in zip(a, b, strict=True)
        ]
    assert np.array_equal(compute(f"setp.{name}.f32 %p1, A, B; selp.b32 D, 1, 0, %p1", a, b), np.array(want, "u4"))


ROUNDED = np.resize(np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.7, 3.2, 1e10, -1e10, NAN, INF, -INF], "f4"), 32)


@pytest.mark.parametrize(
    ("how", "right"),
    [
        ("rzi", math.trunc),
        ("rni", round),
        ("rmi", math.floor),
        ("rpi", math.ceil),
    ],
)
@pytest.mark.parametrize(("kind", "least", "most"), [("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1)])
def test_floats_to_integers(how: str, right: Callable[[float], int], kind: str, least: int, most: int) -> None:
    def whole(x: float) -> int:
        if math.isnan(x):
            return 0
        return least if x == -math.inf else most if x == math.inf else max(min(right(x), most), least)

    want = np.array([whole(float(x)) % 2**32 for x in ROUNDED], "u4")
    assert np.array_equal(compute(f"cvt.{how}.{kind}.f32 D, A", ROUNDED), want)


def test_integers_to_floats() -> None:
    for value, want in ((2**32 - 1, 2.0**32), (2**31 + 128, 2.0**31), (2**31 + 129, 2.0**31 + 256)):
        assert (compute("cvt.rn.f32.u32 D, A", np.uint32(value), kind="f4") == F4(want)).all()
    assert (compute("cvt.rn.f32.s32 D, A", np.uint32(2**32 - 5), kind="f4") == F4(-5)).all()
    assert (compute("cvt.rzi.u16.f32 %rs1, A; cvt.u32.u16 D, %rs1", F4(255.9)) == 255).all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Rounded to nearest even, and back; two at once; against PyTorch, for any bits but NaN."""
    for _ in range(20):
        a, b = any_bits(), any_bits()
        number = ~(np.isnan(a) | np.isnan(b))
        high, low = (torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view("u2").astype("u4") for x in (a, b))
        assert np.array_equal(compute(f"cvt.rn.{name}x2.f32 D, A, B", a, b)[number], (high << 16 | low)[number])
        back = compute(f"cvt.rn.{name}.f32 %rs1, A; cvt.f32.{name} D, %rs1", a, kind="f4")
        assert np.array_equal(back[number], torch.from_numpy(a).to(dtype).float().numpy()[number])
    other = "f16" if name == "bf16" else "bf16"
    assert not np.array_equal(compute(f"cvt.rn.{other}x2.f32 D, A, B", a, b)[number], (high << 16 | low)[number])


def test_nan_in_half_precision() -> None:
    assert (compute("cvt.rn.bf16x2.f32 D, A, B", NAN, F4(1)) == 0x7FFF3F80).all()
    for bits, want in ((0x7FC1, 0), (0x3F80, 1), (0xFF80, 1)):
        instructions = "cvt.u16.u32 %rs1, A; setp.num.bf16 %p1, %rs1, %rs1; selp.b32 D, 1, 0, %p1"
        assert (compute(instructions, np.uint32(bits)) == want).all()


APPROXIMATE: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "ex2.approx.ftz.f32": ("A", np.exp2),
    "rsqrt.approx.ftz.f32": ("A", lambda x: 1 / np.sqrt(x)),
    "rcp.approx.ftz.f32": ("A", lambda x: 1 / x),
    "lg2.approx.f32": ("A", np.log2),
    "sqrt.approx.f32": ("A", np.sqrt),
    "div.full.f32": ("A, B", np.divide),
    "sqrt.rn.f32": ("A", np.sqrt),
    "rcp.rn.f32": ("A", lambda x: 1 / x),
    "div.rn.f32": ("A, B", np.divide),
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_roots_quotients_and_powers(op: str) -> None:
    """Correctly rounded; off by no more than the manual allows if the worst is asked for, and not at all with .rn."""
    operands, right = APPROXIMATE[op]
    a, b = np.abs(moderate()).clip(2.0**-10, 100), moderate()
    want = right(*(x.astype("f8") for x in (a, b)[: operands.count(",") + 1]))
    assert np.array_equal(compute(f"{op} D, {operands}", a, b, kind="f4"), want.astype("f4"))

    body = f"ld.global.b32 %r5, [%rd4]; {op} %r6, {operands.replace('A', '%r5').replace('B', '%r5')};"
    worst = Options(worst=True)
    got = run(f"{body} st.global.b32 OUT, %r6;", a, options=worst).view("f4").reshape(-1)
    want = right(*[a.astype("f8")] * (operands.count(",") + 1))
    errors = np.abs(got - want) / np.abs(want).clip(2.0**-20)
    assert errors.max() <= 2.0**-21
    assert (np.array_equal(got, want.astype("f4"))) == ("rn" in op)


def test_ends_of_approximations() -> None:
    assert (compute("ex2.approx.ftz.f32 D, A", F4(-130)) == 0).all()
    assert (compute("ex2.approx.f32 D, A", F4(-130), kind="f4") == F4(2.0**-130)).all()
    assert (compute("rsqrt.approx.ftz.f32 D, A", F4(0), kind="f4") == INF).all()
    assert (compute("rsqrt.approx.ftz.f32 D, A", F4(2.0**-130), kind="f4") == INF).all()
    assert (compute("rsqrt.approx.ftz.f32 D, A", INF, kind="f4") == 0).all()


def test_signs_and_constants() -> None:
    chosen = "setp.eq.f32 %p1, A, 0f00000000; selp.f32 D, A, 0f7fc00000, %p1"
    assert (compute(chosen, F4(1)) == 0x7FC00000).all()
    assert (compute("neg.f32 D, A", F4(0.0)) == 0x80000000).all()
    assert (compute("abs.f32 D, A", F4(-2.5), kind="f4") == F4(2.5)).all()
