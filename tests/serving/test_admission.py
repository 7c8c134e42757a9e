"""Whose turn it is: the least work first, priorities, and no starving."""

from collections import Counter
from concurrent.futures import Future
from typing import Any, cast

from stepfusion.lanes.request import Request
from stepfusion.serving.admission import Admission
from stepfusion.serving.served_request import ServedRequest

AGING = 10.0


class Images(list[int]):
    """What admission asks of a request of so many images: how many steps each has."""

    def __init__(self, images: int, steps: int) -> None:
        super().__init__([steps] * images)
        self.steps = self.__getitem__


def job(number: int, images: int, *, steps: int = 10, priority: int = 0, submitted: float = 0.0) -> ServedRequest:
    """A request of so many images that nobody will make."""
    request = cast(Request, Images(images, steps))
    return ServedRequest(request, number=number, future=Future(), submitted=submitted, priority=priority)


def waiting(*jobs: ServedRequest) -> Admission:
    admission = Admission(AGING)
    for one in jobs:
        admission.add(one)
    return admission


def pick(admission: Admission, lanes: int, now: float = 0.0, **options: Any) -> list[tuple[int, int]]:
    """The numbers of the requests that get lanes, and their images."""
    ready = options.get("ready", lambda job: True)
    return [(one.number, image) for one, image in admission.pick(lanes, now, ready)]


def test_the_least_work_comes_first_and_images_in_their_order() -> None:
    admission = waiting(job(1, 3), job(2, 1), job(3, 2))
    assert pick(admission, 4) == [(2, 0), (3, 0), (3, 1), (1, 0)]
    assert pick(admission, 9) == [(1, 1), (1, 2)]
    assert len(admission) == 0


def test_equal_requests_are_finished_one_after_the_other() -> None:
    admission = waiting(job(1, 2), job(2, 2), job(3, 2))
    assert pick(admission, 3) == [(1, 0), (1, 1), (2, 0)]
    admission.add(job(4, 2))
    assert pick(admission, 5) == [(2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]


def test_work_is_steps() -> None:
    admission = waiting(job(1, 2, steps=100), job(2, 9, steps=10), job(3, 1, steps=95))
    assert [number for number, _ in pick(admission, 12)] == [2] * 9 + [3] + [1] * 2


def test_a_small_request_does_not_wait_for_the_images_of_a_large_one() -> None:
    admission = waiting(job(1, 1000))
    assert len(pick(admission, 8)) == 8
    admission.add(job(2, 2))
    assert pick(admission, 3) == [(2, 0), (2, 1), (1, 8)]


def test_a_large_request_does_not_age_while_it_is_served() -> None:
    admission = waiting(job(1, 1000))
    for second in range(100):
        pick(admission, 1, float(second))
    admission.add(job(2, 50, submitted=100.0))
    given = [number for second in range(100, 160) for number, _ in pick(admission, 1, float(second))]
    assert given[:9] == [2] * 9
    assert Counter(given) == {1: 10, 2: 50}, "one in each time of aging, and all once the small one is done"


def test_higher_priorities_come_first() -> None:
    admission = waiting(job(1, 3, priority=-1), job(2, 2), job(3, 2, priority=7))
    assert [number for number, _ in pick(admission, 7)] == [3, 3, 2, 2, 1, 1, 1]


def test_nobody_starves() -> None:
    """One of priority 0 among new ones of priority 3, each second, for one lane: served when it has aged enough."""
    admission = waiting(job(0, 1))
    for second in range(200):
        admission.add(job(second + 1, 1, priority=3, submitted=float(second)))
        if (0, 0) in pick(admission, 1, float(second)):
            assert 30 <= second <= 41
            return
    raise AssertionError("it starved")


def test_who_is_not_ready_holds_up_nobody() -> None:
    admission = waiting(job(1, 1), job(2, 2))
    assert pick(admission, 3, ready=lambda one: one.number != 1) == [(2, 0), (2, 1)]
    assert pick(admission, 3) == [(1, 0)]


def test_what_comes_next_is_known_and_not_taken() -> None:
    admission = waiting(job(1, 2, steps=30), job(2, 3, steps=5), job(3, 1, steps=70, priority=1), job(4, 1, steps=15))
    assert admission.upcoming() == [70, 5, 5, 5, 15, 30, 30]
    assert [number for number, _ in pick(admission, 7)] == [3, 2, 2, 2, 4, 1, 1]
    assert admission.upcoming() == []


def test_who_gave_up_gets_nothing() -> None:
    first, second = job(1, 3), job(2, 1)
    admission = waiting(first, second)
    admission.discard(first)
    admission.discard(first)
    assert pick(admission, 5) == [(2, 0)]
