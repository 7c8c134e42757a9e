"""One launch of a compiled kernel, executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepfusion.bench.ptx.arithmetic import Approximations
from stepfusion.bench.ptx.machine import Machine, special_registers
from stepfusion.bench.ptx.memory import GlobalMemory
from stepfusion.bench.ptx.opcodes import Compiler
from stepfusion.bench.ptx.program import Program, parse
from stepfusion.bench.ptx.registers import Registers
from stepfusion.bench.ptx.shared import SharedMemory
from stepfusion.bench.ptx.threads import Access, Threads
from stepfusion.bench.ptx.types import TYPES, Array, Fault

_THREADS_AT_ONCE = 2**15


@dataclass(frozen=True)
class Options:
    """How to execute.

    Attributes:
        order: who comes first between barriers, one of :data:`stepfusion.bench.ptx.machine.ORDERS`.
        worst: approximate instructions err by all that PTX allows.
        log: where to note every access of shared and global memory.
    """

    order: str = "together"
    worst: bool = False
    log: list[Access] | None = None


@dataclass
class Execution:
    """What a launch did: its program, and which instructions of it threads came to (one bool each)."""

    program: Program
    reached: Array = field(init=False)

    def __post_init__(self) -> None:
        self.reached = np.zeros(len(self.program.code) + 1, bool)


def execute(
    text: str,
    grid: Sequence[int],
    arguments: Sequence[float],
    memory: GlobalMemory,
    shared: int = 0,
    options: Options | None = None,
) -> Execution:
    """Run the kernel of a PTX module.

    Args:
        text: the module. grid: blocks along x, y and z. arguments: in the order of the kernel's parameters: numbers,
            and addresses. memory: what it may touch. shared: bytes of shared memory of a block.

    Raises:
        Fault: for anything that a GPU would trap on or leave undefined, and for an unknown instruction.
    """
    options = options or Options()
    execution = Execution(parse(text))
    program = execution.program
    parameters = _parameters(program, arguments)
    grid = (*grid, 1, 1)[:3]
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    if options.order.endswith("reversed"):
        blocks.reverse()
    some = max(_THREADS_AT_ONCE // program.threads, 1)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), some):
            part = blocks[first : first + some]
            special = special_registers(program, part, grid)
            count = len(part) * program.threads
            threads = Threads(
                registers=Registers(program.registers, special, program.shared, count),
                memory=memory,
                shared=SharedMemory(shared, len(part)),
                parameters=parameters,
                block=np.repeat(np.arange(len(part)), program.threads),
                first_block=first,
                log=options.log,
            )
            compiler = Compiler(threads.registers, Approximations(worst=options.worst))
            machine = Machine(program, threads, compiler, options.order)
            machine.run()
            execution.reached |= machine.reached
    return execution


def _parameters(program: Program, arguments: Sequence[float]) -> dict[str, int]:
    """The bits of every argument."""
    if len(arguments) != len(program.parameters):
        raise Fault(f"{len(arguments)} arguments for {len(program.parameters)} parameters")
    bits = {}
    for (name, kind), value in zip(program.parameters, arguments, strict=True):
        width = TYPES[kind].itemsize
        if TYPES[kind].kind == "f":
            bits[name] = int(np.array([value], TYPES[kind]).view(f"u{width}")[0])
        else:
            bits[name] = int(value) % 256**width
    return bits
