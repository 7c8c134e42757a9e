"""cp.async: what arrives in shared memory and when, what it reads, and what is wrong without a wait or a barrier."""

from __future__ import annotations

import numpy as np
import pytest

from stepfusion.bench.ptx.launch import Options
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.memory import FRESH, WRITTEN
from stepfusion.bench.ptx.races import races
from stepfusion.bench.ptx.threads import Access
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.written_ptx import fault, run

THREADS = 64
BYTES = np.random.default_rng(0).integers(0, 256, 16 * THREADS).astype("u1")
#: %r5: a place of 16 bytes for each thread; %r6: that of a thread of the other warp; %rd5: 16 bytes of the input.
PLACES = "shl.b32 %r5, %r1, 4; xor.b32 %r6, %r5, 512; mad.wide.u32 %rd5, %r1, 16, %rd2;"
COPY = "cp.async.cg.shared.global [%r5], [%rd5], 16;"
WAIT = "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
#: Every thread puts the 16 bytes at %r6 into the output.
READ = (
    "ld.shared.v4.b32 {%r10,%r11,%r12,%r13}, [%r6]; mad.wide.u32 %rd6, %r1, 16, %rd1;"
    "st.global.v4.b32 [%rd6], {%r10,%r11,%r12,%r13};"
)


def copied(body: str, *, order: str = "together", log: list[Access] | None = None, shared: int = 2048) -> np.ndarray:
    """Bytes of each thread's output [64, 16]."""
    options = Options(order=order, log=log)
    return run(PLACES + body, BYTES, words=4, threads=THREADS, shared=shared, options=options).view("u1")


def others() -> np.ndarray:
    return np.roll(BYTES.reshape(THREADS, 16), 32, axis=0)


@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_arrives_with_its_group(order: str) -> None:
    log: list[Access] = []
    assert np.array_equal(copied(COPY + WAIT + READ, order=order, log=log), others())
    assert not races(log)


@pytest.mark.parametrize(("op", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_sizes(op: str, size: int) -> None:
    clear = "mov.b32 %r7, 0; st.shared.v4.b32 [%r5], {%r7,%r7,%r7,%r7};"
    got = copied(f"{clear} cp.async.{op}.shared.global.L2::128B [ %r5 + 0 ], [ %rd5 + 0 ], {size:#x}; {WAIT} {READ}")
    assert np.array_equal(got, np.where(np.arange(16) < size, others(), 0))


@pytest.mark.parametrize("size", [0, 1, 6, 12, 16])
def test_what_is_not_read_is_filled_with_zeros(size: int) -> None:
    got = copied(f"cp.async.cg.shared.global [%r5], [%rd5], 16, {size}; {WAIT} {READ}")
    assert np.array_equal(got, np.where(np.arange(16) < size, others(), 0))


def test_each_thread_has_its_own_size_and_reads_nothing_for_a_size_of_0() -> None:
    """The upper warp's addresses lie outside the input."""
    body = "setp.lt.u32 %p1, %r1, 32; selp.b32 %r7, 8, 0, %p1; mov.b64 %rd6, 0; selp.b64 %rd5, %rd5, %rd6, %p1;"
    body += f"cp.async.ca.shared.global [%r5], [%rd5], 8, %r7; {WAIT}"
    body += "ld.shared.v2.b32 {%r10,%r11}, [%r6]; mad.wide.u32 %rd6, %r1, 16, %rd1; mov.b32 %r12, 0;"
    got = copied(f"{body} st.global.v4.b32 [%rd6], {{%r10,%r11,%r12,%r12}};")
    want = np.where((np.arange(16) < 8) & (np.arange(THREADS) >= 32)[:, None], others(), 0)
    assert np.array_equal(got, want)
    with pytest.raises(Fault, match="outside every tensor"):
        copied(f"{body.replace('selp.b32 %r7, 8, 0', 'selp.b32 %r7, 8, 4')} ret;")


def test_a_predicate_leaves_threads_out() -> None:
    guarded = f"setp.lt.u32 %p1, %r1, 32; @%p1 {COPY} {WAIT} @!%p1 bra A; ret; A: {READ}"
    assert np.array_equal(copied(guarded)[32:], others()[32:])
    with pytest.raises(Fault, match="nobody wrote"):
        copied(guarded.replace("@!%p1 bra", "@%p1 bra"))


TWO = (
    f"{COPY} cp.async.commit_group; add.s32 %r7, %r5, 1024; add.s32 %r8, %r6, 1024;"
    "cp.async.cg.shared.global [%r7], [%rd5], 16; cp.async.commit_group; cp.async.wait_group {}; bar.sync 0;"
)


def test_a_wait_names_the_newest_groups_that_may_still_be_missing() -> None:
    second = READ.replace("%r6", "%r8")
    assert np.array_equal(copied(TWO.format(0) + second), others())
    assert np.array_equal(copied(TWO.format(1) + READ), others())
    for body in (TWO.format(1) + second, TWO.format(2) + READ):
        with pytest.raises(Fault, match=r"reads of shared memory that a cp\.async, which nobody waited for"):
            copied(body)


def test_wait_all_needs_no_group() -> None:
    assert np.array_equal(copied(f"{COPY} cp.async.wait_all; bar.sync 0; {READ}"), others())
    with pytest.raises(Fault, match="nobody waited for"):
        copied(f"{COPY} cp.async.wait_group 0; bar.sync 0; {READ}")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (f"{COPY} cp.async.commit_group; bar.sync 0; {READ}", "reads of shared memory that a cp.async"),
        (f"st.shared.b32 [%r5], %r1; {COPY} bar.sync 0; {READ}", "reads of shared memory that a cp.async"),
        (f"{COPY} cp.async.commit_group; st.shared.b32 [%r5], %r1;", "writes of shared memory that a cp.async"),
        (
            f"{COPY} bar.sync 0; cp.async.cg.shared.global [%r6], [%rd5], 16;",
            "writes of shared memory that a cp.async",
        ),
        ("mov.b32 %r5, 0;" + COPY, "(copies of different values|that a cp.async, which)"),
    ],
)
def test_what_is_in_flight_must_be_left_alone(body: str, words: str, order: str) -> None:
    with pytest.raises(Fault, match=words):
        copied(body, order=order)


