"""wgmma: descriptors of matrices in shared memory, sums, and the order that registers and memory need."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stepfusion.bench.ptx.descriptors import Descriptors
from stepfusion.bench.ptx.launch import Options
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.matrices import SUM_ERROR
from stepfusion.bench.ptx.races import races
from stepfusion.bench.ptx.threads import Access
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.shared_matrices import half, number, placed
from stepfusion_testing.written_ptx import fault, run

MODES = {"none": 0, "128": 1, "64": 2, "32": 3}


def descriptor(start: int, leading: int, stride: int, mode: str) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[mode] << 62


COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
FENCE = "wgmma.fence.sync.aligned;"
PROXY = "fence.proxy.async.shared::cta;"
TRUE = "setp.eq.u32 %p1, %r1, %r1; setp.ne.u32 %p2, %r1, %r1;"
FIRST = 100  # register of the first accumulator


class Call:
    """A B of 64 x 16 and 16 x n by one warpgroup: the image of shared memory, and the pieces of a kernel."""

    def __init__(
        self, n: int = 16, kind: str = "bf16", modes: tuple[str, str] = ("128", "64"), across: int = 0
    ) -> None:
        rng = np.random.default_rng(n)
        self.n, self.kind = n, kind
        turns = (bool(across & 1), bool(across & 2))
        self.a, self.b = half(rng.standard_normal((64, 16)), kind), half(rng.standard_normal((n, 16)), kind)
        where_a, *parts_a, size_a = placed(modes[0], turns[0], 64)
        where_b, *parts_b, size_b = placed(modes[1], turns[1], n)
        image = np.zeros((size_a + size_b) // 2, "u2")
        image[where_a // 2], image[(size_a + where_b) // 2] = self.a, self.b
        self.image = image
        words = (descriptor(0, *parts_a, modes[0]), descriptor(size_a, *parts_b, modes[1]))
        self.descriptors = f"mov.b64 %rd10, {words[0]}; mov.b64 %rd11, {words[1]};"
        turned = ", ".join(str(int(turn)) for turn in turns)
        self.out = [f"%r{FIRST + i}" for i in range(n // 2)]
        self.clear = "".join(f"mov.b32 {name}, 0;" for name in self.out)
        shape = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
        self.product = f"{shape} {{{', '.join(self.out)}}}, %rd10, %rd11, %p1, 1, 1, {turned};"
        self.fill = self.filled()
        self.store = f"mad.wide.u32 %rd6, %r1, {2 * n}, %rd1;" + "".join(
            f"st.global.b32 [%rd6+{4 * i}], {name};" for i, name in enumerate(self.out)
        )

    def filled(self, threads: int = 128, step: str = "st.shared.b32 [%r7], %r8;") -> str:
        """The image, from the input into shared memory."""
        body = "shl.b32 %r5, %r1, 2; cvt.u64.u32 %rd7, %r5; add.s64 %rd7, %rd7, %rd2;"
        for i in range(0, self.image.nbytes, 4 * threads):
            body += f"add.s32 %r7, %r5, {i}; ld.global.b32 %r8, [%rd7+{i}]; {step}"
        return body

    def body(self) -> str:
        return (
            f"{TRUE} {self.descriptors} {self.clear} {self.fill} {PROXY} bar.sync 0; {FENCE} {self.product} {COMMIT}"
            f"{WAIT} {self.store}"
        )

    def run(
        self, body: str | None = None, log: list[Access] | None = None, order: str = "together", **more: object
    ) -> np.ndarray:
        """The result, float32 [64, n]."""
        options = Options(order=order, log=log, worst=bool(more.get("worst", False)))
        given = {"words": self.n // 2, "threads": 128, "shared": self.image.nbytes, "options": options}
        got = run(self.body() if body is None else body, self.image, **given).view("f4")  # type: ignore[arg-type]
        result = np.full((64, self.n), np.nan, "f4")
        for thread, i in itertools.product(range(128), range(self.n // 2)):  # d_i, by the formulas of the PTX ISA
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            result[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = got[thread, i]
        return result

    def exact(self) -> np.ndarray:
        return number(self.a, self.kind) @ number(self.b, self.kind).T


@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=2)))
@pytest.mark.parametrize("across", range(4))
def test_layouts(across: int, modes: tuple[str, str]) -> None:
    call = Call(64, modes=modes, across=across)
    assert np.array_equal(call.run(), call.exact().astype("f4"))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_widths_and_types(n: int, kind: str) -> None:
    call = Call(n, kind, ("128", "128"))
    assert np.array_equal(call.run(), call.exact().astype("f4"))


def test_a_layout_that_is_not_the_one_that_is_there_gives_something_else() -> None:
    call = Call(64, modes=("128", "64"))
    right = call.descriptors
    for change in (2 << 62 ^ 1 << 62, 64 << 32, 2):
        call.descriptors = f"{right} xor.b64 %rd10, %rd10, {change};"
        assert not np.array_equal(call.run(), call.exact().astype("f4"))


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same(order: str) -> None:
    log: list[Access] = []
    call = Call()
    assert np.array_equal(call.run(log=log, order=order), call.exact().astype("f4"))
    assert not races(log)


def test_sums_signs_and_what_is_not_kept() -> None:
    call = Call()
    ones = call.clear.replace(", 0;", ", 0x3f800000;")
    exact, body = call.exact(), call.body()
    twice = body.replace(call.product, 2 * call.product)
    wanted = {
        body.replace(call.clear, ones): exact + 1,
        body.replace(call.clear, ones).replace("%p1, 1, 1", "%p2, 1, 1"): exact,
        body.replace(call.clear, "").replace("%p1, 1, 1", "%p2, 1, 1"): exact,
        body.replace(call.clear, ones).replace("%p1, 1, 1", "%p1, -1, 1"): 1 - exact,
        body.replace(call.clear, ones).replace("%p1, 1, 1", "%p1, 1, -1"): 1 - exact,
        body.replace("%p1, 1, 1", "%p1, -1, -1"): exact,
        twice: exact.astype("f4") + exact,
    }
    for text, want in wanted.items():
        assert np.array_equal(call.run(text), want.astype("f4"))
    with pytest.raises(Fault, match="what depends on registers that nobody wrote"):
        call.run(body.replace(call.clear, ""))


def test_in_the_worst_case_sums_err_by_what_is_allowed() -> None:
    call = Call()
    size = np.abs(number(call.a, "bf16")) @ np.abs(number(call.b, "bf16")).T
    error = (call.exact() - call.run(worst=True)) * np.sign(call.exact())
    assert (error > 0.9 * SUM_ERROR * size).all()
    assert (error < 1.1 * SUM_ERROR * size).all()


def from_registers(call: Call) -> tuple[str, str]:
    """A kernel whose A lies in registers %r20 to %r23, and the loads of them."""
    fragments = np.zeros((128, 4), "u4")
    for thread, i in itertools.product(range(128), range(8)):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
        fragments[thread, i // 2] |= np.uint32(
            int(call.a[row, thread % 4 * 2 + i % 2 + 8 * (i // 4)]) << 16 * (i % 2)
        )
    image = call.image.nbytes
    call.image = np.concatenate((call.image, fragments.reshape(-1).view("u2")))
    loads = "mad.wide.u32 %rd8, %r1, 16, %rd2;" + "".join(
        f"ld.global.b32 %r{20 + i}, [%rd8+{image + 4 * i}];" for i in range(4)
    )
    return call.body().replace("%rd10, %rd11, %p1, 1, 1, 0, 0", "{%r20,%r21,%r22,%r23}, %rd11, %p1, 1, 1, 0"), loads


def test_a_from_registers() -> None:
    call = Call()
    body, loads = from_registers(call)
    assert np.array_equal(call.run(loads + body), call.exact().astype("f4"))
    with pytest.raises(Fault, match=r"registers that were used, and no wgmma\.fence since"):
        call.run(body.replace(FENCE, FENCE + loads))
    with pytest.raises(Fault, match="a register of a wgmma that nobody waited for"):
        call.run(loads + body.replace(COMMIT, COMMIT + "mov.b32 %r21, 0;"))
    with pytest.raises(Fault, match="what depends on registers that nobody wrote"):
        call.run(loads + "setp.ne.u32 %p3, %r1, 77; mov.u32 %r22, 0x0; @%p3 ld.global.b32 {%r22}, [%rd8];" + body)


# What must lie before and behind


def test_registers_need_a_fence() -> None:
    call = Call()
    body, words = call.body(), "registers that were used, and no wgmma.fence since"
    for broken in (
        body.replace(FENCE, ""),
        body.replace(FENCE, f"{FENCE} mov.b32 {call.out[3]}, 0;"),
        body.replace(WAIT, f"{WAIT} add.f32 %r20, {call.out[0]}, 0f00000000; {call.product} {COMMIT} {WAIT}"),
    ):
        with pytest.raises(Fault, match=words):
            call.run(broken)
    call.run(body.replace(WAIT, f"{WAIT} {call.product} {COMMIT} {WAIT}"))  # nobody has touched them
    wider = Call(24)
    other = wider.product.replace("%rd11, %p1", "%rd10, %p2")
    shared = body.replace(WAIT, f"{WAIT} HERE {other} {COMMIT} {WAIT}")
    with pytest.raises(Fault, match=words):  # of another shape
        call.run(shared.replace("HERE", ""))
    call.run(shared.replace("HERE", FENCE))


@pytest.mark.parametrize("order", ORDERS)
def test_results_must_be_waited_for(order: str) -> None:
    call = Call()
    for broken in (
        call.body().replace(WAIT, ""),
        call.body().replace(COMMIT, ""),
        call.body().replace(WAIT, "wgmma.wait_group.sync.aligned 1;"),
        call.body().replace(WAIT, f"mov.b32 {call.out[5]}, 0; {WAIT}"),
    ):
        with pytest.raises(Fault, match="a register of a wgmma that nobody waited for"):
            call.run(broken, order=order)


def test_a_wait_names_the_newest_groups_that_may_still_be_missing() -> None:
    call = Call()
    second = call.product
    for i, name in enumerate(call.out):
        second = second.replace(name, f"%r{FIRST + 50 + i}")
    clear = "".join(f"mov.b32 %r{FIRST + 50 + i}, 0;" for i in range(len(call.out)))
    body = clear + call.body().replace(WAIT, f"{second} {COMMIT} wgmma.wait_group.sync.aligned 1;")
    assert np.array_equal(call.run(body), call.exact().astype("f4"))
    with pytest.raises(Fault, match="nobody waited for"):
        call.run(body.replace(f", {call.out[0]};", f", %r{FIRST + 50};"))


def test_the_asynchronous_proxy_needs_a_fence() -> None:
    """Of the threads that write, before the barrier, or of those that read, behind it."""
    call, words = Call(), "no fence.proxy.async has made visible"
    body = call.body()
    call.run(body.replace(f"{PROXY} bar.sync 0;", f"bar.sync 0; {PROXY}"))
    call.run(body.replace(PROXY, "fence.proxy.async;"))
    call.run(body.replace(f"{PROXY} bar.sync 0;", f"bar.sync 0; {PROXY} bar.sync 0;"))
    one = "setp.lt.u32 %p3, %r1, 32;"
    for broken in (
        body.replace(PROXY, ""),
        body.replace(call.fill, PROXY + call.fill).replace(f"{PROXY} bar", "bar"),
        body.replace(PROXY, f"{one} @%p3 {PROXY}"),  # of the first warp, which has not written all
        body.replace(f"{PROXY} bar.sync 0;", f"bar.sync 0; {one} @%p3 {PROXY}"),
        body.replace(f"{PROXY} bar.sync 0;", PROXY),
    ):
        with pytest.raises(Fault, match=words):
            call.run(broken)
    # of one warp, but with a barrier before and behind it
    call.run(body.replace(f"{PROXY} bar.sync 0;", f"bar.sync 0; {one} @%p3 {PROXY} bar.sync 0;"))


def test_cp_async_writes_through_the_other_proxy_too() -> None:
    call = Call()
    step = "cvt.u64.u32 %rd8, %r7; add.s64 %rd8, %rd8, %rd2; cp.async.ca.shared.global [%r7], [%rd8], 4;"
    call.fill = call.filled(step=step)
    arrive = "cp.async.wait_all;"
    body = call.body().replace(PROXY, arrive + PROXY)
    assert np.array_equal(call.run(body), call.exact().astype("f4"))
    with pytest.raises(Fault, match=r"no fence\.proxy\.async"):
        call.run(body.replace(arrive + PROXY, PROXY + arrive))
    with pytest.raises(Fault, match=r"reads of shared memory that a cp\.async, which nobody waited for"):
        call.run(body.replace(arrive, ""))


def test_shared_memory_is_read_until_the_wait() -> None:
    call = Call()
    write = "st.shared.b32 [%r5], %r1;"
    with pytest.raises(Fault, match="writes of shared memory that a wgmma, which nobody waited for, reads"):
        call.run(call.body().replace(WAIT, write + WAIT))
    copy = "cp.async.ca.shared.global [%r5], [%rd2], 4;"
    with pytest.raises(Fault, match="writes of shared memory that a wgmma, which nobody waited for, reads"):
        call.run(call.body().replace(WAIT, copy + WAIT))
    # the warp that writes has waited; the others, for all that anybody knows, have not
    log: list[Access] = []
    call.run(call.body().replace(WAIT, f"{WAIT} bar.sync 0; {write}"), log=log)
    assert not races(log)
    body = call.body().replace(WAIT, f"{WAIT} {write}")
    for order in ORDERS:
        log.clear()
        found = fault(lambda order=order: call.run(body, log=log, order=order))
        assert races(log) if found is None else "writes of shared memory that a wgmma" in found


def test_a_barrier_between_the_issue_and_the_wait_orders_nothing() -> None:
    call = Call()
    log: list[Access] = []
    last = f"bar.sync 0; mov.b32 %r6, 0; setp.gt.u32 %p3, %r1, 127; @%p3 st.shared.b32 [%r6], %r1; {WAIT}"
    call.run(call.body().replace(WAIT, last), log=log)
    assert not races(log)
    with pytest.raises(Fault, match="nobody waited for"):
        call.run(call.body().replace(WAIT, last.replace("127", "126")), log=log)


def test_a_missing_barrier_before_the_product_is_found() -> None:
    call = Call()
    for order in ORDERS:
        with pytest.raises(Fault, match=r"nobody wrote|no fence\.proxy\.async"):
            call.run(call.body().replace("bar.sync 0;", ""), order=order)


@pytest.mark.parametrize(
    ("thread", "offset", "stored"),
    [
        # word t of the image holds elements 2 t and 2 t + 1 of 8 x 8, which is row t / 4 of A
        (8, 0, ".lt.u32 %p4, %r1, 8; setp.gt.or.u32 %p4, %r1, 11, %p4;"),  # threads 8 to 11 hold row 2
        (40, 2048, ".ge.u32 %p4, %r1, 0;"),  # between the two halves of A along K there is room
        # B begins at 5120, and word 0 of it lies in column 0, which threads 4 i hold
        (0, 5120, ".ne.u32 %p4, %r9, 0;"),
    ],
)
def test_holes_of_memory_spoil_rows_and_columns(thread: int, offset: int, stored: str) -> None:
    call = Call(modes=("none", "none"))
    assert int(call.descriptors.split("%rd11, ")[1][:-1]) & 0x3FFF == descriptor(5120, 0, 0, "none")
    load = f"ld.global.b32 %r8, [%rd7+{offset}];"
    hole = f"setp.ne.u32 %p3, %r1, {thread}; mov.u32 %r8, 0x0; @%p3 ld.global.b32 {{%r8}}, [%rd7+{offset}];"
    body = call.body().replace(load, hole)
    only = call.store.replace("st.global", "@%p4 st.global")
    untouched = "ge.u32" in stored
    if not untouched:
        with pytest.raises(Fault, match="stores of what depends on registers that nobody wrote"):
            call.run(body)
    call.run(body.replace(call.store, f"and.b32 %r9, %r1, 3; setp{stored} {only}"))


@pytest.mark.parametrize("order", ORDERS)
def test_a_whole_warpgroup_must_come(order: str) -> None:
    call = Call()
    apart = "setp.gt.u32 %p3, %r1, 95; @%p3 bra A;"
    with pytest.raises(Fault, match="not all warps of a warpgroup"):
        call.run(call.body().replace(FENCE, FENCE + apart).replace(COMMIT, "A:" + COMMIT), order=order)
    with pytest.raises(Fault, match="not all lanes of a warp"):
        call.run(call.body().replace(FENCE, f"setp.gt.u32 %p3, %r1, 99; @%p3 bra A; {FENCE} A:"), order=order)
    with pytest.raises(Fault, match="unknown product of a warpgroup"):
        run(call.body(), call.image, words=8, threads=64, shared=call.image.nbytes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("shr.u32 %r6, %r1, 5; cvt.u64.u32 %rd8, %r6; add.s64 %rd10, %rd10, %rd8;", "do not agree on"),
        ("setp.lt.u32 %p1, %r1, 64;", "do not agree on"),
        ("mov.b64 %rd11, %rd20;", "a descriptor or a predicate that depends on what nobody wrote"),
        ("or.b64 %rd10, %rd10, 16384;", "bits that mean nothing"),
        ("or.b64 %rd10, %rd10, 4611686018427387903;", "bits that mean nothing"),
        (f"or.b64 %rd10, %rd10, {1 << 49};", "a base offset"),
        ("add.s64 %rd11, %rd11, 16383;", "bits that mean nothing"),
        ("add.s64 %rd11, %rd11, 64;", "outside, or not aligned"),
    ],
)
def test_what_descriptors_may_not_be(change: str, words: str) -> None:
    call = Call()
    with pytest.raises(Fault, match=words):
        call.run(call.body().replace(call.descriptors, call.descriptors + change))


def test_what_nobody_wrote_must_not_be_read() -> None:
    call = Call()
    with pytest.raises(Fault, match="nobody wrote"):
        call.run(call.body().replace("st.shared.b32 [%r7], %r8;", "", 1))


def test_a_descriptor_is_decoded() -> None:
    found = Descriptors.of(np.array([descriptor(0x3FFF0, 0x120, 0x340, "64")], "u8"))
    assert (found.start, found.leading, found.stride, found.width) == (0x3FFF0, 0x120, 0x340, 64)


UNKNOWN = """
m64n12k16.f32.bf16.bf16
m64n264k16.f32.bf16.bf16
m64n16k8.f32.bf16.bf16
m64n16k16.f16.f16.f16
m64n16k16.f32.bf16.f16
m64n16k32.f32.e4m3.e4m3
"""


@pytest.mark.parametrize("shape", UNKNOWN.split())
def test_other_products_are_unknown(shape: str) -> None:
    call = Call()
    with pytest.raises(Fault, match=r"unknown (product|instruction) of a warpgroup"):
        call.run(call.body().replace("m64n16k16.f32.bf16.bf16", shape))


@pytest.mark.parametrize(
    "numbers",
    ["%p1, 2, 1, 0, 0", "%p1, 1, 1, 0, 2", "%p1, 1, 1, 0", "%p1, 1, 1", "%p1, %r1, 1, 0, 0", "1, 1, 1, 0, 0, 0"],
)
def test_other_signs_and_transpositions_are_unknown(numbers: str) -> None:
    call = Call()
    with pytest.raises(Fault, match=r"unknown|must be numbers"):
        call.run(call.body().replace("%p1, 1, 1, 0, 0", numbers))
