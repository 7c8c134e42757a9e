"""A limit of time for one compilation, so that a compiler that takes too long does not take the rest of a part."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 1.0  # seconds until it is raised again, if something on the way has caught it


class OutOfBudget(BaseException):
    """Raised within :func:`budget`; no `Exception`, for compilers catch those and try something else."""


@contextmanager
def budget(seconds: float | None) -> Iterator[None]:
    """Raise :class:`OutOfBudget` in this block once it has taken so many seconds; None is no limit.

    It interrupts Python, and what waits for other processes; native code is left to end. Outside the main thread,
    where no signal arrives, there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfBudget(f"its {seconds:.0f} s for compiling were used up")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
