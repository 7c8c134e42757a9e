"""What nobody wrote: it may be computed with, and nothing may come of it."""

from __future__ import annotations

import numpy as np
import pytest

from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.written_ptx import LANES, run

#: %r5 is undefined in lanes 8 and up, as Triton leaves it for a masked load without ``other``.
MASKED = "setp.lt.u32 %p1, %r1, 8; mov.u32 %r5, 0x0; @%p1 ld.global.b32 { %r5 }, [ %rd4 + 0 ];"
#: The same with ``other`` = 0.
FILLED = "setp.lt.u32 %p1, %r1, 8; mov.b32 %r6, 0; mov.u32 %r5, %r6; @%p1 ld.global.b32 { %r5 }, [ %rd4 + 0 ];"


def stored(instructions: str, register: str = "%r7") -> str:
    return f"{instructions} st.global.b32 OUT, {register};"


def test_a_masked_load_without_other_must_not_be_stored() -> None:
    assert np.array_equal(run(stored(FILLED, "%r5"), LANES)[:, 0], np.where(LANES < 8, LANES, 0))
    with pytest.raises(Fault, match="24 stores of what depends on registers that nobody wrote"):
        run(stored(MASKED, "%r5"), LANES)
    assert np.array_equal(run(f"{MASKED} @%p1 st.global.b32 OUT, %r5;", LANES)[:8, 0], LANES[:8])


@pytest.mark.parametrize(
    "instructions",
    [
        "add.s32 %r7, %r5, 1;",
        "mul.lo.s32 %r7, %r5, 0;",
        "max.f32 %r7, %r5, 0f00000000;",
        "shl.b32 %r7, %r5, 31;",
        "prmt.b32 %r7, %r5, %r2, 0x4443;",
        "mov.b32 {%rs1, %rs2}, %r5; cvt.u32.u16 %r7, %rs2;",
        "xor.b32 %r7, %r5, %r5;",
        "and.b32 %r6, %r5, 0xFFFF; add.s16x2 %r7, %r6, %r2;",
        "cvt.rn.bf16x2.f32 %r7, 0f3F800000, %r5;",
        "shfl.sync.idx.b32 %r7, %r5, 9, 31, -1;",
        "shl.b32 %r7, %r2, %r5;",
        "setp.lt.s32 %p2, %r5, 0; selp.b32 %r7, 1, 2, %p2;",
        "selp.b32 %r7, %r5, 0, %p1; selp.b32 %r7, 0, %r5, %p1;",
        "shl.b32 %r6, %r1, 2; st.shared.b32 [%r6], %r5; bar.sync 0; ld.shared.b32 %r7, [%r6];",
        "mov.b32 %r6, 0; mov.b64 %rd5, {%r5, %r6}; add.f32x2 %rd5, %rd5, %rd5; mov.b64 {%r7, _}, %rd5;",
        "mul.lo.s32 %r9, %r1, 16; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9], {%r5}; bar.sync 0;"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r9];",
    ],
)
def test_holes_travel(instructions: str) -> None:
    with pytest.raises(Fault, match="stores of what depends on registers that nobody wrote"):
        run(stored(f"{MASKED} {instructions}"), LANES)
    run(stored(f"{FILLED} {instructions}"), LANES)


@pytest.mark.parametrize(
    ("instructions", "want"),
    [
        ("selp.b32 %r7, %r5, %r2, %p1;", np.where(LANES < 8, LANES, 7)),
        ("and.b32 %r7, %r5, 0;", 0 * LANES),
        ("or.b32 %r7, %r5, -1;", 0 * LANES + (2**32 - 1)),
        ("shl.b32 %r7, %r5, 16; cvt.u16.u32 %rs1, %r7; cvt.u32.u16 %r7, %rs1;", 0 * LANES),
        ("shr.u32 %r7, %r5, 16; mov.b32 {_, %rs1}, %r7; cvt.u32.u16 %r7, %rs1;", 0 * LANES),
        ("prmt.b32 %r7, %r5, %r2, 0x7654;", 0 * LANES + 7),
        ("and.b32 %r6, %r5, 0xFFFF; add.s16x2 %r7, %r6, 0x30000; shr.u32 %r7, %r7, 16;", 0 * LANES + 3),
        ("setp.lt.s32 %p2, %r5, 0; and.pred %p2, %p2, %p1; selp.b32 %r7, 1, 2, %p2;", 0 * LANES + 2),
        ("setp.lt.and.s32 %p2, %r5, 0, %p1; selp.b32 %r7, 1, 2, %p2;", 0 * LANES + 2),
        ("setp.lt.s32 %p2, %r5, 0; or.pred %p2, %p2, !%p1; selp.b32 %r7, 1, 2, %p2;", np.where(LANES < 8, 2, 1)),
        ("setp.lt.s32 %p2, %r5, 0; selp.b32 %r7, 7, %r2, %p2;", 0 * LANES + 7),
        (
            "cvt.rn.bf16x2.f32 %r7, 0f3F800000, %r5; mov.b32 {_, %rs1}, %r7; cvt.u32.u16 %r7, %rs1;",
            0 * LANES + 0x3F80,
        ),
        ("shfl.sync.idx.b32 %r7, %r5, 3, 31, -1;", 0 * LANES + 3),
        ("mov.b32 %r6, 0; mov.b64 %rd5, {%r5, %r6}; add.f32x2 %rd5, %rd5, %rd5; mov.b64 {_, %r7}, %rd5;", 0 * LANES),
        ("cvt.u64.u32 %rd5, %r5; mov.b64 {_, %r7}, %rd5;", 0 * LANES),
    ],
)
def test_what_does_not_depend_on_a_hole_has_none(instructions: str, want: np.ndarray) -> None:
    assert np.array_equal(run(stored(f"{MASKED} {instructions}"), LANES)[:, 0], want)


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        ("setp.lt.s32 %p2, %r5, 0; @%p2 bra A; A: st.global.b32 OUT, %r1;", "a predicate that depends"),
        ("setp.lt.s32 %p2, %r5, 0; @!%p2 st.global.b32 OUT, %r1;", "a predicate that depends"),
        ("mad.wide.u32 %rd5, %r5, 4, %rd1; st.global.b32 [%rd5], %r1;", "an address that depends"),
        ("shfl.sync.idx.b32 %r7, %r1, %r5, 31, -1;", "depend on what nobody wrote"),
        ("st.global.b32 OUT, %r50;", "32 stores"),
        ("@%p5 st.global.b32 OUT, %r1;", "a predicate that depends"),
    ],
)
def test_a_hole_decides_nothing(instructions: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        run(f"{MASKED} {instructions}", LANES)


def test_a_move_of_zero_that_no_masked_load_follows_is_a_zero() -> None:
    assert (run("mov.u32 %r5, 0x0; ld.global.b32 %r6, [%rd4]; st.global.b32 OUT, %r5;") == 0).all()
