"""Progress of a long run: a bar if stderr is a terminal, a line every 30 seconds if it is a log."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Self

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0
_LEAST_SECONDS = 0.1  # between two looks at the clock


class Progress:
    """Counts finished images; ``done`` of ``total`` were there before.

    The lines come from a thread of its own, for images finish a whole unit at a time, and a unit may take longer.
    """

    def __init__(self, total: int, done: int, *, quiet: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=" images",
            disable=quiet or not terminal,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self._total, self._before, self.done = total, done, done
        self._lines = not quiet and not terminal
        self._started = self._said = time.monotonic()
        self._ended, self._saying = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep_saying, name="stepfusion-progress", daemon=True)

    def update(self, images: int) -> None:
        """Count so many more finished images."""
        self.done += images
        self._bar.update(images)
        self._say_if_due()

    def _keep_saying(self) -> None:
        while not self._ended.wait(max(_LEAST_SECONDS, self._said + _SECONDS_BETWEEN_LINES - time.monotonic())):
            self._say_if_due()

    def _say_if_due(self) -> None:
        with self._saying:
            now = time.monotonic()
            if self._lines and now - self._said >= _SECONDS_BETWEEN_LINES:
                self._said = now
                with suppress(OSError, ValueError):  # a log that is full or closed ends no run
                    print(f"stepfusion: {self._line(now - self._started)}", file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        counted, new = f"{self.done} of {self._total} images", self.done - self._before
        if not new:
            return f"{counted}, none finished in the {tqdm.format_interval(seconds)} of this run yet"
        rate = new / seconds
        left = tqdm.format_interval((self._total - self.done) / rate)
        return f"{counted}, {rate:.3g} images/s, {left} left"

    def __enter__(self) -> Self:
        if self._lines:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._lines:
            self._thread.join()
        self._bar.close()
