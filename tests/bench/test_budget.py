"""A compiler has its own time, and what does not compile has its rows before."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from stepfusion.bench import kernel_bench, race
from stepfusion.bench.budget import OutOfBudget, budget
from stepfusion.bench.floors import Floors
from stepfusion.bench.kernel_bench import kernel_rows
from stepfusion.bench.kernel_work import INDUCTOR
from stepfusion.bench.measure import Contender, Limit, contest, difference
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options, stages
from stepfusion.bench.peers import all_providers
from stepfusion.bench.providers import Built, Case, Provider
from stepfusion.bench.race import Race
from stepfusion.bench.rows import End, Record, Row, latest

CPU = torch.device("cpu")
FLOORS = Floors((), 1e9, {"float32": 1e12, "bfloat16": 1e12})


def known_floors(*_: object, **__: object) -> Floors:
    """Ceilings that nobody has to measure."""
    return FLOORS


def stubborn() -> None:
    """A compiler that catches what it can, and tries again."""
    for _ in range(100):
        try:
            time.sleep(1.0)
        except Exception:
            continue


def test_what_takes_too_long_is_interrupted() -> None:
    before = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    with pytest.raises(OutOfBudget, match=r"^its 0 s for compiling were used up$"), budget(0.2):
        stubborn()
    assert time.monotonic() - started < 20
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_one_that_is_caught_comes_again() -> None:
    def catches() -> None:
        try:
            time.sleep(60)
        except BaseException:
            time.sleep(60)

    started = time.monotonic()
    with pytest.raises(OutOfBudget), budget(0.1):
        catches()
    assert time.monotonic() - started < 50


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_what_is_in_time_is_left_alone(seconds: float | None) -> None:
    with budget(seconds):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_another_thread_has_no_limit() -> None:
    ended: list[bool] = []

    def work() -> None:
        with budget(0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


def test_a_contender_out_of_budget_is_an_error_and_the_others_go_on() -> None:
    def slow() -> torch.Tensor:
        stubborn()
        return torch.zeros(1)

    zeros = torch.zeros(1)
    verdicts = contest(
        [
            Contender("slow", zeros, slow, list, Limit(0.1), budget_s=0.1),
            Contender("fine", zeros, lambda: zeros, list, Limit(0.1)),
        ],
        CPU,
        rounds=1,
    )
    assert verdicts["slow"].error == "OutOfBudget: its 0 s for compiling were used up"
    assert verdicts["slow"].timing is None
    assert verdicts["fine"].timing is not None


def test_a_difference_brings_two_numbers_to_the_host_and_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        pytest.fail("the whole output went to the host")

    monkeypatch.setattr(torch.Tensor, "cpu", refuse)
    assert difference(torch.full((8,), 0.5), torch.zeros(8)).max == 0.5


class Stub(Provider):
    """A provider that notes when it is built, and compiles for ever if it is told to."""

    family, dtype = "stub", "float32"

    def __init__(self, name: str, log: list[str], *, compiles: bool = False, hangs: bool = False) -> None:
        self.name, self.compiles, self._log, self._hangs = name, compiles, log, hangs

    def build(self, case: Case) -> Built:
        self._log.append(self.name)
        if self._hangs:
            stubborn()
        return Built(lambda count: case.start, lambda noise: case.start, lambda: None)


def test_providers_that_compile_come_last_and_then_beside_everyone() -> None:
    log: list[str] = []
    providers = [Stub("compiler", log, compiles=True), Stub("plain", log)]
    assert [[p.name for p in stage] for stage in stages(providers)] == [["plain"], ["compiler", "plain"]]
    assert [[p.name for p in stage] for stage in stages(providers[1:])] == [["plain"]]


def test_a_provider_that_compiles_for_ever_is_an_error_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "COMPILE_SECONDS", {"cpu": 0.2})
    log: list[str] = []
    case = Case(load_model("tiny"), CPU, 2, 2)
    with Race("compare", case, [Stub("hangs", log, compiles=True, hangs=True), Stub("plain", log)], FLOORS) as raced:
        (row,) = raced.absent()
    assert log == ["hangs", "plain"]
    assert (row.provider, row.error) == ("hangs", "OutOfBudget: its 0 s for compiling were used up")


def test_rows_of_kernels_that_do_not_compile_come_first_and_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(*_: object) -> Iterator[kernel_bench.Work]:
        for work in elementwise(CPU, ((1, 1, 4, 4), (2, 1, 4, 4))):
            if work.op == "to_uint8":
                yield kernel_bench.replace(work, runs={**work.runs, INDUCTOR: work.runs["reference"]})

    elementwise = kernel_bench.elementwise
    monkeypatch.setattr(kernel_bench, "elementwise", few)
    for others in ("normalisations", "token_normalisations", "projections"):
        monkeypatch.setattr(kernel_bench, others, lambda *_: iter(()))
    monkeypatch.setattr(kernel_bench, "measure_floors", known_floors)
    rows = [r for r in kernel_rows(CPU, tiny=True, rounds=1) if not r.op.startswith("ceiling")]
    where = [row.provider == INDUCTOR and row.median_ms is not None for row in rows]
    first = where.index(True)
    shapes = {row.shape for row in rows}
    assert {r.shape for r in rows[:first] if r.provider == "reference"} == shapes, "every size before any compiler"
    kept = [record for record in latest(rows) if isinstance(record, Row)]
    assert len({(r.provider, r.shape) for r in kept}) == len(kept)
    assert all(r in rows[len(rows) // 2 - 1 :] for r in kept if r.median_ms is not None), "the interleaved ones"


def test_rows_that_were_measured_again_are_kept_once() -> None:
    first, again = (Row("host", "op", "a", "cpu", median_ms=ms) for ms in (1.0, 2.0))
    other, end = Row("host", "op", "b", "cpu"), End("host", "done", 1.0)
    records: list[Record] = [first, other, again, end]
    assert latest(records) == [other, again, end]


def test_every_part_starts_with_those_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepfusion.bench import compare, latency, throughput

    entered: list[bool] = []

    class Watched:
        def __init__(self, part: str, case: Case, providers: list[Provider], floors: Floors) -> None:
            entered.append(any(provider.compiles for provider in providers))
            case.folder.cleanup()

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def absent(self) -> list[Row]:
            return []

        def evaluations(self, rounds: int) -> Iterator[Row]:
            yield from ()

        loops = evaluations

    def nothing(case: Case, *_: object) -> Iterator[Row]:
        case.folder.cleanup()
        yield from ()

    for module, part in (
        (compare, compare.compare_rows),
        (latency, latency.latency_rows),
        (throughput, throughput.throughput_rows),
    ):
        entered.clear()
        monkeypatch.setattr(module, "Race", Watched)
        monkeypatch.setattr(module, "measure_floors", known_floors)
        monkeypatch.setattr(Watched, "loops", lambda self, rounds, finish=False: iter(()))
        if module is latency:
            monkeypatch.setattr(latency, "tick_rows", nothing)
        list(part(Options(CPU, tiny=True, compiled=True)))
        assert sorted(entered) == entered, part
        assert set(entered) == {False, True}, part
    assert [p.compiles for p in stages(all_providers(CPU))[0]].count(True) == 0
