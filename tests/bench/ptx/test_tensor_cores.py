"""tcgen05 and mbarrier: layouts, sums, tensor memory, and what must be waited for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stepfusion.bench.ptx.launch import Options
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.matrices import SUM_ERROR
from stepfusion.bench.ptx.races import races
from stepfusion.bench.ptx.tensor_products import Form
from stepfusion.bench.ptx.threads import Access
from stepfusion.bench.ptx.types import Fault
from stepfusion_testing.shared_matrices import half, number, placed
from stepfusion_testing.written_ptx import run

MODES = {"none": 0, "128": 2, "64": 4, "32": 6}
BAR = "bar.sync 0;"
PROXY = "fence.proxy.async.shared::cta;"
WAIT_LD, WAIT_ST = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
LARGE: tuple[int, int, str, tuple[str, str]] = (128, 32, "bf16", ("128", "64"))
SOME_ORDERS = ("together", "warps", "threads reversed")
FIRST = 100  # register of the first sum that a thread loads
TAIL = 64  # bytes behind the matrices: the address of the tensor memory, and at 16 and 24 mbarriers


def descriptor(start: int, leading: int, stride: int, mode: str) -> int:
    """PTX ISA, "Shared memory descriptor": version 1, and a mode of 3 bits."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | MODES[mode] << 61


def form(rows: int, columns: int, kind: str = "bf16", across: int = 0) -> int:
    """PTX ISA, "Instruction descriptor" for .kind::f16, sums in float32."""
    types = (kind == "bf16") * (1 << 7 | 1 << 10)
    return 1 << 4 | types | (across & 1) << 15 | across >> 1 << 16 | columns // 8 << 17 | rows // 16 << 24


def wait(parity: int = 0, register: str = "%r10") -> str:
    return (
        "{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, "
        f"[{register}], {parity}; @!complete bra.uni waitLoop; }}"
    )


