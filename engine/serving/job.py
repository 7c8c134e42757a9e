"""A request on its way through a serving engine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from stepfusion.lanes.request import Request
from stepfusion.lanes.walk import Event


@dataclass(frozen=True)
class Timings:
    """Seconds that a request waited for its first lane, ran from then on, and took in all."""

    queued: float
    running: float
    total: float


@dataclass(frozen=True)
class Result:
    """What was asked for: ``images`` on the host, float32 [n, C, H, W] or uint8 [n, H, W, C], and its timings."""

    images: torch.Tensor
    timings: Timings


@dataclass(eq=False)
class Job:
    """A request, what its caller wants of it, and how far it is.

    ``deadline``, ``submitted``, ``started`` and ``since`` are times of ``time.monotonic``; ``since`` is when it last
    got a lane, ``turn`` the number of that lane among all that were given. ``first`` is the row at which its table
    stands, None while it does not. ``context`` is what tracing wants back.
    """

    number: int
    request: Request
    future: Future[Result]
    submitted: float
    pixels: bool = False
    priority: int = 0
    deadline: float = math.inf
    progress: Callable[[Event], object] | None = None
    every: int = 1
    context: Any = None
    waiting: deque[int] = field(init=False)
    images: torch.Tensor | None = None
    left: int = field(init=False)
    started: float | None = None
    since: float = field(init=False)
    turn: int = 0
    first: int | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.left = len(self.request)
        self.waiting = deque(range(self.left))
        self.since = self.submitted

    def steps(self, image: int) -> int:
        """How many ticks an image takes."""
        return self.request.table.steps(self.request.parts[image])

    @property
    def waiting_steps(self) -> int:
        """Steps of the images that have no lane yet."""
        return sum(map(self.steps, self.waiting))

    def receive(self, image: int, value: torch.Tensor) -> None:
        """Take in a finished image, on the host."""
        if self.images is None:
            self.images = torch.empty((len(self.request), *value.shape), dtype=value.dtype)
        self.images[image] = value
        self.left -= 1
