"""Progress of a long run: a bar if stderr is a terminal, a line now and then if it is a log."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts finished images; ``done`` of ``total`` were there before."""

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

    def update(self, images: int) -> None:
        """Count so many more finished images."""
        self.done += images
        self._bar.update(images)
        now = time.monotonic()
        if self._lines and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            rate = (self.done - self._before) / (now - self._started)
            left = tqdm.format_interval((self._total - self.done) / rate)
            line = f"{self.done} of {self._total} images, {rate:.3g} images/s, {left} left"
            print(f"stepfusion: {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
