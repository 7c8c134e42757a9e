"""Loads and stores of every space and width, shuffles and matrices; and the faults that they must find."""

from __future__ import annotations

import numpy as np
import pytest

from stepfusion.bench.ptx.launch import Options
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.memory import FRESH, OUTSIDE, WRITTEN
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.written_ptx import LANES, UNTOUCHED, run

WORDS = np.arange(128, dtype="u4")


def in_order(order: str) -> Options:
    return Options(order=order)


# Global memory


def test_vectors_with_cache_hints() -> None:
    body = (
        "mad.wide.u32 %rd5, %r1, 16, %rd2; ld.global.L1::evict_last.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd5 + 0 ];"
        "mad.wide.u32 %rd6, %r1, 16, %rd1; st.global.cs.v4.b32 [%rd6], {%r8, %r7, %r6, %r5};"
    )
    assert np.array_equal(run(body, WORDS, words=4), WORDS.reshape(32, 4)[:, ::-1])


def test_a_cache_policy() -> None:
    body = (
        "createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;"
        "ld.global.L1::evict_first.L2::cache_hint.b32 {%r5}, [%rd4+0], %rd9; st.global.b32 OUT, %r5;"
    )
    assert np.array_equal(run(body, LANES * 3)[:, 0], LANES * 3)


def test_bytes_are_extended_by_zeros_or_by_their_sign() -> None:
    address = "cvt.u64.u32 %rd7, %r1; add.s64 %rd5, %rd2, %rd7;"
    given = (np.arange(36) + 112).astype("u1")
    unsigned = f"{address} ld.global.nc.b8 %rs1, [%rd5+1]; cvt.u32.u16 %r5, %rs1; st.global.b32 OUT, %r5;"
    assert np.array_equal(run(unsigned, given)[:, 0], given[1:33].astype("u4"))
    extended = run(f"{address} ld.global.s8 %r5, [%rd5]; st.global.b32 OUT, %r5;", given)[:, 0]
    assert np.array_equal(extended.view("i4"), given[:32].view("i1"))


def test_words_of_64_bits() -> None:
    body = (
        "mad.wide.u32 %rd5, %r1, 8, %rd2; ld.global.b64 { %rd6 }, [ %rd5 + 0 ];"
        "mad.wide.u32 %rd7, %r1, 8, %rd1; st.global.b64 [%rd7], {%rd6};"
    )
    assert np.array_equal(run(body, WORDS[:64], words=2).reshape(-1), WORDS[:64])


def test_a_tensor_that_begins_between_two_elements() -> None:
    """Its address is a multiple of 2 alone, and half-words are read from it."""
    memory = np.zeros(70, "u2")
    given = memory[1:65] if memory.ctypes.data % 4 == 0 else memory[:64]
    given[:] = np.arange(64)
    body = (
        "mad.wide.u32 %rd5, %r1, 2, %rd2; ld.global.b16 %rs1, [%rd5]; cvt.u32.u16 %r5, %rs1; st.global.b32 OUT, %r5;"
    )
    assert np.array_equal(run(body, given)[:, 0], np.arange(32))


def test_parameters_are_extended_by_their_sign() -> None:
    assert (
        run("ld.param.s32 %rd5, [k_2]; mov.b64 {_, %r5}, %rd5; st.global.b32 OUT, %r5;", number=-3) == 2**32 - 1
    ).all()
    assert (run("ld.param.u32 %rd5, [k_2]; mov.b64 {_, %r5}, %rd5; st.global.b32 OUT, %r5;", number=-3) == 0).all()


def test_predicates_leave_the_other_lanes_alone() -> None:
    body = "setp.lt.u32 %p1, %r1, 5; @%p1 st.global.b32 OUT, %r1; @!%p1 st.global.b32 OUT, %r2;"
    assert np.array_equal(run(body)[:, 0], np.where(LANES < 5, LANES, 7))
    assert np.array_equal(
        run("setp.lt.u32 %p1, %r1, 5; @%p1 st.global.b32 OUT, %r1;")[5:], np.full((27, 1), UNTOUCHED)
    )


