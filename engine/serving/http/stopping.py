"""How a serving process ends: a first signal lets it finish what it has, a second one kills it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

logger = logging.getLogger("stepfusion.serving")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PARENT_SECONDS = 0.5  # between two looks at who the parent is
_WANTED_SECONDS = 0.5  # between two looks at whether something is still wanted


@contextmanager
def stopping(stop: Callable[[], object]) -> Iterator[None]:
    """In the main thread: call ``stop`` on the first SIGINT or SIGTERM, and die of the second as by default."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked = True
        stop()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def terminate_with(parent: int) -> None:
    """Send this process SIGTERM when ``parent``, the process that started it, is no more; looks twice a second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stepfusion-parent", daemon=True).start()


def when_gone(is_wanted: Callable[[], bool], drain: float, end: Callable[[], object]) -> None:
    """Call ``end``, in a thread, ``drain`` seconds after ``is_wanted`` no longer says what it once said: True.

    If it raises, because whoever knows is not to be reached, that says nothing.
    """

    def looks_wanted() -> bool | None:
        try:
            return is_wanted()
        except Exception as error:
            logger.debug("whether this is still wanted cannot be known now", exc_info=error)
            return None

    def watch() -> None:
        was_wanted = False
        while (wanted := looks_wanted()) is not False or not was_wanted:
            was_wanted |= bool(wanted)
            time.sleep(_WANTED_SECONDS)
        time.sleep(drain)
        end()

    threading.Thread(target=watch, name="stepfusion-wanted", daemon=True).start()


def exit_at_once(status: int) -> NoReturn:
    """End this process without waiting for any thread, nor for what a stuck device would do at a regular exit."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it is full, gone or closed
            stream.flush()
    os._exit(status)
