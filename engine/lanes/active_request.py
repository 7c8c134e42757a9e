"""A request under way: which of its images wait for a lane, and what is to be seen of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from stepfusion.errors import NonFiniteError
from stepfusion.lanes.request import Request


@dataclass(frozen=True)
class Event:
    """One step of some images, seen by :meth:`stepfusion.Engine.stream` and by callbacks.

    ``step`` counts from 0 to ``steps`` - 1, and ``timestep`` is the training timestep that the step started from.
    ``images`` are positions in the request, ``x`` [k, ...] their states after the step and ``x0`` [k, ...] the
    predictions it used, float32.
    """

    step: int
    steps: int
    timestep: int
    images: tuple[int, ...]
    x: torch.Tensor
    x0: torch.Tensor


@dataclass(eq=False)
class ActiveRequest:
    """A request, and how far it is.

    Attributes:
        request: what is made.
        first: the row of the device tables at which its table stands; None while it has no rows.
        every: an event is wanted after every so many steps of an image and after its last; None for no events.
        waiting: the images that have no lane yet, the next one first.
    """

    request: Request
    first: int | None = None
    every: int | None = None
    waiting: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = deque(range(len(self.request)))

    def steps(self, image: int) -> int:
        """How many ticks an image takes."""
        return self.request.steps(image)

    def shows(self, image: int, step: int) -> bool:
        """Whether an event is wanted after ``step`` steps of an image."""
        return self.every is not None and (step % self.every == 0 or step == self.steps(image))

    def nonfinite(self, image: int, flag: int) -> NonFiniteError:
        """The error that names an image and the step at which it became non-finite; ``flag`` is its row there."""
        request = self.request
        table, part, start = request.table, request.parts[image], request.lane_starts[image]
        row = flag - (self.first or 0)
        error = NonFiniteError(
            f"image {request.first + image} (seed {start.seed}, index {start.index}) became non-finite at step "
            f"{row - table.starts[part] + 1} of {table.steps(part)} (timestep {table.timesteps[row]})"
        )
        error.image = request.first + image
        return error