class Call:
    """A B of rows x 16 and 16 x n by one block of 128 threads: the image of shared memory, and pieces of a kernel.

    %r3 is the address of the sums, %r4 that of the warp's lanes in it, %r10 and %r12 are mbarriers; %p3 holds in the
    first warp, %p5 in its elected thread.
    """

    def __init__(
        self,
        rows: int = 64,
        n: int = 16,
        kind: str = "bf16",
        modes: tuple[str, str] = ("32", "32"),
        across: int = 0,
    ) -> None:
        rng = np.random.default_rng(n)
        self.rows, self.n, self.kind = rows, n, kind
        self.a, self.b = half(rng.standard_normal((rows, 16)), kind), half(rng.standard_normal((n, 16)), kind)
        where_a, *parts_a, size_a = placed(modes[0], bool(across & 1), rows)
        where_b, *parts_b, size_b = placed(modes[1], bool(across & 2), n)
        self.image = np.zeros((size_a + size_b) // 2, "u2")
        self.image[where_a // 2], self.image[(size_a + where_b) // 2] = self.a, self.b
        words = (descriptor(0, *parts_a, modes[0]), descriptor(size_a, *parts_b, modes[1]))
        self.descriptors = (
            f"mov.b64 %rd10, {words[0]}; mov.b64 %rd11, {words[1]}; mov.b32 %r11, {form(rows, n, kind, across)};"
        )
        end = self.image.nbytes
        self.columns = max(32, 1 << (n - 1).bit_length())
        self.start = (
            f"setp.lt.u32 %p3, %r1, 32; setp.eq.u32 %p4, %r1, 0; setp.eq.u32 %p1, %r1, %r1; not.pred %p2, %p1;"
            f"mov.b32 %r9, {end}; mov.b32 %r10, {end + 16}; mov.b32 %r12, {end + 24}; {self.descriptors}"
        )
        self.alloc = f"@%p3 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], {self.columns};"
        self.found = "ld.shared.b32 %r3, [%r9]; shr.u32 %r4, %r1, 5; shl.b32 %r4, %r4, 21; add.s32 %r4, %r4, %r3;"
        self.init = "@%p4 mbarrier.init.shared::cta.b64 [%r10], 1;"
        self.fill = "shl.b32 %r5, %r1, 2; cvt.u64.u32 %rd7, %r5; add.s64 %rd7, %rd7, %rd2;" + "".join(
            f"add.s32 %r7, %r5, {i}; ld.global.b32 %r8, [%rd7+{i}]; st.shared.b32 [%r7], %r8;"
            for i in range(0, end, 512)
        )
        self.product = "@%p5 tcgen05.mma.cta_group::1.kind::f16 [%r3 + 0], %rd10, %rd11, %r11, %p2;"
        self.commit = "@%p5 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r10];"
        self.issue = f"@!%p3 bra REST; elect.sync %r6|%p5, -1; {self.product} {self.commit} REST:"
        per_thread = n if rows == 128 else n // 2
        self.out = [f"%r{FIRST + i}" for i in range(per_thread)]
        registers, shape = "{" + ", ".join(self.out) + "}", f"32x32b.x{n}" if rows == 128 else f"16x32bx2.x{n // 2}"
        split = "" if rows == 128 else f", {n // 2}"
        self.load = f"tcgen05.ld.sync.aligned.{shape}.b32 {registers}, [%r4 + 0]{split};"
        self.keep = f"tcgen05.st.sync.aligned.{shape}.b32 [%r4 + 0]{split}, {registers};"
        self.store = f"mad.wide.u32 %rd6, %r1, {4 * per_thread}, %rd1;" + "".join(
            f"st.global.b32 [%rd6+{4 * i}], {name};" for i, name in enumerate(self.out)
        )
        self.free = f"@%p3 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, {self.columns};"

    def body(self) -> str:
        return " ".join(
            (
                *(self.start, self.alloc, self.init, self.fill, PROXY, BAR, self.found, self.issue, wait()),
                *(self.load, WAIT_LD, self.store, BAR, self.free),
            )
        )

    def run(self, body: str | None = None, log: list[Access] | None = None, order: str = "together") -> np.ndarray:
        """The result, float32 [rows, n]."""
        options = Options(order=order, log=log)
        return self.arranged(self.words(self.body() if body is None else body, options))

    def words(self, body: str, options: Options) -> np.ndarray:
        size = self.image.nbytes + TAIL
        return run(body, self.image, words=len(self.out), threads=128, shared=size, options=options)

    def arranged(self, words: np.ndarray) -> np.ndarray:
        """Row r of 128 belongs to thread r; of 64, to threads r % 16 and 16 + r % 16 of warp r / 16, half each."""
        got = words.view("f4")
        if self.rows == 128:
            return got
        return got.reshape(4, 2, 16, self.n // 2).transpose(0, 2, 1, 3).reshape(64, self.n)

    def exact(self) -> np.ndarray:
        return number(self.a, self.kind) @ number(self.b, self.kind).T


def changed(body: str, old: str, new: str) -> str:
    """``body`` with one piece replaced."""
    assert body.count(old) == 1, old
    return body.replace(old, new)


@pytest.mark.parametrize("modes", [("none", "128"), ("128", "64"), ("64", "32"), ("32", "none")])
@pytest.mark.parametrize("across", range(4))
def test_layouts(across: int, modes: tuple[str, str]) -> None:
    call = Call(64 + 64 * (across % 2), 64, modes=modes, across=across)
    assert np.array_equal(call.run(), call.exact().astype("f4"))


@pytest.mark.parametrize(("rows", "n"), [(128, 16), (128, 64), (64, 16), (64, 64)])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_sizes_and_types(rows: int, n: int, kind: str) -> None:
    call = Call(rows, n, kind)
    assert np.array_equal(call.run(), call.exact().astype("f4"))


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same(order: str) -> None:
    log: list[Access] = []
    call = Call()
    assert np.array_equal(call.run(log=log, order=order), call.exact().astype("f4"))
    assert not races(log)


def test_sums_and_signs() -> None:
    call = Call(*LARGE)
    exact, body = call.exact(), call.body()
    again = call.product.replace("%p2", "%p1")
    ones = "".join(f"mov.b32 {name}, 0x3f800000;" for name in call.out) + call.keep + WAIT_ST
    kept = changed(body, call.found, f"{call.found} {ones} {BAR}")
    for text, want in {
        changed(body, call.product, call.product + again): exact.astype("f4") + exact,
        kept: exact,
        changed(kept, call.product, again): exact + 1,
        changed(body, call.found, f"{call.found} xor.b32 %r11, %r11, {1 << 13};"): -exact,
        changed(body, call.found, f"{call.found} xor.b32 %r11, %r11, {1 << 14};"): -exact,
        changed(body, call.found, f"{call.found} xor.b32 %r11, %r11, {3 << 13};"): exact,
    }.items():
        assert np.array_equal(call.run(text), want.astype("f4"))
    with pytest.raises(Fault, match="what depends on registers that nobody wrote"):  # sums that are not there
        call.run(changed(body, call.product, again))


def test_in_the_worst_case_sums_err_by_what_is_allowed() -> None:
    call = Call(*LARGE)
    size = np.abs(number(call.a, "bf16")) @ np.abs(number(call.b, "bf16")).T
    got = call.arranged(call.words(call.body(), Options(worst=True)))
    error = (call.exact() - got) * np.sign(call.exact())
    assert (error > 0.9 * SUM_ERROR * size).all()
    assert (error < 1.1 * SUM_ERROR * size).all()


# Descriptors


def test_an_instruction_descriptor_is_decoded() -> None:
    assert Form.of(68157456) == Form("f16", 64, 64, (1, 1), (False, False))  # as Triton writes it
    word = form(128, 256, "bf16", 2) | 1 << 13
    assert Form.of(word) == Form("bf16", 128, 256, (-1, 1), (False, True))


@pytest.mark.parametrize(
    ("word", "words"),
    [
        *((form(128, 64) | 1 << bit, "bits that mean nothing") for bit in (0, 1, 3, 6, 23, 29, 30, 31)),
        (form(128, 64) | 1 << 2, "sparse matrices or of sums in half precision"),
        (form(128, 64) ^ 1 << 4, "sparse matrices or of sums in half precision"),
        (form(128, 64) ^ 3 << 4, "unknown types"),
        (form(128, 64) ^ 1 << 7, "unknown types"),
        (form(128, 64) ^ (3 << 7 | 3 << 10), "unknown types"),
        (form(128, 24), "128 x 24 sums"),
        (form(64, 4), "64 x 0 sums"),
        (form(64, 264), "64 x 264 sums"),
        (form(32, 64), "32 x 64 sums"),
        (form(256, 64), "256 x 64 sums"),
    ],
)
def test_instruction_descriptors_that_are_wrong(word: int, words: str) -> None:
    with pytest.raises(Fault, match=words):
        Form.of(word)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("mov.b32 %r11, 0;", "sums in half precision"),
        ("mov.b64 %rd11, %rd20;", "a descriptor or a predicate that depends on what nobody wrote"),
        ("mov.b32 %r11, %r30;", "a descriptor or a predicate that depends on what nobody wrote"),
        *((f"xor.b64 %rd10, %rd10, {1 << bit};", "bits that mean nothing") for bit in (14, 30, 46, 47, 53, 60)),
        (f"or.b64 %rd10, %rd10, {1 << 49};", "a base offset"),
        (f"or.b64 %rd10, %rd10, {1 << 52};", "an absolute distance"),
        (f"xor.b64 %rd10, %rd10, {3 << 61};", "atoms of 32 bytes"),
        (f"xor.b64 %rd10, %rd10, {1 << 61};", "a mode that means nothing"),
        ("add.s64 %rd11, %rd11, 64;", "outside, or not aligned|nobody wrote"),
    ],
)
def test_descriptors_that_are_wrong(change: str, words: str) -> None:
    call = Call(*LARGE)
    with pytest.raises(Fault, match=words):
        call.run(changed(call.body(), call.found, call.found + change))


def test_a_layout_that_is_not_the_one_that_is_there_gives_something_else() -> None:
    call = Call(*LARGE)
    for change in (
        f"xor.b64 %rd10, %rd10, {6 << 61};",
        "add.s64 %rd11, %rd11, 2;",
        f"xor.b32 %r11, %r11, {1 << 15};",
    ):
        got = call.run(changed(call.body(), call.found, call.found + change))
        assert not np.array_equal(got, call.exact().astype("f4"))


# Completion


@pytest.mark.parametrize("order", SOME_ORDERS)
def test_sums_must_be_waited_for(order: str) -> None:
    call, unknown = Call(), "a tcgen05.mma writes, and the thread does not know"
    body = changed(call.body(), wait(), BAR + wait())
    one = f"@!%p3 bra PAST; {wait()} PAST:"
    early = f"{call.product} {call.commit}", f"{call.commit} {call.product}"
    for broken, words in {
        changed(body, wait(), ""): unknown,
        changed(body, wait(), one): unknown,  # of one warp
        changed(body, *early): unknown,
        # a try_wait that is not asked again
        changed(body, wait(), "mbarrier.try_wait.parity.shared::cta.b64 %p6, [%r10], 0;"): unknown,
        changed(body, wait(), wait(1)): "never completes",  # or it has passed, if the product is still on its way
    }.items():
        with pytest.raises(Fault, match=words):
            call.run(broken, order=order)
        with pytest.raises(Fault, match=f"{words}|no barrier to another warp|nobody wrote|never completes"):
            call.run(changed(broken, f"REST: {BAR}", "REST:"), order=order)
    # a barrier tells the others
    assert np.array_equal(call.run(changed(body, wait(), one + BAR), order=order), call.exact().astype("f4"))


@pytest.mark.parametrize("order", SOME_ORDERS)
def test_a_wait_for_what_never_comes_is_found(order: str) -> None:
    call = Call()
    body, words = call.body(), "a wait for a phase that never completes"
    for broken in (
        changed(body, call.commit, ""),
        changed(body, wait(), wait() + wait(1)),
        changed(body, call.init, call.init.replace("], 1", "], 2")),
        changed(body, call.commit, call.commit + call.commit),  # two phases, and who waits for the first is too late
        changed(body, call.issue, f"{wait()} {call.issue}").replace(f"REST: {wait()}", "REST:"),
    ):
        with pytest.raises(Fault, match=words):
            call.run(broken, order=order)


@pytest.mark.parametrize("order", SOME_ORDERS)
def test_phases_and_counts(order: str) -> None:
    call = Call()
    body = call.body()
    twice = changed(body, call.init, call.init.replace("], 1", "], 2"))
    exact = call.exact().astype("f4")
    assert np.array_equal(call.run(changed(twice, call.commit, 2 * call.commit), order=order), exact)
    second = call.product.replace("%p2", "%p1")
    phase = f"{BAR} @!%p3 bra NEXT; {second} {call.commit} NEXT: {wait(1)}"
    got = call.run(changed(body, call.load, phase + call.load), order=order)
    assert np.array_equal(got, exact + exact)
    # the first phase is over, or even the second, if a thread comes late
    with pytest.raises(Fault, match=r"does not know|never completes|no tcgen05\.wait::ld, or no barrier"):
        call.run(changed(body, call.load, phase.replace(wait(1), wait(0)) + call.load), order=order)


def test_shared_memory_is_read_until_it_is_known_to_be_complete() -> None:
    call = Call()
    body, words = call.body(), "a write of shared memory that a tcgen05.mma reads"
    write, copy = "st.shared.b32 [%r5], %r1;", "cp.async.ca.shared.global [%r5], [%rd7], 4;"
    for what, order in itertools.product((write, copy), SOME_ORDERS):
        with pytest.raises(Fault, match=f"{words}|no fence|nobody waited"):
            call.run(changed(body, wait(), what + wait()), order=order)
        call.run(changed(body, wait(), wait() + what), order=order)
    late = f"@!%p3 bra PAST; {wait()} PAST: HERE {write} {BAR} {wait()}"
    for order in SOME_ORDERS:
        with pytest.raises(Fault, match=f"{words}|no fence"):  # of warps that have not waited
            call.run(changed(body, wait(), late.replace("HERE", "")), order=order)
        call.run(changed(body, wait(), late.replace("HERE", BAR)), order=order)


def test_the_asynchronous_proxy_needs_a_fence() -> None:
    call, words = Call(*LARGE), "a tcgen05.mma of shared memory that no fence.proxy.async"
    body = call.body()
    call.run(changed(body, f"{PROXY} {BAR} ld", f"{BAR} {PROXY} ld"))
    for broken in (
        changed(body, PROXY, ""),
        changed(body, PROXY, "").replace(call.fill, PROXY + call.fill),
        changed(body, PROXY, f"@%p3 {PROXY}"),
        changed(body, f"{PROXY} {BAR} ld", f"{BAR} @!%p3 {PROXY} ld"),  # of warps that issue nothing
    ):
        with pytest.raises(Fault, match=words):
            call.run(broken)


def test_products_of_one_thread_follow_one_another() -> None:
    call = Call(*LARGE)
    other = f"xor.b32 %r11, %r11, {(16 ^ 32) // 8 << 17}; {call.product}"
    with pytest.raises(Fault, match="does not know"):  # of another shape
        call.run(changed(call.body(), call.product, call.product + other))
    moved = call.product.replace("%r3 + 0", "%r3 + 16")
    wide = call.body().replace(call.alloc, call.alloc.replace("32;", "64;")).replace("%r3, 32;", "%r3, 64;")
    with pytest.raises(Fault, match="does not know"):
        call.run(changed(wide, call.product, call.product + moved))
    call.run(changed(wide, call.product, call.product + moved.replace("16]", "32]")))
    body = call.body()
    for issue in ("setp.lt.u32 %p5, %r1, 2;", f"{call.product} setp.eq.u32 %p5, %r1, 1;"):  # at once, one by one
        with pytest.raises(Fault, match="by several threads of a block"):
            call.run(changed(body, call.product, f"{issue} {call.product}"))


# Tensor memory


def test_memory_must_be_allocated() -> None:
    call, words = Call(n=32), "tensor memory that is not allocated"
    body = call.body()
    for change in ("add.s32 %r3, %r3, 1;", "sub.s32 %r3, %r3, 1;", "mov.b32 %r3, 0;"):
        with pytest.raises(Fault, match=words):
            call.run(changed(body, call.issue, change + call.issue))
    for change in ("add.s32 %r4, %r4, 1;", "sub.s32 %r4, %r4, 1;", "and.b32 %r4, %r4, -65536;"):
        with pytest.raises(Fault, match=words):
            call.run(changed(body, call.load, change + call.load))
    freed = changed(body, call.load, f"{BAR} {call.free} {BAR} {call.load}")
    with pytest.raises(Fault, match=words):
        call.run(freed)
    with pytest.raises(Fault, match="still allocated at the end of its block"):
        call.run(changed(body, call.free, ""))
    kept = "@%p3 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
    call.run(changed(body, call.alloc, call.alloc + kept))
    with pytest.raises(Fault, match=r"behind a tcgen05\.relinquish"):
        call.run(changed(body, call.alloc, kept + call.alloc))


@pytest.mark.parametrize(("columns", "words"), [(16, "no power of two"), (48, "no power of two"), (1024, "no power")])
def test_numbers_of_columns(columns: int, words: str) -> None:
    call = Call()
    with pytest.raises(Fault, match=words):
        call.run(changed(call.body(), call.alloc, call.alloc.replace(", 32;", f", {columns};")))


def test_columns_are_freed_as_they_were_allocated() -> None:
    call, words = Call(), "a tcgen05.dealloc of what was not allocated together"
    wide = changed(call.body(), call.alloc, call.alloc.replace(", 32;", ", 64;"))
    for free in (call.free, call.free.replace("%r3, 32", "%r3, 128"), f"add.s32 %r3, %r3, 32; {call.free}"):
        with pytest.raises(Fault, match=words):
            call.run(changed(wide, call.free, free))
    call.run(changed(wide, call.free, call.free.replace("32;", "64;")))
    more = call.alloc.replace(", 32;", ", 512;")
    with pytest.raises(Fault, match="512 columns of tensor memory that are not there"):
        call.run(changed(call.body(), call.alloc, call.alloc + more))
    # two that follow one another are not the same memory
    second = f"{BAR} {call.alloc} {BAR} ld.shared.b32 %r20, [%r9];"
    body = changed(call.body(), call.issue, second + call.issue)
    with pytest.raises(Fault, match="still allocated"):
        call.run(body)
    with pytest.raises(Fault, match=words):
        call.run(changed(body, call.free, call.free.replace("%r3, 32", "%r20, 64")))
    call.run(changed(body, call.free, call.free + call.free.replace("%r3", "%r20")))


def test_a_warp_reaches_its_own_lanes() -> None:
    call = Call(128, 32)
    body = call.body()
    for change in ("mov.b32 %r4, %r3;", "add.s32 %r4, %r4, 2097152;", "xor.b32 %r4, %r4, 2097152;"):
        with pytest.raises(Fault, match="belong to another warp"):
            call.run(changed(body, call.load, change + call.load))
        with pytest.raises(Fault, match="belong to another warp"):
            call.run(changed(body, call.load, f"{call.load} {WAIT_LD} {change} {call.keep} {WAIT_ST}"))
    with pytest.raises(Fault, match="cannot begin in"):
        call.run(changed(body, call.load, f"add.s32 %r4, %r4, {1 << 16}; {call.load}"))
    with pytest.raises(Fault, match="do not agree on"):
        call.run(changed(body, call.load, "and.b32 %r20, %r1, 1; add.s32 %r4, %r4, %r20;" + call.load))
    with pytest.raises(Fault, match="sums of a product that begin in a lane"):
        call.run(changed(body, call.issue, f"add.s32 %r3, %r3, {16 << 16}; {call.issue}"))
    # 64 rows may begin in lane 16 of each warp
    call = Call(64)
    low = changed(call.body(), call.product, call.product.replace("%r3 + 0", f"%r3 + {16 << 16}"))
    there = changed(low, call.load, call.load.replace("%r4 + 0", f"%r4 + {16 << 16}"))
    assert np.array_equal(call.run(there), call.exact().astype("f4"))
    with pytest.raises(Fault, match="nobody wrote"):
        call.run(low)


@pytest.mark.parametrize("order", SOME_ORDERS)
def test_loads_and_stores_must_be_waited_for(order: str) -> None:
    call = Call()
    body = call.body()
    with pytest.raises(Fault, match=r"a register of a tcgen05\.ld"):
        call.run(changed(body, WAIT_LD, ""), order=order)
    with pytest.raises(Fault, match=r"a register of a tcgen05\.ld"):
        call.run(changed(body, WAIT_LD, f"mov.b32 {call.out[3]}, 0; {WAIT_LD}"), order=order)
    with pytest.raises(Fault, match=r"a tcgen05\.ld, and no tcgen05\.wait::ld, or no barrier|not allocated"):
        call.run(changed(body, f"{BAR} {call.free}", call.free), order=order)  # a barrier before the dealloc
    ones = "".join(f"mov.b32 {name}, 0x3f800000;" for name in call.out) + call.keep
    kept = changed(body, call.found, f"{call.found} {ones} {WAIT_ST} {BAR}")
    kept = changed(kept, call.product, call.product.replace("%p2", "%p1"))
    assert np.array_equal(call.run(kept, order=order), (call.exact() + 1).astype("f4"))
    stored = r"a tcgen05\.st, and no tcgen05\.wait::st, or no barrier"
    with pytest.raises(Fault, match=stored):
        call.run(changed(kept, WAIT_ST, ""), order=order)
    with pytest.raises(Fault, match=f"{stored}|does not know|nobody wrote"):
        call.run(changed(kept, f"{WAIT_ST} {BAR}", WAIT_ST), order=order)
    with pytest.raises(Fault, match=stored):  # of its own warp
        call.run(changed(kept, f"{WAIT_ST} {BAR}", f"{call.load} {WAIT_LD} {WAIT_ST} {BAR}"), order=order)


def test_what_nobody_wrote_is_a_hole() -> None:
    call = Call()
    unwritten = changed(changed(call.body(), call.issue, ""), wait(), "")
    with pytest.raises(Fault, match="stores of what depends on registers that nobody wrote"):
        call.run(unwritten)
    call.run(changed(unwritten, call.store, ""))
    # word 8 of the image, which thread 8 stores, holds elements of row 8 / 4 of A
    call = Call(128, modes=("none", "none"))
    body, load = call.body(), "ld.global.b32 %r8, [%rd7+0];"
    hole = "setp.ne.u32 %p7, %r1, 8; mov.u32 %r8, 0x0; @%p7 ld.global.b32 {%r8}, [%rd7+0];"
    body = changed(body, load, hole)
    with pytest.raises(Fault, match="nobody wrote"):
        call.run(body)
    guarded = call.store.replace("st.global", "@%p8 st.global")
    got = call.run(changed(body, call.store, f"setp.ne.u32 %p8, %r1, 2; {guarded}"))
    assert np.array_equal(np.delete(got, 2, 0), np.delete(call.exact().astype("f4"), 2, 0))


# mbarriers and elections


@pytest.mark.parametrize("order", SOME_ORDERS)
def test_an_mbarrier_is_used_between_its_init_and_its_inval(order: str) -> None:
    call = Call()
    body, nothing = call.body(), "what is no mbarrier"
    apart = "an mbarrier that another thread (uses|has made), and no barrier"
    inval = "@%p4 mbarrier.inval.shared::cta.b64 [%r10];"
    tidy = changed(body, call.store, f"{call.store} {BAR} {inval}")
    assert np.array_equal(call.run(tidy, order=order), call.exact().astype("f4"))
    again = changed(tidy, inval, f"{inval} {call.init} {inval}")
    call.run(again, order=order)
    for broken, words in {
        changed(body, call.init, ""): nothing,
        changed(body, call.init, call.init + inval): nothing,
        changed(body, call.init, 2 * call.init): r"an mbarrier\.init of what is an mbarrier",
        changed(changed(body, call.init, ""), BAR + " " + call.found, f"{BAR} {call.found} {call.init}"): (
            f"{nothing}|{apart}"
        ),
        changed(body, call.load, inval + call.load): f"{nothing}|{apart}",
        changed(body, wait(), BAR + inval + BAR): "an mbarrier.inval before a phase that the thread does not know",
        changed(tidy, inval, inval.replace("%p4", "%p3")): rf"an mbarrier\.inval by several threads|{nothing}",
        changed(tidy, inval, inval + wait()): f"{nothing}|{apart}",
        changed(tidy, inval, f"ld.shared.b32 %r20, [%r10]; {inval}"): "nobody wrote",
        changed(tidy, inval, f"st.shared.b32 [%r10], %r1; {inval}"): "a store over an mbarrier",
        changed(body, "[%r10], 1", "[%r10+4], 1"): "outside, or not aligned",
        changed(body, wait(), wait(2)): "neither 0 nor 1",
    }.items():
        with pytest.raises(Fault, match=words):
            call.run(broken, order=order)
    half_way = changed(tidy, call.init, call.init + call.init.replace("[%r10], 1", "[%r12], 2"))
    half_way = changed(half_way, call.commit, call.commit + call.commit.replace("%r10", "%r12"))
    with pytest.raises(Fault, match="in the middle of a phase"):
        call.run(changed(half_way, inval, inval + inval.replace("%r10", "%r12")), order=order)


def test_lanes_that_wait_apart_meet_again() -> None:
    """A lane of a warp waits while the others have come to an instruction of the whole warp."""
    call = Call()
    one = "setp.eq.u32 %p7, %r1, 77; @!%p7 bra PAST;"
    body = changed(call.body(), wait(), f"{one} {wait()} PAST: bar.warp.sync -1; {wait()}")
    for order in SOME_ORDERS:
        assert np.array_equal(call.run(body, order=order), call.exact().astype("f4"))
    call.run(changed(body, f"bar.warp.sync -1; {wait()}", BAR))  # after which all know what one has waited for
    with pytest.raises(Fault, match="does not know"):
        call.run(changed(body, f"bar.warp.sync -1; {wait()}", "bar.warp.sync -1;"))


def test_one_thread_of_a_warp_is_elected() -> None:
    elect = "elect.sync %r5|%p5, -1; selp.b32 %r6, 100, 200, %p5; add.s32 %r6, %r6, %r5; st.global.b32 OUT, %r6;"
    assert np.array_equal(run(elect, threads=64)[:, 0], np.where(np.arange(64) % 32 == 0, 100, 200))
    with pytest.raises(Fault, match="lanes are not all named"):
        run(elect.replace("-1", "3"))
    with pytest.raises(Fault, match="not all lanes of a warp"):
        run(f"setp.lt.u32 %p1, %r1, 5; @%p1 bra PAST; {elect} PAST:")
    with pytest.raises(Fault, match="a synchronisation under a predicate"):
        run(f"setp.lt.u32 %p1, %r1, 5; @%p1 {elect}")


def test_a_warp_leaves_out_an_instruction_as_a_whole() -> None:
    call = Call()
    with pytest.raises(Fault, match="not all lanes of a warp"):
        call.run(changed(call.body(), call.alloc, call.alloc.replace("%p3", "%p4")))


UNKNOWN = """
tcgen05.mma.cta_group::2.kind::f16 [%r3], %rd10, %rd11, %r11, %p2;
tcgen05.mma.cta_group::1.kind::tf32 [%r3], %rd10, %rd11, %r11, %p2;
tcgen05.mma.cta_group::1.kind::f16 [%r3], [%r4], %rd11, %r11, %p2;
tcgen05.mma.cta_group::1.kind::f16 [%r3], %rd10, %rd11, %r11, {%r4, %r4, %r4, %r4}, %p2;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r10], %rs1;
tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r100}, [%r4];
tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r100}, [%r4];
tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r100}, [%r4], 16;
tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r100}, [%r4];
tcgen05.ld.sync.aligned.32x32b.x1.pack::16b.b32 {%r100}, [%r4];
tcgen05.shift.cta_group::1.down [%r3];
mbarrier.arrive.shared::cta.b64 %rd20, [%r10];
mbarrier.test_wait.parity.shared::cta.b64 %p6, [%r10], 0;
mbarrier.init.shared::cta.b64 [%r12], 0;
"""


@pytest.mark.parametrize("instruction", UNKNOWN.strip().split("\n"))
def test_what_is_not_known_is_an_error(instruction: str) -> None:
    call = Call()
    with pytest.raises(Fault, match=r"unknown|do not fit|an mbarrier of 0 arrivals|read as pred"):
        call.run(changed(call.body(), call.load, instruction + call.load))
