"""When requests are done, in ticks of sixteen lanes: the numbers of docs/serving.md."""

from __future__ import annotations

import statistics
from concurrent.futures import Future
from typing import Any

import pytest

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


@pytest.mark.parametrize(
    ("asks", "expected"),
    [
        (EQUAL, (125.0, 125.0, 200)),
        (LARGE_THEN_SMALL, (85.7, 75, 300)),
        (MIXED_SIZES, (112.7, 79.5, 540)),
        (MIXED_STEPS, (92.5, 70.0, 220)),
    ],
)
def test_requests_are_done_when_the_documentation_says(asks: list[Ask], expected: tuple[float, float, int]) -> None:
    assert summary(ticks_taken(asks)) == expected


def test_equal_requests_do_not_all_end_last() -> None:
    assert ticks_taken(EQUAL) == [50] * 4 + [100] * 4 + [150] * 4 + [200] * 4


def test_a_large_request_is_not_held_up_longer_than_the_work_before_it() -> None:
    """All lanes are always taken: who comes last is done with the last of the work, and nobody later."""
    taken = ticks_taken(LARGE_THEN_SMALL)
    assert taken[0] == max(taken) == 300
    assert max(taken[1:]) <= 100, "a small one waits for a free lane, and no longer"
