"""Races between threads, warps and blocks, and what orders them."""

from __future__ import annotations

import numpy as np
import pytest

from stepfusion.bench.ptx.launch import Options, execute
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.memory import Extent, GlobalMemory
from stepfusion.bench.ptx.races import Race, races
from stepfusion.bench.ptx.threads import Access
from stepfusion_testing.written_ptx import kernel, run

#: Every thread writes a word, and reads the one of another.
EXCHANGE = "shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r2; bar.sync 0; st.shared.b32 [%r5], %r1; bar.sync 0;"
EXCHANGE += "xor.b32 %r6, %r5, {}; ld.shared.b32 %r7, [%r6]; st.global.b32 OUT, %r7;"
WARPS, LANES = EXCHANGE.replace("{}", "128"), EXCHANGE.replace("{}", "4")


def found(body: str, threads: int = 64, order: str = "together") -> int:
    log: list[Access] = []
    run(body, threads=threads, options=Options(order=order, log=log))
    return sum(races(log).values())


def without(body: str, text: str, which: int) -> str:
    parts = body.split(text)
    return text.join(parts[: which + 1]) + text.join(parts[which + 1 :])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("body", [WARPS, LANES])
def test_barriers_order_threads(body: str, order: str) -> None:
    assert found(body, order=order) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_a_race(order: str) -> None:
    assert found(without(WARPS, "bar.sync 0;", 1), order=order) == 64 * 4
    assert found(without(LANES, "bar.sync 0;", 1), order=order) == 64 * 4


def test_a_warp_orders_its_own_lanes_and_no_others() -> None:
    fence = "bar.warp.sync -1;"
    body = LANES.replace("bar.sync 0;", fence)
    assert found(body) == 0
    assert found(body.replace(fence, "")) > 0
    assert found(WARPS.replace("bar.sync 0;", fence)) > 0


def test_a_shuffle_orders_nothing() -> None:
    assert found(LANES.replace("bar.sync 0;", "shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;")) > 0


def test_one_value_written_by_many_is_no_race() -> None:
    body = "mov.b32 %r5, 0; st.shared.b32 [%r5], {}; bar.sync 0; ld.shared.b32 %r6, [%r5]; st.global.b32 OUT, %r6;"
    assert found(body.replace("{}", "%r2")) == 0
    assert found(body.replace("{}", "%r1")) > 0


@pytest.mark.parametrize("barrier", [True, False])
@pytest.mark.parametrize("first", [0, 4, 6])
def test_accesses_of_different_widths_conflict_where_they_overlap(first: int, *, barrier: bool) -> None:
    """Each thread writes 8 bytes, and reads 2 of those of a thread of the other warp."""
    body = "shl.b32 %r5, %r1, 3; xor.b32 %r6, %r5, 256; st.shared.v2.b32 [%r5], {%r1, %r2};"
    body += "bar.sync 0;" * barrier
    log: list[Access] = []
    run(f"{body} ld.shared.b16 %rs1, [%r6+{first}];", threads=64, shared=512, options=Options(log=log))
    assert races(log) == ({} if barrier else {Race("shared", ("read ", "write ")): 64 * 2})


def blocks(body: str) -> list[Access]:
    """The accesses of two blocks."""
    log: list[Access] = []
    out = np.zeros(64, "u4")
    memory = GlobalMemory([Extent(out.ctypes.data, out.nbytes)])
    execute(kernel(body), (2,), [out.ctypes.data] * 2 + [0], memory, 128, Options(log=log))
    return log


def test_blocks_are_ordered_by_nothing() -> None:
    log = blocks("mov.u32 %r5, %ctaid.x; st.global.b32 OUT, %r5;")
    assert races(log) == {Race("global", ("write ",)): 32}  # of each word the byte that differs
    assert races(blocks("st.global.b32 OUT, %r1;")) == {}
    shared = "shl.b32 %r5, %r1, 2; mov.u32 %r6, %ctaid.x; st.shared.b32 [%r5], %r6;"
    assert races(blocks(shared)) == {}  # each block has memory of its own


def test_memory_in_which_races_are_meant_is_left_out() -> None:
    log = blocks("mov.u32 %r5, %ctaid.x; st.global.b32 OUT, %r5;")
    start = min(int(access.addresses.min()) for access in log if access.space == "global")
    assert races(log, [(start, 64)]) == {Race("global", ("write ",)): 16}
    assert races(log, [(start, 128)]) == {}
