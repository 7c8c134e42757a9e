"""One pass of a request through the lanes of a runner: who enters, who leaves, what is seen on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stepfusion.errors import NonFiniteError
from stepfusion.kernels import FINITE
from stepfusion.request import Request
from stepfusion.runner import Runner


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


class Walk:
    """Takes the images of ``waiting`` through a runner and writes each into ``result`` when it is done.

    An image enters a free lane between two ticks and leaves ``waiting`` when it is finished, so that what is left
    there can start again after a failure. ``strict`` raises where an image became non-finite; ``watched`` fills the
    events' tensors.
    """

    def __init__(
        self,
        runner: Runner,
        request: Request,
        result: torch.Tensor,
        waiting: list[int],
        *,
        strict: bool,
        watched: bool,
    ) -> None:
        self._runner, self._request, self._result, self._waiting = runner, request, result, waiting
        self._strict, self._watched = strict, watched
        self._queue = list(reversed(waiting))
        self._image: dict[int, int] = {}  # lane -> image
        self._done: dict[int, int] = {}  # lane -> steps it has taken

    def run(self) -> Iterator[list[Event]]:
        """Tick until nothing is left; yields the events of each tick."""
        while self._queue or self._image:
            self._enter()
            self._runner.tick(self._noise(), keep_x0=self._watched)
            events = self._events()
            self._leave()
            yield events

    def _enter(self) -> None:
        free = [lane for lane in range(self._runner.lanes) if lane not in self._image]
        entering = {lane: self._queue.pop() for lane in free[: len(self._queue)]}
        if not entering:
            return
        images = list(entering.values())
        start = None if self._request.start is None else self._request.start[images]
        self._runner.admit(list(entering), [self._request.tickets[image] for image in images], start)
        self._image |= entering
        self._done |= dict.fromkeys(entering, 0)

    def _noise(self) -> torch.Tensor | None:
        """The z of this tick for every lane, where the request brought its own."""
        if self._request.noise is None:
            return None
        noise = torch.zeros_like(self._runner.x)
        lanes = list(self._image)
        given = self._request.noise[[self._done[lane] for lane in lanes], [self._image[lane] for lane in lanes]]
        noise[lanes] = given.to(noise.device, noise.dtype)
        return noise

    def _events(self) -> list[Event]:
        """One event for all lanes at the same step of the same part of the table."""
        request = self._request
        together: dict[tuple[int, int], list[int]] = {}
        for lane, image in self._image.items():
            together.setdefault((request.parts[image], self._done[lane]), []).append(lane)
        return [self._event(part, step, lanes) for (part, step), lanes in together.items()]

    def _event(self, part: int, step: int, lanes: list[int]) -> Event:
        table, runner = self._request.table, self._runner
        timestep = int(table.timesteps[table.starts[part] + step])
        # unwatched, a slice: an index would copy to the device in every tick
        x, x0 = (runner.x[lanes], runner.x0[lanes]) if self._watched else (runner.x[:0], runner.x0[:0])
        images = tuple(self._image[lane] for lane in lanes)
        return Event(step, table.steps(part), timestep, images, x, x0)

    def _leave(self) -> None:
        """Count the step, and take out what is finished."""
        table, parts = self._request.table, self._request.parts
        for lane in self._image:
            self._done[lane] += 1
        finished = {lane: i for lane, i in self._image.items() if self._done[lane] == table.steps(parts[i])}
        if not finished:
            return
        self._result[list(finished.values())] = self._runner.x[list(finished)]
        if self._strict:
            self._check(finished)
        for lane, image in finished.items():
            del self._image[lane], self._done[lane]
            self._waiting.remove(image)

    def _check(self, finished: dict[int, int]) -> None:
        broken = self._runner.broken_rows()
        for lane, image in finished.items():
            if broken[lane] == FINITE:
                continue
            table, part, ticket = self._request.table, self._request.parts[image], self._request.tickets[image]
            step = broken[lane] - table.starts[part] + 1
            raise NonFiniteError(
                f"image {image} (seed {ticket.seed}, index {ticket.index}) became non-finite at step {step} of "
                f"{table.steps(part)} (timestep {table.timesteps[broken[lane]]})"
            )