def test_registers_of_an_inner_scope_are_its_own() -> None:
    body = (
        "mov.b32 %r5, 1; { .reg .pred p; .reg .b32 %r5; setp.lt.u32 p, %r1, 5; mov.b32 %r5, 40;"
        "@p st.global.b32 OUT, %r5; @!p st.global.b32 OUT, %r2; } add.s32 %r6, %r5, 1;"
        "ld.global.b32 %r7, OUT; add.s32 %r7, %r7, %r6; st.global.b32 OUT, %r7;"
    )
    assert np.array_equal(run(body)[:, 0], np.where(LANES < 5, 42, 9))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("st.global.b32 [%rd3+4], %r1;", "1 accesses outside every tensor"),
        ("ld.global.b32 %r5, [%rd2+-4];", "32 accesses outside every tensor"),
        ("mov.b64 %rd5, 0; ld.global.b32 %r5, [%rd5];", "outside every tensor"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd4];", "16 misaligned"),
        ("add.s64 %rd5, %rd4, 2; ld.global.b32 %r5, [%rd5];", "32 misaligned"),
    ],
)
def test_a_wrong_address_is_a_fault(body: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        run(body, WORDS[:33] if "v2" in body else None)


def test_reads_of_what_nobody_wrote_and_of_gaps_are_faults() -> None:
    body = "ld.global.b32 %r5, [%rd4]; st.global.b32 OUT, %r5;"
    states = np.full(128, WRITTEN, np.uint8)
    assert np.array_equal(run(body, LANES, states=states)[:, 0], LANES)
    for state, words in ((FRESH, "1 reads of what nobody wrote"), (OUTSIDE, "1 accesses between the elements")):
        broken = states.copy()
        broken[41] = state
        with pytest.raises(Fault, match=words):
            run(body, LANES, states=broken)
    with pytest.raises(Fault, match="between the elements"):
        run("st.global.b32 [%rd4], %r1;", LANES, states=broken)
    fresh = np.full(128, FRESH, np.uint8)
    assert np.array_equal(run(f"st.global.b32 [%rd4], %r1; {body}", LANES * 0, states=fresh)[:, 0], LANES)


# Shared memory

EXCHANGE = "shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r1; bar.sync 0; xor.b32 %r6, %r5, 252;"
EXCHANGE += "ld.shared.b32 %r7, [%r6]; st.global.b32 OUT, %r7;"


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_in_every_order(order: str) -> None:
    assert np.array_equal(run(EXCHANGE, threads=64, options=in_order(order))[:, 0], 63 - np.arange(64))


def test_the_space_of_a_block_has_two_spellings_and_that_of_a_cluster_is_refused() -> None:
    spelt = EXCHANGE.replace(".shared", ".shared::cta")
    assert np.array_equal(run(spelt, threads=64), run(EXCHANGE, threads=64))
    with pytest.raises(Fault, match="unknown form"):
        run(EXCHANGE.replace(".shared", ".shared::cluster"), threads=64)


def test_shared_vectors_and_symbols() -> None:
    body = (
        "mov.u32 %r9, global_smem; shl.b32 %r5, %r1, 3; add.s32 %r5, %r5, %r9; st.shared.v2.b32 [%r5], {%r1, %r2};"
        "ld.shared.b32 %r7, [%r5+4]; ld.shared.b32 %r8, [%r5]; add.s32 %r7, %r7, %r8; st.global.b32 OUT, %r7;"
    )
    assert np.array_equal(run(body)[:, 0], LANES + 7)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("shl.b32 %r5, %r1, 4; st.shared.b32 [%r5], %r1;", "shared address 496 of 64"),
        ("shl.b32 %r5, %r1, 1; st.shared.b32 [%r5], %r1;", "not aligned"),
        ("mov.b32 %r5, 8; ld.shared.b32 %r6, [%r5];", "nobody wrote"),
    ],
)
def test_a_wrong_shared_address_is_a_fault(body: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        run(body, shared=64)


# Shuffles and matrices

SHUFFLES = [
    ("bfly", 16, 31, LANES ^ 16),
    ("bfly", 3, 31, LANES ^ 3),
    ("down", 4, 31, np.where(LANES + 4 < 32, LANES + 4, LANES)),
    ("up", 4, 0, np.where(LANES >= 4, LANES - 4, LANES)),
    ("idx", 9, 31, np.full(32, 9)),
    ("idx", 2, (24 << 8) + 31, (LANES & 24) | 2),
    ("bfly", 4, (28 << 8) + 31, np.where((LANES ^ 4) <= ((LANES & 28) | 3), LANES ^ 4, LANES)),
]


@pytest.mark.parametrize("order", ["together", "threads", "threads reversed"])
@pytest.mark.parametrize(("how", "by", "clamp", "want"), SHUFFLES)
def test_shuffles(how: str, by: int, clamp: int, want: np.ndarray, order: str) -> None:
    body = f"shfl.sync.{how}.b32 %r5, %r1, {by}, {clamp}, -1; st.global.b32 OUT, %r5;"
    got = run(body, options=in_order(order))[:, 0]
    assert np.array_equal(got, want)
    other = run(body.replace(f", {by},", f", {by + 1},"))[:, 0]
    assert not np.array_equal(other, want)


def test_each_lane_names_its_own_source() -> None:
    body = "xor.b32 %r6, %r1, 5; shfl.sync.idx.b32 %r5, %r1, %r6, 31, -1; st.global.b32 OUT, %r5;"
    assert np.array_equal(run(body, threads=64)[:, 0], np.arange(64) ^ 5)


FRAGMENTS = "mul.lo.s32 %r9, %r1, 16; or.b32 %r5, %r1, 0x10000; add.s32 %r6, %r1, 100;"
FRAGMENTS += "add.s32 %r7, %r1, 200; add.s32 %r8, %r1, 300;"
#: Lane 4 r + c holds row r, columns 2 c and 2 c + 1, of each matrix.
MATRICES = [(LANES | 0x10000).reshape(8, 4), *((LANES + n).reshape(8, 4) for n in (100, 200, 300))]


def test_stmatrix_puts_rows_where_lanes_say() -> None:
    body = (
        f"{FRAGMENTS} stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r9], {{%r5, %r6, %r7, %r8}}; bar.sync 0;"
        "ld.shared.v4.b32 {%r20,%r21,%r22,%r23}, [%r9]; mad.wide.u32 %rd6, %r1, 16, %rd1;"
        "st.global.v4.b32 [%rd6], {%r20,%r21,%r22,%r23};"
    )
    assert np.array_equal(run(body, words=4), np.concatenate(MATRICES))
    swapped = body.replace("{%r5, %r6,", "{%r6, %r5,")
    assert not np.array_equal(run(swapped, words=4), np.concatenate(MATRICES))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_reads_them_back(count: int) -> None:
    stored, loaded = (", ".join(f"%r{first + i}" for i in range(count)) for first in (5, 20))
    body = (
        f"{FRAGMENTS} stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r9], {{{stored}}}; bar.sync 0;"
        f"xor.b32 %r9, %r9, 16; ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{loaded}}}, [%r9];"
        f"mad.wide.u32 %rd6, %r1, {4 * count}, %rd1;"
    ) + "".join(f"st.global.b32 [%rd6+{4 * i}], %r{20 + i};" for i in range(count))
    swapped = [matrix[[1, 0, 3, 2, 5, 4, 7, 6]].reshape(-1) for matrix in MATRICES[:count]]
    assert np.array_equal(run(body, words=count), np.stack(swapped, axis=1))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("stores", [False, True])
def test_trans_exchanges_rows_and_columns(count: int, stores: bool) -> None:
    """Lane 4 r + c then holds column r, rows 2 c and 2 c + 1: 16 bits each."""
    stored, loaded = (", ".join(f"%r{first + i}" for i in range(count)) for first in (5, 20))
    words = [".trans" if turns else "" for turns in (stores, not stores)]
    body = (
        f"{FRAGMENTS} stmatrix.sync.aligned.m8n8.x{count}{words[0]}.shared.b16 [%r9], {{{stored}}}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{words[1]}.shared.b16 {{{loaded}}}, [%r9];"
        f"mad.wide.u32 %rd6, %r1, {4 * count}, %rd1;"
    ) + "".join(f"st.global.b32 [%rd6+{4 * i}], %r{20 + i};" for i in range(count))
    wanted = []
    for matrix in MATRICES[:count]:
        elements = [[int(word) >> shift & 0xFFFF for word in row for shift in (0, 16)] for row in matrix]
        wanted.append([elements[2 * c][r] | elements[2 * c + 1][r] << 16 for r in range(8) for c in range(4)])
    assert np.array_equal(run(body, words=count), np.array(wanted).T)
    assert not np.array_equal(run(body.replace(".trans", ""), words=count), np.array(wanted).T)


def test_memory_that_is_not_shared_is_a_fault_for_lanes_that_are_missing() -> None:
    apart = "setp.lt.u32 %p1, %r1, 5; @%p1 bra A; {} A: st.global.b32 OUT, %r1;"
    shuffle = "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;"
    matrix = "mov.b32 %r9, 0; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9], {%r1};"
    for instructions in (shuffle, matrix):
        with pytest.raises(Fault, match="not all lanes of a warp"):
            run(apart.replace("{}", instructions))
    with pytest.raises(Fault, match="not all named"):
        run(shuffle.replace("-1", "255"))
