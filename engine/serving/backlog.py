"""How much is waiting and how fast it goes: what a request is refused by, on the spot."""

from __future__ import annotations

import math
import threading

from stepfusion.serving.errors import Overloaded

_SMOOTHING = 0.1  # weight of the newest round in the mean


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
        self.seconds = 0.0  #: of a round: every pool that has images ticks once; a running mean
        self.fastest = 0.0  #: of all rounds so far

    def enter(self, images: int, steps: int) -> None:
        """Let so many images with so many steps in all wait; Overloaded where that is too many."""
        with self._lock:
            over = self.images + images - self._limit
            if over > 0:
                # what is in the way is a share of what waits, which the lanes work off together
                share = min(1.0, over / max(1, self.images))
                retry = max(self.seconds, share * self.steps * self.seconds / self.lanes)
                raise Overloaded(
                    f"{self.images} images are waiting, {images} more would exceed the queue's {self._limit}; "
                    f"there should be room in {retry:.3g} s",
                    retry,
                )
            self.images += images
            self.steps += steps

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