def test_several_threads_may_copy_the_same() -> None:
    body = f"mov.b32 %r5, 0; mov.b64 %rd5, %rd2; {COPY} {WAIT} mov.b32 %r6, 0; {READ}"
    log: list[Access] = []
    assert np.array_equal(copied(body, log=log), np.broadcast_to(BYTES[:16], (THREADS, 16)))
    assert not races(log)


def test_groups_that_nobody_waits_for_are_no_fault_if_nobody_reads_them() -> None:
    log: list[Access] = []
    copied(f"{COPY} cp.async.commit_group; st.global.b32 OUT, %r1;", log=log)
    assert not races(log)
    assert sum(access.write for access in log if access.space == "shared") == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "body",
    [
        # the other warp reads without a barrier behind the wait
        f"st.shared.v4.b32 [%r5], {{%r1,%r1,%r1,%r1}}; bar.sync 0; {COPY} {WAIT.replace('bar.sync 0;', '')} {READ}",
        # the copy is issued before the other warp has read what it replaces
        f"st.shared.v4.b32 [%r5], {{%r1,%r1,%r1,%r1}}; bar.sync 0; {READ} {COPY} {WAIT}",
        # it arrives long after a barrier; what lies between its issue and its wait conflicts, too
        f"{COPY} bar.sync 0; setp.gt.u32 %p1, %r1, 99; @%p1 st.shared.b32 [%r6], %r1; {WAIT} {READ}",
    ],
)
def test_a_missing_barrier_is_a_race(body: str, order: str) -> None:
    log: list[Access] = []
    if "gt.u32" in body:
        copied(body, order=order, log=log)
        assert not races(log)
        body = body.replace("99", "31")
    found = fault(lambda: copied(body, order=order, log=log))
    assert races(log) if found is None else "which nobody waited for" in found  # if this order came to it


def test_a_barrier_between_is_no_race() -> None:
    log: list[Access] = []
    body = f"st.shared.v4.b32 [%r5], {{%r1,%r1,%r1,%r1}}; bar.sync 0; {READ} bar.sync 0; {COPY} {WAIT}"
    copied(body, log=log)
    assert not races(log)


def test_a_read_of_global_memory_lasts_until_the_wait() -> None:
    log: list[Access] = []
    body = f"{COPY} bar.sync 0; {{}} mad.wide.u32 %rd6, %r6, 1, %rd2; st.global.b32 [%rd6], %r2; {WAIT}"
    copied(body.replace("{}", ""), log=log)
    assert {race.space for race in races(log)} == {"global"}
    log.clear()
    copied(body.replace("{}", "cp.async.wait_all; bar.sync 0;"), log=log)
    assert not races(log)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("add.s64 %rd5, %rd5, 16;" + COPY, "1 accesses outside every tensor"),
        ("add.s64 %rd5, %rd2, 8;" + COPY, "64 misaligned copies of 16 bytes"),
        ("add.s64 %rd5, %rd2, 8; cp.async.cg.shared.global [%r5], [%rd5], 16, 8;", "misaligned copies"),
        ("add.s32 %r5, %r5, 8;" + COPY, "not aligned"),
        ("add.s32 %r5, %r5, 1040;" + COPY, "shared address 2048 of 2048"),
        ("cp.async.cg.shared.global [%r5], [%rd5], 16, 17;", "17 bytes of a copy of 16"),
        ("cp.async.cg.shared.global [%r5], [%rd5], 16, %r77;", "a size that depends on what nobody wrote"),
        ("cp.async.cg.shared.global [%r77], [%rd5], 16;", "an address that depends on what nobody wrote"),
    ],
)
def test_a_wrong_address_or_size_is_a_fault(body: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        copied(body)


def test_a_copy_of_what_nobody_wrote_is_a_fault() -> None:
    states = np.full(len(BYTES), WRITTEN, np.uint8)
    states[333] = FRESH
    with pytest.raises(Fault, match="1 reads of what nobody wrote"):
        run(PLACES + COPY, BYTES, words=4, threads=THREADS, shared=2048, states=states)
    run(PLACES + COPY.replace("16;", "16, 0;"), BYTES, words=4, threads=THREADS, shared=2048, states=states)
