"""Code of callers that runs in the threads of a serving engine: what it raises ends nothing but its own request."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

logger = logging.getLogger("stepfusion.serving")


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Log what ``what`` raises, KeyboardInterrupt and SystemExit included, and go on.

    In the main thread, where Ctrl-C arrives, only an Exception is held back.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
            raise
        _log(what, error)


def as_exception(what: str, error: BaseException) -> Exception:
    """What ``what`` raised, as a future can carry it.

    Whoever waits for a future that holds a KeyboardInterrupt, a SystemExit, a CancelledError or a StopIteration would
    take it for one of their own: an event loop would stop. So they get a RuntimeError, and find it as the cause.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    carried = RuntimeError(f"{what} raised {type(error).__name__}")
    carried.__cause__ = error
    return carried


def _log(what: str, error: BaseException) -> None:
    try:
        logger.error("%s raised %s", what, type(error).__name__, exc_info=error)
    except BaseException:  # a log handler of the application may be what raises
        with suppress(Exception):  # and stderr may be closed
            traceback.print_exc()
