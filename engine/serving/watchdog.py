"""The thread that watches the engine's thread: deadlines are kept and a hang is noticed, whatever that one does.

A device that is stuck, or a network that waits for something, holds the engine's thread inside a round of ticks for
ever. Nothing that this thread was to do would be done then, so what callers rely on is looked after from here.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable

from stepfusion.serving.open_requests import OpenRequests

_MOST_SECONDS = 1.0  # between two looks
_LOOKS = 8  # at least so many in the time after which a round hangs
_STOPPED_SECONDS = 5.0  # by which a look is late only if this process was stopped, or the machine slept


class Patience:
    """Decides whether a round hangs. Time in which this process did not run does not count.

    Args:
        seconds: that a round may take; None for as long as it likes.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self.interval = _MOST_SECONDS if seconds is None else min(_MOST_SECONDS, seconds / _LOOKS)
        self._running_since = -math.inf
        self._looked: float | None = None

    def look(self, now: float, round_since: float | None) -> bool:
        """Whether the round that began at ``round_since`` hangs ``now``; None between rounds.

        To be called at least every :attr:`interval` seconds.
        """
        if self._looked is not None and now - self._looked > self.interval + _STOPPED_SECONDS:
            self._running_since = now
        self._looked = now
        if self._seconds is None or round_since is None:
            return False
        return now - max(round_since, self._running_since) >= self._seconds


class Watchdog:
    """Ends requests whose deadline has passed, and calls for help if a round does not end.

    Args:
        requests: whose deadlines are kept.
        patience: with a round.
        round_since: returns when the round under way began, a time of ``time.monotonic``; None between rounds.
        on_hang: is called with that time if the round hangs; returns False if it has ended meanwhile.
    """

    def __init__(
        self,
        requests: OpenRequests,
        patience: Patience,
        round_since: Callable[[], float | None],
        on_hang: Callable[[float], bool],
    ) -> None:
        self._requests, self._patience = requests, patience
        self._round_since, self._on_hang = round_since, on_hang
        # True to look again, False to stop. Unlike an event, it may be put from anywhere: a finalizer may interrupt.
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._wakes_at = math.inf
        self.thread = threading.Thread(target=self._run, name="stepfusion-watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self.thread.start()

    def stop(self) -> None:
        """Watch no more; does not wait."""
        self._calls.put(False)

    def expect(self, deadline: float) -> None:
        """A request with this deadline is open."""
        if deadline < self._wakes_at:
            self._calls.put(True)

    def _run(self) -> None:
        while self._sleep():
            now = time.monotonic()
            self._requests.end_late(now)
            since = self._round_since()
            if self._patience.look(now, since) and since is not None and self._on_hang(since):
                return

    def _sleep(self) -> bool:
        """Sleep until the next look or deadline; False if it is to stop."""
        self._wakes_at = math.inf  # whoever comes while the next deadline is looked for wakes it
        now = time.monotonic()
        self._wakes_at = min(now + self._patience.interval, self._requests.next_deadline)
        try:
            return self._calls.get(timeout=max(0.0, self._wakes_at - now))
        except queue.Empty:
            return True
