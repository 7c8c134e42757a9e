"""Branches, barriers and orders of threads; and what is not known, which is an error."""

from __future__ import annotations

import numpy as np
import pytest

from stepfusion.bench.ptx.launch import Options, execute
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.memory import Extent, GlobalMemory
from stepfusion.bench.ptx.program import parse
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.written_ptx import UNTOUCHED, kernel, run

LOOP = (
    "mov.b32 %r5, 0; mov.b32 %r6, 0; A: add.s32 %r5, %r5, %r6; add.s32 %r6, %r6, 1; setp.le.u32 %p1, %r6, %r1;"
    "@%p1 bra A; setp.gt.u32 %p2, %r1, 20; @%p2 bra B; add.s32 %r5, %r5, 1000; bra.uni C; B: add.s32 %r5, %r5, 2000;"
    "C: shfl.sync.bfly.b32 %r7, %r5, 1, 31, -1; st.global.b32 OUT, %r7;"
)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_part_in_loops_and_branches_and_join_again(order: str) -> None:
    """The shuffle behind them is a fault unless all lanes of a warp reach it together."""
    want = [(i ^ 1) * ((i ^ 1) + 1) // 2 + (2000 if (i ^ 1) > 20 else 1000) for i in range(64)]
    assert run(LOOP, threads=64, options=Options(order=order))[:, 0].tolist() == want


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_waits_for_those_that_are_left(order: str) -> None:
    body = "setp.gt.u32 %p1, %r1, 40; @%p1 ret; bar.sync 0; st.global.b32 OUT, %r1;"
    got = run(body, threads=64, options=Options(order=order))[:, 0]
    assert np.array_equal(got, np.where(np.arange(64) > 40, UNTOUCHED, np.arange(64)))


def test_a_barrier_that_some_threads_pass_by_is_a_fault() -> None:
    body = "setp.lt.u32 %p1, %r1, 5; @%p1 bra A; bar.sync 0; bra.uni B; A: bar.sync 0; B: st.global.b32 OUT, %r1;"
    with pytest.raises(Fault, match="barrier that not all threads"):
        run(body)


def test_an_order_of_warps_shows_where_a_barrier_is_missing() -> None:
    """Each warp reads what the other wrote."""
    body = (
        "shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r2; bar.sync 0; st.shared.b32 [%r5], %r1; bar.sync 0;"
        "xor.b32 %r6, %r5, 128; ld.shared.b32 %r7, [%r6]; st.global.b32 OUT, %r7;"
    )
    bare = "bar.sync 0;".join(body.rsplit("bar.sync 0;", 1)[:1]) + body.rsplit("bar.sync 0;", 1)[1]
    right = np.arange(64) ^ 32
    for order in ORDERS:
        assert np.array_equal(run(body, threads=64, options=Options(order=order))[:, 0], right)
    results = {order: run(bare, threads=64, options=Options(order=order))[:, 0].tolist() for order in ORDERS}
    assert results["warps"] != results["warps reversed"]
    assert results["together"] == right.tolist()


def test_programs_have_their_place_in_the_grid() -> None:
    text = kernel(
        "mov.u32 %r5, %ctaid.x; mov.u32 %r6, %ctaid.y; mov.u32 %r7, %nctaid.x; mad.lo.s32 %r8, %r6, %r7, %r5;"
        "mad.lo.s32 %r8, %r8, 32, %r1; mad.wide.u32 %rd5, %r8, 4, %rd1; st.global.b32 [%rd5], %r8;"
    )
    out = np.zeros(32 * 6, "u4")
    execute(text, (3, 2), [out.ctypes.data, out.ctypes.data, 0], GlobalMemory([Extent(out.ctypes.data, out.nbytes)]))
    assert np.array_equal(out, np.arange(32 * 6))


UNKNOWN = """
tanh.approx.f32 %r5, %r1;
add.rz.f32 %r5, %r1, %r1;
add.sat.f32 %r5, %r1, %r1;
fma.rn.f64 %rd5, %rd1, %rd1, %rd1;
fma.f32 %r5, %r1, %r1, %r1;
max.f16 %rs1, %rs1, %rs1;
add.cc.s32 %r5, %r1, %r1;
mul.s32 %r5, %r1, %r1;
cvt.rn.relu.f16x2.f32 %r5, %r1, %r1;
cvt.f32.f16 %r5, %r1, %r1;
cvt.rz.f16.f32 %rs1, %r1;
cvt.sat.u16.u32 %rs1, %r1;
setp.lt.ftz.f32 %p1, %r1, %r1;
setp.lt.u32 %p1|%p2, %r1, %r1;
atom.global.add.u32 %r5, [%rd3], 1;
ld.global.acquire.b32 %r5, [%rd3];
ld.b32 %r5, [%rd3];
ld.global.v4.b32 {%r5, %r6}, [%rd3];
ld.local.b32 %r5, [%rd3];
st.param.b32 [k_2], %r1;
ld.param.b32 %r5, [k_9];
bar.sync 1;
bar.sync 0, 32;
bar.arrive 0, 32;
bar.warp.sync 15;
shfl.sync.bfly.b32 %r5|%p1, %r1, 1, 31, -1;
shfl.bfly.b32 %r5, %r1, 1, 31;
stmatrix.sync.aligned.m16n8.x2.trans.shared.b8 [%r1], {%r1, %r1};
bra.div A;
bra NOWHERE;
cp.async.cg.shared.global [%r1], [%rd4], 8;
cp.async.ca.shared.global [%r1], [%rd4], 32;
cp.async.ca.shared.global [%r1], [%rd4], %r2;
cp.async.ca.global.shared [%rd4], [%r1], 4;
cp.async.ca.shared.global.L2::cache_hint [%r1], [%rd4], 4, %rd1;
cp.async.wait_group %r1;
cp.async.wait_group -1;
cp.async.bulk.commit_group;
cp.async.mbarrier.arrive.shared.b64 [%r1];
mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r5,%r6,%r7,%r8}, {%r1,%r1}, {%r1}, {%r1,%r1,%r1,%r1};
mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r5,%r6,%r7,%r8}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%r1,%r1,%r1,%r1};
mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%r5,%r6,%r7,%r8}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%r1,%r1,%r1,%r1};
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r5,%r6,%r7,%r8}, {%r1,%r1}, {%r1,%r1}, {%r1,%r1,%r1,%r1};
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r5,%r6,%r7,%r8}, %rd1, %rd2, %p1, 1, 1, 0, 0;
wgmma.commit_group;
fence.proxy.alias;
mbarrier.arrive.shared::cta.b64 %rd5, [%r5];
mbarrier.init.shared::cta.b64 [%r1], 1;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%rd1];
trap;
mov.b32 %r5, 1.5;
mov.b64 %r5, %rd1;
add.s32 %rd5, %r1, %r99999;
mov.b32 %tid.x, %r1;
call f;
@%p1 bar.sync 0;
@%p1 wgmma.fence.sync.aligned;
"""


@pytest.mark.parametrize("instructions", UNKNOWN.strip().split("\n"))
def test_what_is_not_known_is_an_error(instructions: str) -> None:
    with pytest.raises(Fault):
        run(f"setp.eq.u32 %p1, %r1, %r1; {instructions} st.global.b32 OUT, %r1;")


def test_a_fault_names_the_instruction_and_its_line() -> None:
    text = kernel("\n.loc 1 42 7\nst.global.b32 [%rd3+-8], %r1;") + '.file 1 "/some/where/step.py"'
    memory = GlobalMemory([])
    with pytest.raises(Fault, match=r"st\.global\.b32 \[%rd3\+-8\], %r1 \(step\.py:42\): 32 accesses, but"):
        execute(text, (1,), [0, 0, 0], memory)


def test_a_text_without_a_kernel_and_a_wrong_call_are_faults() -> None:
    with pytest.raises(Fault, match="no kernel"):
        parse(".version 8.0")
    with pytest.raises(Fault, match="2 arguments for 3 parameters"):
        execute(kernel(""), (1,), [0, 0], GlobalMemory([]))
    with pytest.raises(Fault, match="multiple of 32"):
        parse(kernel("", threads=33))


def test_a_label_belongs_to_its_braces() -> None:
    """Loops of inline assembly all have the same one."""
    loop = "{ .reg .pred %more; again: add.s32 %r5, %r5, 1; setp.lt.u32 %more, %r5, LIMIT; @%more bra again; }"
    body = f"mov.b32 %r5, 0; {loop.replace('LIMIT', '%r1')} mul.lo.s32 %r6, %r5, 100; {loop.replace('LIMIT', '40')}"
    got = run(f"{body} add.s32 %r6, %r6, %r5; st.global.b32 OUT, %r6;")
    assert np.array_equal(got[:, 0], 100 * np.maximum(np.arange(32), 1) + 40)
    with pytest.raises(Fault, match="an unknown label"):
        run(f"{loop.replace('LIMIT', '4')} bra again;")
    with pytest.raises(Fault, match="the label again twice"):
        run(f"again: again: mov.b32 %r5, 0; {loop.replace('LIMIT', '4')}")
