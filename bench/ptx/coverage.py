"""Which blocks of the compiled programs launches came to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from stepfusion.bench.ptx.launch import Execution
from stepfusion.bench.ptx.program import Instruction, Program
from stepfusion.bench.ptx.types import Array


class Block(NamedTuple):
    """Instructions that run one after the other, and no launch came to.

    Attributes:
        first: text of the first. instructions: how many. lines: of the source, in order.
    """

    first: str
    instructions: int
    lines: tuple[str, ...]


@dataclass
class Coverage:
    """One program that was executed at least once.

    Attributes:
        kernel, target: which. case: that compiled it first. reached: of its instructions, one bool each.
    """

    kernel: str
    target: str
    case: str
    program: Program
    reached: Array

    @classmethod
    def of(cls, kernel: str, target: str, case: str, execution: Execution) -> Coverage:
        """The coverage by one launch."""
        return cls(kernel, target, case, execution.program, execution.reached.copy())

    def add(self, execution: Execution) -> None:
        """Count another launch of the same program."""
        self.reached |= execution.reached

    @property
    def instructions(self) -> tuple[int, int]:
        """How many instructions were reached, and how many there are."""
        return int(self.reached[: len(self.program.code)].sum()), len(self.program.code)

    def missed(self) -> list[Block]:
        """The basic blocks that no launch came to."""
        code = self.program.code
        starts = [*_starts(self.program), len(code)]
        blocks = [(start, end) for start, end in pairwise(starts) if not self.reached[start]]
        return [Block(code[start].text, end - start, _lines(code[start:end])) for start, end in blocks]


def _starts(program: Program) -> list[int]:
    """Where basic blocks begin: where branches go, and behind them."""
    starts = {0}
    for index, instruction in enumerate(program.code):
        if instruction.op in ("bra", "bra.uni"):
            starts.add(program.labels[str(instruction.args[0])])
        if instruction.op in ("bra", "bra.uni", "ret", "exit"):
            starts.add(index + 1)
    return sorted(start for start in starts if start < len(program.code))


def _lines(code: list[Instruction]) -> tuple[str, ...]:
    """Lines of the source; the compiler gives line 0 to what belongs to none."""
    return tuple(dict.fromkeys(i.where for i in code if i.where and not i.where.endswith(":0")))


def total(coverages: list[Coverage]) -> tuple[int, int]:
    """Instructions reached, and all, over programs."""
    reached, every = np.array([coverage.instructions for coverage in coverages] or [(0, 0)]).sum(axis=0)
    return int(reached), int(every)
