"""A request on its way through a serving engine, and what its caller gets."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.files.images import encode_png, grid, why_no_picture
from stepfusion.kernels.to_uint8 import to_uint8_reference
from stepfusion.lanes.request import ActiveRequest, Event
from stepfusion.serving.containment import contained


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

    def __repr__(self) -> str:
        return f"Result({_checks.describe(self.images)}, {self.timings.total:.2f} s)"

    def _repr_png_(self) -> bytes | None:
        """The images in a notebook; None if they are no pictures, as latents are not."""
        pixels = self.images if self.images.dtype == torch.uint8 else to_uint8_reference(self.images)
        if not len(pixels) or why_no_picture(pixels.shape[-1]) is not None:
            return None
        return encode_png(grid(pixels.numpy(), gap=0 if len(pixels) == 1 else 2))


class ResultFuture(Future[Result]):
    """A future whose callbacks cannot end the thread that resolves it, nor keep each other from being called."""

    def add_done_callback(self, fn: Callable[[Future[Result]], object]) -> None:
        def call(future: Future[Result]) -> None:
            with contained("a callback of a request's future"):
                fn(future)

        super().add_done_callback(call)

    def resolve(self, outcome: Result | Exception) -> None:
        """Set the result or the error, unless the future was cancelled. To be called once."""
        if not self.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)


@dataclass(eq=False, kw_only=True)
class ServedRequest(ActiveRequest):
    """A request under way, and what its caller wants of it.

    Attributes:
        number: of the request, in the order of arrival.
        future: of the result.
        submitted, started, since, deadline: times of ``time.monotonic``: when it came, when it first got a lane, when
            it last got one, and when its images are of no more use.
        pixels: its images are wanted as uint8.
        priority: higher ones get lanes first.
        progress: is called with its events.
        context: what tracing wants back.
        images: those that are done, on the host; None before the first one.
        left: how many are not done.
    """

    number: int
    submitted: float
    future: ResultFuture = field(default_factory=ResultFuture)
    pixels: bool = False
    priority: int = 0
    deadline: float = math.inf
    progress: Callable[[Event], object] | None = None
    context: Any = None
    images: torch.Tensor | None = None
    left: int = field(init=False)
    started: float | None = None
    since: float = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.left = len(self.request)
        self.since = self.submitted
        self._claimed = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether its end was claimed: its caller knows of it, or is about to."""
        return self._claimed.locked()

    def claim(self) -> bool:
        """True for the first of all threads that asks: that one tells the caller how the request ended."""
        return self._claimed.acquire(blocking=False)

    @property
    def progress_made(self) -> str:
        """How many images are done, for messages."""
        return f"{len(self.request) - self.left} of {len(self.request)} images were done"

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
