"""How much is waiting and how fast it goes: what a request is refused by, on the spot."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace

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
        self.remaining: Callable[[], Sequence[int]] = list  #: rounds for which each lane is still taken
        self.seconds = 0.0  #: of a round: every pool that has images ticks once; a running mean
        self.fastest = 0.0  #: of all rounds so far

    def enter(self, images: int, steps: int) -> None:
        """Let so many images with so many steps in all wait; Overloaded where that is too many."""
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
        """An estimate of the seconds until so many of the images that wait have a lane.

        The next image takes the lane that is free next, for the mean number of steps of all that wait.
        """
        if not self.seconds:
            return _UNKNOWN_SECONDS
        steps = self.steps / max(1, self.images)
        free_at = [float(rounds) for rounds in self.remaining()] or [0.0] * self.lanes
        heapify(free_at)
        followed = min(entered, _MOST_FOLLOWED)
        for _ in range(followed - 1):
            heapreplace(free_at, free_at[0] + steps)
        return max(_LEAST_SECONDS, free_at[0] * entered / followed * self.seconds)

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
