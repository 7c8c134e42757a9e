"""How much is waiting and how fast it goes: what a request is refused by, on the spot."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import chain, repeat

from stepfusion.serving.errors import Overloaded

_SMOOTHING = 0.1  # weight of the newest round in the mean
_UNKNOWN_SECONDS = 1.0  # of a wait, before the first round
_LEAST_SECONDS = 0.01  # of a wait
_MOST_FOLLOWED = 4096  # images whose lanes are followed one by one in an estimate


class Backlog:
    """Counts the images that wait for a lane, and the time of a round of ticks. For any thread.

    Args:
        limit: the most images that may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.images = 0
        self.steps = 0
        self.lanes = 1
        #: of each pool the rounds for which its lanes are taken, and the steps of the images that wait for them
        self.pools: Callable[[], list[tuple[list[int], list[int]]]] = list
        self.seconds = 0.0  #: of a round: every pool that has images ticks once; a running mean
        self.fastest = 0.0  #: of all rounds so far

    def enter(self, images: int, steps: int) -> None:
        """Let so many images with so many steps in all wait; Overloaded if that is too many."""
        with self._lock:
            over = self.images + images - self._limit
            if over > 0:
                retry = self._seconds_until(over)
                raise Overloaded(
                    f"{self.images} images are waiting, {images} more would exceed the queue's {self._limit}; "
                    f"there should be room in {retry:{'.3g' if retry < 1000 else '.0f'}} s",
                    retry,
                )
            self.images += images
            self.steps += steps

    def _seconds_until(self, entered: int) -> float:
        """An estimate of the seconds until so many of the images that wait have a lane."""
        if not self.seconds:
            return _UNKNOWN_SECONDS
        pools = self.pools() or [([0] * self.lanes, [])]
        mean = self.steps / max(1, self.images)
        unseen = self.images - sum(len(waiting) for _, waiting in pools)  # by the scheduler, which is in a round
        lanes, waiting = pools[0]
        followed = min(entered, _MOST_FOLLOWED)
        rounds = _rounds_until(followed, [(lanes, chain(waiting, repeat(mean, max(0, unseen)))), *pools[1:]])
        return max(_LEAST_SECONDS, rounds * entered / followed * self.seconds)

    def put_back(self, images: int, steps: int) -> None:
        """Images lost their lanes, and wait again."""
        with self._lock:
            self.images += images
            self.steps += steps

    def leave(self, images: int, steps: int) -> None:
        """So many images wait no longer."""
        self.put_back(-images, -steps)

    def measured(self, seconds: float) -> None:
        """A round took so long."""
        self.fastest = min(self.fastest, seconds) if self.fastest else seconds
        self.seconds += (seconds - self.seconds) * (_SMOOTHING if self.seconds else 1.0)

    def least(self, longest: int, steps: int) -> float:
        """The fewest seconds that images of ``steps`` steps in all, ``longest`` for one, can take."""
        return self.fastest * max(longest, math.ceil(steps / self.lanes))


def _rounds_until(entered: int, pools: Sequence[tuple[Iterable[int], Iterable[float]]]) -> float:
    """The rounds until so many images have a lane, if each takes the lane of its pool that is free next.

    Args:
        pools: of each the rounds for which its lanes are taken, and the steps of the images that wait, in order.
    """
    free_at = [(float(rounds), number) for number, (lanes, _) in enumerate(pools) for rounds in lanes]
    waiting = [iter(images) for _, images in pools]
    heapify(free_at)
    rounds = 0.0
    while free_at and entered:
        rounds, number = free_at[0]
        steps = next(waiting[number], None)
        if steps is None:
            heappop(free_at)
            continue
        entered -= 1
        heapreplace(free_at, (rounds + steps, number))
    return rounds
