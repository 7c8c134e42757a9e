"""The standard streams of a command, which may be closed: ``2>&-`` in a shell, or a program without a console."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def standard_streams() -> Iterator[None]:
    """Give a command streams that it can write to: what is said to a closed one is said to nobody.

    The descriptors 0 to 2 are taken as well. Else the next file that is opened would get one of them, and what a
    library prints would go into it.
    """
    _take_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nobody:
        sys.stdout, sys.stderr = (nobody if _is_closed(stream) else stream for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            _forget_what_nobody_reads()


def tell(text: str) -> None:
    """Write a line to stderr; a full disk, or a reader that is gone, does not change how a command ends."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr)


def _forget_what_nobody_reads() -> None:
    """Let go of what stderr would not take: Python tries again at its exit, and ends with a status of its own."""
    try:
        if not _is_closed(sys.stderr):
            sys.stderr.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nobody:
            os.dup2(nobody.fileno(), sys.stderr.fileno())
            sys.stderr.flush()


def _is_closed(stream: TextIO | None) -> bool:
    return stream is None or stream.closed


def _take_descriptors() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
