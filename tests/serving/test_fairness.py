"""When requests are done, in ticks of sixteen lanes: the numbers of docs/serving.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from stepfusion.serving import admission
from stepfusion.serving.served_request import ServedRequest
from stepfusion_testing.serving_twins import Desk, small_engine

Ask = tuple[int, int, int]  # the tick at which it comes, images, steps


def ticks_taken(asks: list[Ask]) -> list[int]:
    """The ticks from the arrival of each request until it is done."""
    desk = Desk(small_engine(batch=16), widths=(16,))
    asked: list[tuple[int, Future[Any]]] = []
    taken: dict[int, int] = {}
    for now in range(10_000):
        for came, images, steps in asks:
            if came == now:
                asked.append((now, desk.ask(n=images, steps=steps, labels=0)))
        desk.round()
        for number, (came, future) in enumerate(asked):
            if future.done():
                taken.setdefault(number, now + 1 - came)
        if len(taken) == len(asks):
            return [taken[number] for number in range(len(asks))]
    raise AssertionError("some are never done")


def summary(taken: list[int]) -> tuple[float, float, int]:
    """Mean, median and last."""
    return round(statistics.mean(taken), 1), statistics.median(taken), max(taken)


EQUAL: list[Ask] = [(0, 4, 50)] * 16
LARGE_THEN_SMALL: list[Ask] = [(0, 64, 50)] + [(10 * i + 5, 1, 50) for i in range(20)]
MIXED_SIZES: list[Ask] = sorted([(20 * i, 32, 50) for i in range(4)] + [(7 * i, 2, 50) for i in range(32)])
MIXED_STEPS: list[Ask] = [(0, 4, 100), (0, 4, 10)] * 8


def in_turn() -> Callable[[ServedRequest, Sequence[int]], int]:
    """A rule to compare with: the request that has waited longest since its last lane."""
    turns: dict[int, tuple[int, int]] = {}  # by request: images with a lane, and their last turn

    def last_turn(job: ServedRequest, waiting: Sequence[int]) -> int:
        given = len(job.request) - len(waiting)
        if given and given != turns.get(job.number, (0, 0))[0]:
            turns[job.number] = given, 1 + max((turn for _, turn in turns.values()), default=0)
        return turns.get(job.number, (0, 0))[1]

    return last_turn


RULES: dict[str, Callable[[], Callable[[ServedRequest, Sequence[int]], int]]] = {
    "in turn": in_turn,
    "first come": lambda: lambda job, waiting: 0,
    "least work": lambda: admission._work,
}
REQUESTS = [EQUAL, LARGE_THEN_SMALL, MIXED_SIZES, MIXED_STEPS]


def documented() -> list[tuple[list[Ask], str, list[float]]]:
    """The rows of the table: requests, rule, and mean, median and last."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = text.split("| requests | rule | mean | median | last |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]
    assert [bool(row[0]) for row in cells] == [True, False, False] * len(REQUESTS)
    return [(REQUESTS[i // 3], row[1], [float(cell) for cell in row[2:]]) for i, row in enumerate(cells)]


@pytest.mark.parametrize("row", range(3 * len(REQUESTS)))
def test_requests_are_done_when_the_documentation_says(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asks, rule, expected = documented()[row]
    monkeypatch.setattr(admission, "_work", RULES[rule]())
    assert list(summary(ticks_taken(asks))) == expected


def test_equal_requests_do_not_all_end_last() -> None:
    assert ticks_taken(EQUAL) == [50] * 4 + [100] * 4 + [150] * 4 + [200] * 4


def test_a_large_request_is_not_held_up_longer_than_the_work_before_it() -> None:
    """All lanes are always taken: who comes last is done with the last of the work, and nobody later."""
    taken = ticks_taken(LARGE_THEN_SMALL)
    assert taken[0] == max(taken) == 300
    assert max(taken[1:]) <= 100, "a small one waits for a free lane, and no longer"
