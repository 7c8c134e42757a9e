"""mma.sync: fragments, sums, holes, and what must be there."""

from __future__ import annotations

import numpy as np
import pytest

from stepfusion.bench.ptx.arithmetic import from_bfloat16, to_bfloat16
from stepfusion.bench.ptx.launch import Options
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.matrices import SUM_ERROR
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.written_ptx import run

#: Each lane has 10 words of input: 4 of A, 2 of B and 4 of C.
LOADS = "mad.wide.u32 %rd5, %r1, 40, %rd2;" + "".join(f"ld.global.b32 %r{10 + i}, [%rd5+{4 * i}];" for i in range(10))
PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32 { %r20, %r21, %r22, %r23 }, { %r10, %r11, %r12, %r13 },"
    "{ %r14, %r15 }, { %r16, %r17, %r18, %r19 };"
)
STORES = "mad.wide.u32 %rd6, %r1, 16, %rd1; st.global.v4.b32 [%rd6], {%r20,%r21,%r22,%r23};"


def half(values: np.ndarray, kind: str) -> np.ndarray:
    """Bits of half precision."""
    return to_bfloat16(values.astype("f4")) if kind == "bf16" else values.astype("f2").view("u2")


def number(bits: np.ndarray, kind: str) -> np.ndarray:
    return (from_bfloat16(bits) if kind == "bf16" else bits.view("f2")).astype("f8")


def words(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """What the lanes hold of A and B, bits of 16 x 16 and 16 x 8, and of C: by the formulas of the PTX ISA."""
    found = np.zeros((32, 10), "u4")
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):  # a_i
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            found[lane, i // 2] |= np.uint32(int(a[row, column]) << 16 * (i % 2))
        for i in range(4):
            row, column = thread * 2 + (i & 1) + (0 if i < 2 else 8), group  # b_i
            found[lane, 4 + i // 2] |= np.uint32(int(b[row, column]) << 16 * (i % 2))
            found[lane, 6 + i] = c[group if i < 2 else group + 8, thread * 2 + (i & 1)].view("u4")  # c_i
    return found


def matrix(got: np.ndarray) -> np.ndarray:
    """The result, float32 [16, 8], of lanes that hold its elements as those of C."""
    result = np.full((16, 8), np.nan, "f4")
    for lane in range(32):
        for i in range(4):
            result[lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)] = got[lane].view("f4")[i]
    return result


def given(kind: str, warps: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A, B (bits), C and the words of every thread."""
    rng = np.random.default_rng(5)
    a, b = half(rng.standard_normal((warps, 16, 16)), kind), half(rng.standard_normal((warps, 16, 8)), kind)
    c = rng.standard_normal((warps, 16, 8)).astype("f4")
    return a, b, c, np.concatenate([words(a[i], b[i], c[i]) for i in range(warps)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_each_warp_multiplies_its_fragments(kind: str, order: str) -> None:
    a, b, c, held = given(kind, warps=2)
    body = LOADS + PRODUCT.replace("KIND", kind) + STORES
    got = run(body, held, words=4, threads=64, options=Options(order=order))
    for i in range(2):
        exact = number(a[i], kind) @ number(b[i], kind) + c[i]
        assert np.array_equal(matrix(got[32 * i :][:32]), exact.astype("f4"))
    other = run(body.replace("%r10, %r11,", "%r11, %r10,"), held, words=4, threads=64)
    assert not np.array_equal(got, other)


def test_in_the_worst_case_sums_err_towards_zero_by_what_is_allowed() -> None:
    a, b, c, held = given("bf16")
    got = matrix(run(LOADS + PRODUCT.replace("KIND", "bf16") + STORES, held, words=4, options=Options(worst=True)))
    a8, b8 = number(a[0], "bf16"), number(b[0], "bf16")
    exact, size = a8 @ b8 + c[0], np.abs(a8) @ np.abs(b8) + np.abs(c[0])
    error = (exact - got) * np.sign(exact)
    assert (error > 0.9 * SUM_ERROR * size).all()
    assert (error < 1.1 * SUM_ERROR * size).all()


def test_products_of_zeros_leave_the_sum_alone_even_then() -> None:
    a, b, c, _ = given("bf16")
    held = words(a[0], 0 * b[0], c[0])
    body = LOADS + PRODUCT.replace("KIND", "bf16") + STORES
    assert np.array_equal(matrix(run(body, held, words=4, options=Options(worst=True))), c[0])


def test_what_is_not_finite_stays_so() -> None:
    a, b, c, _ = given("bf16")
    c[0, 3, 4], c[0, 5, 6] = np.inf, np.nan
    body = LOADS + PRODUCT.replace("KIND", "bf16") + STORES
    for worst in (False, True):
        got = matrix(run(body, words(a[0], b[0], c[0]), words=4, options=Options(worst=worst)))
        assert got[3, 4] == np.inf
        assert np.isnan(got[5, 6])
        assert np.isfinite(got).sum() == 16 * 8 - 2


@pytest.mark.parametrize(
    ("register", "spoilt"),
    [
        ("%r10", lambda row, column: row == 2),  # lane 9 holds row 2 of A, columns 2 and 3
        ("%r13", lambda row, column: row == 10),
        ("%r14", lambda row, column: column == 2),  # and column 2 of B
        ("%r16", lambda row, column: (row == 2) & (column == 2)),
        ("%r19", lambda row, column: (row == 10) & (column == 3)),
    ],
)
def test_a_hole_spoils_its_row_its_column_or_its_element(register: str, spoilt: object) -> None:
    """One lane stores one element at a time; what it may not store is what the hole has spoilt."""
    assert callable(spoilt)
    _, _, _, held = given("bf16")
    hole = f"setp.ne.u32 %p1, %r1, 9; mov.u32 {register}, 0x0; @%p1 ld.global.b32 {{ {register} }}, [%rd5];"
    for lane, i in ((9, 0), (9, 1), (8, 0), (9, 3), (10, 2), (21, 0)):
        row, column = lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2
        store = f"setp.eq.u32 %p2, %r1, {lane}; @%p2 st.global.b32 OUT, %r{20 + i};"
        body = LOADS + hole + PRODUCT.replace("KIND", "bf16") + store
        if spoilt(row, column):
            with pytest.raises(Fault, match="1 stores of what depends on registers that nobody wrote"):
                run(body, held)
        else:
            run(body, held)


def test_all_lanes_of_a_warp_must_come() -> None:
    _, _, _, held = given("f16")
    product = PRODUCT.replace("KIND", "f16")
    with pytest.raises(Fault, match="not all lanes of a warp"):
        run(f"{LOADS} setp.lt.u32 %p1, %r1, 5; @%p1 bra A; {product} A: st.global.b32 OUT, %r1;", held, words=4)
    with pytest.raises(Fault, match="under a predicate"):
        run(f"{LOADS} setp.lt.u32 %p1, %r1, 99; @%p1 {product}", held, words=4)
