"""Executes the cases, and says what ran, what agreed, and what no launch came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from stepfusion.bench.ptx.added_cases import added_cases
from stepfusion.bench.ptx.agreement import Disagreement
from stepfusion.bench.ptx.coverage import Coverage, total
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion.bench.ptx.inputs import Case
from stepfusion.bench.ptx.layer_norm_cases import layer_norm_cases
from stepfusion.bench.ptx.norm_cases import norm_cases
from stepfusion.bench.ptx.other_cases import other_cases
from stepfusion.bench.ptx.projection_cases import projection_cases
from stepfusion.bench.ptx.step_cases import step_cases
from stepfusion.bench.ptx.transition_cases import transition_cases
from stepfusion.bench.ptx.types import Fault

#: Orders of warps in which every launch of the quick part must give the same bytes.
QUICK_ORDERS = ("together", "warps reversed")

NOT_EXECUTED = (
    "gfx942: nothing is executed, for its code is not PTX. That every kernel compiles for it without private memory "
    "is checked (tests/kernels/test_machine_code.py); its results are not."
)


@dataclass(frozen=True)
class Result:
    """One case on one target. ``error``: what was wrong, None if nothing was. ``seconds``: compilation included."""

    case: str
    target: str
    seconds: float
    error: str | None = None


@dataclass
class Report:
    """What was executed.

    Attributes:
        launches, elements: by kernel and target. programs: compiled texts that were executed.
    """

    results: list[Result] = field(default_factory=list)
    launches: dict[tuple[str, str], int] = field(default_factory=dict)
    elements: dict[tuple[str, str], int] = field(default_factory=dict)
    programs: list[Coverage] = field(default_factory=list)

    @property
    def failures(self) -> list[Result]:
        """The cases in which something was wrong."""
        return [result for result in self.results if result.error is not None]

    def count(self) -> str:
        """Launches and elements, in words."""
        launches, elements = sum(self.launches.values()), sum(self.elements.values())
        kernels = len({kernel for kernel, _ in self.launches})
        return f"{launches:,} launches of {len(self.programs)} programs of {kernels} kernels, {elements:,} elements"

    def as_json(self) -> dict[str, object]:
        """The report as plain values."""
        return {
            "results": [vars(result) for result in self.results],
            "kernels": [
                {"kernel": kernel, "target": target, "launches": n, "elements": self.elements[kernel, target]}
                for (kernel, target), n in self.launches.items()
            ],
            "programs": len(self.programs),
            "instructions": total(self.programs),
            "missed": [
                {"kernel": p.kernel, "target": p.target, "case": p.case, **block._asdict()}
                for p in self.programs
                for block in p.missed()
            ],
            "count": self.count(),
        }


def every_case() -> list[Case]:
    """The cases of all kernels."""
    return [
        *(*step_cases(), *transition_cases(), *other_cases()),
        *(*norm_cases(), *added_cases(), *layer_norm_cases(), *projection_cases()),
    ]


def run(
    targets: Sequence[str] = NVIDIA,
    *,
    quick: bool = False,
    cases: Sequence[Case] | None = None,
    make: Callable[[str], Executor] | None = None,
    progress: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Execute every case for each of ``targets``.

    Args:
        quick: a part that takes a minute, in two orders of warps and with a search for races. cases: in place of all.
        make: an executor for a target, in place of the usual one. progress: called after each case.
    """
    report = Report()
    make = make or (_quick_executor if quick else Executor)
    for target in targets:
        executor = make(target)
        for seed, case in enumerate(every_case() if cases is None else cases):
            if not quick or target in case.quick:
                result = run_case(case, executor, seed)
                report.results.append(result)
                progress(result)
        report.launches |= {(kernel, target): n for kernel, n in executor.launches.items()}
        report.elements |= {(kernel, target): n for kernel, n in executor.elements.items()}
        report.programs += executor.programs.values()
    return report


def _quick_executor(target: str) -> Executor:
    return Executor(target, orders=QUICK_ORDERS, check_races=True)


def run_case(case: Case, executor: Executor, seed: int = 0) -> Result:
    """Execute one case, with random inputs of its own and fresh memory full of NaN."""
    began, error = time.perf_counter(), None
    executor.case = case.name
    filled = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            case.check(executor)
        except (Fault, Disagreement) as wrong:
            error = f"{type(wrong).__name__}: {wrong}"
        finally:
            torch.use_deterministic_algorithms(filled)
    return Result(case.name, executor.target, time.perf_counter() - began, error)


def lines(report: Report) -> Iterator[str]:
    """The report for a terminal."""
    yield f"{'target':7} {'kernel':26} {'launches':>8} {'programs':>8} {'elements':>12} {'instructions reached':>21}"
    for (kernel, target), launches in report.launches.items():
        programs = [p for p in report.programs if (p.kernel, p.target) == (kernel, target)]
        elements, (reached, every) = report.elements[kernel, target], total(programs)
        counts = f"{launches:8} {len(programs):8} {elements:12,} {reached:10,} of {every:,}"
        yield f"{target:7} {kernel:26} {counts}"
    yield from _missed(report.programs)
    yield NOT_EXECUTED
    wrong = report.failures
    yield f"{report.count()}: {len(report.results) - len(wrong)} cases agree, {len(wrong)} do not"


def _missed(programs: Iterable[Coverage]) -> Iterator[str]:
    """Blocks that no launch came to, those of one place in the source together."""
    places: dict[tuple[str, str], list[int]] = {}
    for program in programs:
        for block in program.missed():
            place = (program.kernel, ", ".join(block.lines) or "no line")
            places.setdefault(place, []).append(block.instructions)
    if not places:
        yield "every block of every program was reached"
    for (kernel, where), sizes in sorted(places.items()):
        yield f"not reached: {kernel} at {where}: {len(sizes)} blocks, {sum(sizes)} instructions"
