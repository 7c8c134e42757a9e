"""The instructions of sm_100 for matrix products, tcgen05 and mbarrier, and what they have in common."""

from __future__ import annotations

from stepfusion.bench.ptx.mbarriers import Mbarriers, Wait
from stepfusion.bench.ptx.opcodes import Step
from stepfusion.bench.ptx.ordering import Completion
from stepfusion.bench.ptx.program import Instruction, Program
from stepfusion.bench.ptx.tensor_memory import TensorMemory
from stepfusion.bench.ptx.tensor_products import TensorProducts
from stepfusion.bench.ptx.threads import WARP, Threads
from stepfusion.bench.ptx.types import Array

_FAMILIES = ("tcgen05.", "mbarrier.")
_BY_ONE_THREAD = ("tcgen05.mma", "tcgen05.commit")


def uses_tensor_cores(program: Program) -> bool:
    """Whether a program has an instruction that :class:`TensorCores` knows."""
    return any(instruction.op.startswith(_FAMILIES) for instruction in program.code)


class TensorCores:
    """The tensor memory, the mbarriers and the products of some blocks.

    Args:
        worst: sums err by as much as PTX allows.
    """

    def __init__(self, threads: Threads, program: Program, *, worst: bool) -> None:
        self._threads = threads
        self._completion = Completion(threads.block)
        self.mbarriers = Mbarriers(threads, self._completion)
        self._memory = TensorMemory(threads, program, self._completion)
        self._products = TensorProducts(threads, self._memory, self.mbarriers, self._completion, worst=worst)

    def compile(self, instruction: Instruction) -> tuple[bool, Step]:
        """An instruction that is no wait, and whether whole warps come to it together."""
        if instruction.op.startswith("mbarrier."):
            return False, self.mbarriers.compile(instruction)
        if instruction.op.startswith(_BY_ONE_THREAD):
            return False, self._products.compile(instruction)
        return True, self._memory.compile(instruction)

    def compile_wait(self, instruction: Instruction) -> Wait:
        """An instruction at which threads may have to stand still."""
        return self.mbarriers.compile_wait(instruction)

    def watched(self, instruction: Instruction, step: Step) -> Step:
        """The step of another instruction, which may not use registers that are being loaded."""
        return step if instruction.op.startswith(_FAMILIES) else self._memory.watched(instruction, step)

    def meet(self, lanes: Array, *, blocks: bool) -> None:
        """Threads have met in a bar.sync of whole blocks, or in a bar.warp.sync."""
        self._completion.share(lanes, self._threads.block[lanes] if blocks else lanes // WARP)

    def finish(self) -> None:
        """The threads have ended."""
        self._memory.finish()
