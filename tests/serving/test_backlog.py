"""When to come again: an estimate that is compared with the rounds that it really takes."""

from __future__ import annotations

from typing import Any

import pytest

from stepfusion.serving.backlog import Backlog
from stepfusion.serving.errors import Overloaded
from stepfusion_testing.serving_twins import Desk, small_engine

SECOND = 1.0  # that a round is said to take


def desk(limit: int, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A scheduler of eight lanes a pool, whose rounds take a second each, and a queue of so many images."""
    monkeypatch.setattr(Backlog, "measured", lambda self, seconds: setattr(self, "seconds", SECOND))
    made = Desk(small_engine(), queue=limit)
    made.backlog.seconds = SECOND
    return made


def predicted(backlog: Backlog, images: int) -> float:
    with pytest.raises(Overloaded) as caught:
        backlog.enter(images, images)
    said = float(str(caught.value).rpartition(" in ")[2].removesuffix(" s"))
    assert said == pytest.approx(caught.value.retry_after, rel=0.01)
    assert "e" not in str(caught.value).rpartition(" in ")[2]
    return caught.value.retry_after / SECOND


def rounds_until_room(desk: Desk, images: int, limit: int) -> int:
    """Rounds after which so many images may wait, the last of them not counted: the images enter as it begins."""
    for rounds in range(10_000):
        if desk.backlog.images + images <= limit:
            return rounds - 1
        desk.round()
    raise AssertionError("there is never room")


@pytest.mark.parametrize(
    ("waiting", "before", "images"),
    [
        (16, 1, 1),  # the lanes have just begun: nobody enters for 99 rounds
        (16, 60, 1),
        (16, 60, 8),
        (16, 1, 9),  # the second wave of lanes
        (16, 99, 16),
        (40, 30, 33),
        (40, 1, 40),
    ],
)
def test_the_estimate_is_the_rounds_that_it_takes(
    waiting: int, before: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = desk(waiting, monkeypatch)
    made.ask(n=8, steps=100, labels=0)
    made.round(before)
    made.ask(n=waiting, steps=100, labels=1)
    estimate = predicted(made.backlog, images)
    assert estimate == pytest.approx(rounds_until_room(made, images, waiting), abs=1)


def test_both_pools_work_at_their_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    made = desk(40, monkeypatch)
    for guidance in (None, 2.0):
        made.ask(n=20, steps=50, labels=0, guidance=guidance)
    made.round(10)
    made.ask(n=16, steps=50, labels=0)
    assert predicted(made.backlog, 17) == pytest.approx(rounds_until_room(made, 17, 40), abs=1)


@pytest.mark.parametrize("images", [1, 5, 12, 20])
def test_mixed_steps_are_followed_in_the_order_of_their_lanes(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = desk(30, monkeypatch)
    mixed: list[dict[str, Any]] = [{"steps": steps, "n": 6, "labels": 0} for steps in (10, 25, 50, 100, 40)]
    for ask in mixed:
        made.ask(**ask)
    made.round(7)
    made.ask(n=30 - made.backlog.images, steps=45, labels=0)
    assert predicted(made.backlog, images) == pytest.approx(rounds_until_room(made, images, 30), abs=1)


def test_the_time_is_never_nothing() -> None:
    backlog = Backlog(10)
    backlog.enter(10, 1000)
    assert predicted(backlog, 1) == 1.0, "before the first round nobody knows"
    backlog.seconds = 1e-6
    assert predicted(backlog, 1) == 0.01
    backlog.seconds, backlog.lanes = 0.5, 2
    assert predicted(backlog, 3) == 50.0, "no lane has an image yet: two enter at once, the third after 100 rounds"


def test_a_long_queue_is_estimated_without_following_each_image() -> None:
    backlog = Backlog(1 << 31)
    backlog.enter(1 << 31, 10 << 31)
    backlog.seconds, backlog.lanes = 0.001, 4
    assert predicted(backlog, 1 << 31) == pytest.approx((10 << 31) / 4 * 0.001, rel=0.01)
