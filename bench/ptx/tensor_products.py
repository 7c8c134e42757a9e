"""tcgen05: products of matrices in shared memory, added up in tensor memory (PTX ISA, "tcgen05.mma").

One thread of a block issues all products. Each is computed when it is issued; until a thread waits for the mbarrier
that a later tcgen05.commit of the issuing thread names, or a bar.sync lies behind such a wait, the thread may neither
touch the sums nor write the shared memory that is read. The sums err as those of mma.sync do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stepfusion.bench.ptx.accesses import addresses_of
from stepfusion.bench.ptx.descriptors import CHUNK, Descriptors, load
from stepfusion.bench.ptx.matrices import Matrices, multiply
from stepfusion.bench.ptx.mbarriers import Mbarriers
from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.ordering import Completion
from stepfusion.bench.ptx.program import Address, Instruction
from stepfusion.bench.ptx.registers import Source
from stepfusion.bench.ptx.tensor_memory import LANES, TensorMemory
from stepfusion.bench.ptx.threads import Threads
from stepfusion.bench.ptx.types import Array, Fault, Lanes

_PRODUCT = "tcgen05.mma.cta_group::1.kind::f16"
#: Triton 3.6.0 writes the second, and the mbarrier's address in shared memory where PTX then wants a generic one.
_COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one"
_COMMITS = (f"{_COMMIT}.shared::cluster.b64", f"{_COMMIT}.b64")
_KINDS = {0: "f16", 1: "bf16"}


@dataclass(frozen=True)
class Form:
    """What an instruction descriptor says (PTX ISA, "Instruction descriptor", .kind::f16).

    Attributes:
        kind: of A and B. rows, columns: of the sums, float32. signs: 1 or -1, of A and B. across: A and B are M- and
            N-major.
    """

    kind: str
    rows: int
    columns: int
    signs: tuple[int, int]
    across: tuple[bool, bool]

    @classmethod
    def of(cls, word: int) -> Form:
        """Decode 32 bits.

        Raises:
            Fault: they mean nothing, or something that is not known here.
        """

        def field(first: int, bits: int) -> int:
            return int(word >> first & (2**bits - 1))

        if any(field(first, bits) for first, bits in ((0, 2), (3, 1), (6, 1), (23, 1), (29, 3))):
            raise Fault("an instruction descriptor with bits that mean nothing")
        if field(2, 1) or field(4, 2) == 0:
            raise Fault("an instruction descriptor of sparse matrices or of sums in half precision, not known here")
        kinds, rows, columns = (field(7, 3), field(10, 3)), field(24, 5) << 4, field(17, 6) << 3
        if field(4, 2) != 1 or kinds[0] != kinds[1] or kinds[0] not in _KINDS:
            raise Fault("an instruction descriptor of unknown types")
        if rows not in (64, LANES) or not 8 <= columns <= 256 or columns % (rows // 8):
            raise Fault(f"an instruction descriptor of {rows} x {columns} sums")
        signs = (1 - 2 * field(13, 1), 1 - 2 * field(14, 1))
        return cls(_KINDS[kinds[0]], rows, columns, signs, (field(15, 1) == 1, field(16, 1) == 1))


class TensorProducts:
    """The products of a program, and what they use.

    Args:
        worst: sums err by as much as PTX allows.
    """

    def __init__(
        self, threads: Threads, memory: TensorMemory, mbarriers: Mbarriers, completion: Completion, *, worst: bool
    ) -> None:
        self._threads, self._memory, self._mbarriers, self._completion = threads, memory, mbarriers, completion
        self._worst = worst
        words = threads.shared.words * (int(threads.block[-1]) + 1)
        self._reader = np.zeros(words, np.int64)  # the last product that reads a word of shared memory
        threads.checks.append(self._check_write)

    def compile(self, instruction: Instruction) -> Step:
        """``tcgen05.mma`` and ``tcgen05.commit``."""
        op, args = instruction.op, instruction.args
        if op in _COMMITS and len(args) == 1 and isinstance(args[0], Address):
            addresses = addresses_of(self._threads, args[0])
            return lambda lanes: self._commit(self._threads.lanes(lanes), addresses(self._threads.lanes(lanes)))
        if op != _PRODUCT or len(args) != 5 or not isinstance(args[0], Address) or isinstance(args[1], Address):
            raise Fault("unknown product in tensor memory")
        source = self._threads.registers.source
        out, form, keep = addresses_of(self._threads, args[0]), source(args[3], "u32"), source(args[4], "pred")
        matrices = source(args[1], "b64"), source(args[2], "b64")

        def step(lanes: Lanes) -> None:
            who = self._threads.lanes(lanes)
            words = _written(form, who)
            numbers, addresses = self._completion.issue(who), out(who)
            for word in np.unique(words):
                some = words == word
                self._multiply(Form.of(int(word)), matrices, keep, who[some], addresses[some], numbers[some])

        return step

    def _commit(self, lanes: Array, addresses: Array) -> None:
        self._mbarriers.arrive(lanes, addresses, self._completion.committed(lanes))

    def _multiply(
        self, form: Form, matrices: tuple[Source, Source], keep: Source, who: Array, out: Array, numbers: Array
    ) -> None:
        size = form.rows, form.columns
        sums, write = self._memory.begin_product(who, out, size, _written(keep, who))
        a, b = (
            self._read(_written(source, who), form.kind, rows, who, numbers, across=across)
            for source, rows, across in zip(matrices, size, form.across, strict=True)
        )
        a = replace(a, values=a.values * form.signs[0])
        turned = Matrices(b.values.transpose(0, 2, 1) * form.signs[1], b.holes.transpose(0, 2, 1))
        write(multiply(a, turned, sums, worst=self._worst), numbers)

    def _read(self, words: Array, kind: str, rows: int, who: Array, numbers: Array, *, across: bool) -> Matrices:
        """A matrix of each thread's product, in shared memory: [n, rows, 16]."""
        threads, blocks = self._threads, self._threads.block[who]
        chunks = Descriptors.of(words, "tcgen05").chunks(rows, across=across)
        matrix, _ = load(threads.shared, chunks, blocks, kind, rows, across=across)
        places = threads.shared.places(chunks.reshape(-1), np.repeat(blocks, chunks.shape[1]), CHUNK)
        places = places.reshape(len(who), -1)
        if threads.proxies is not None:
            threads.proxies.check(places, who[:, None], threads.barriers, "tcgen05.mma")
        self._reader[places] = numbers[:, None]
        return matrix

    def _check_write(self, places: Array, lanes: Array) -> None:
        if (self._reader[places] > self._completion.known[lanes][:, None]).any():
            raise Fault(
                "a write of shared memory that a tcgen05.mma reads, which the thread does not know to be complete"
            )


def _written(source: Source, who: Array) -> Array:
    """An operand of each thread."""
    if source.holes(who) is not None:
        raise Fault("a descriptor or a predicate that depends on what nobody wrote")
    return np.broadcast_to(source.read(who), who.shape)
