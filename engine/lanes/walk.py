"""One pass of a request through the lanes of a runner: who enters, who leaves, what is seen on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stepfusion.errors import NonFiniteError
from stepfusion.kernels import FINITE
from stepfusion.lanes.request import Request
from stepfusion.lanes.runner import Runner
from stepfusion.lanes.transfer import HostCopy, as_index


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
    there can start again after a failure. Which lane is done when follows from counting ticks: between arrivals and
    departures a tick costs the host one call. ``strict`` raises where an image became non-finite: the flags of those
    that leave are read when the next ones do, so that the device does not wait for the host, and the last by
    :meth:`check`; with ``deferred``, all are. With ``watched``, ticks yield events.
    """

    def __init__(
        self,
        runner: Runner,
        request: Request,
        result: torch.Tensor,
        waiting: dict[int, None],
        *,
        strict: bool,
        watched: bool,
        deferred: bool = False,
    ) -> None:
        self._runner, self._request, self._result, self._waiting = runner, request, result, waiting
        self._strict, self._watched, self._deferred = strict, watched, deferred
        self._queue = deque(waiting)
        self._free = list(range(runner.lanes))
        self._image: dict[int, int] = {}  # lane -> image
        self._entered: dict[int, int] = {}  # lane -> the tick before which its image entered
        self._due: dict[int, list[int]] = {}  # tick -> the lanes that are done with it
        self._now = 0
        self._first = 0  # row of the table in the runner's store
        self._unread: deque[tuple[HostCopy, list[int]]] = deque()  # flags on their way, and whose they are

    def run(self) -> Iterator[tuple[int, list[Event]]]:
        """Tick until nothing is left; yields how many images each tick moved, and its events."""
        runner, given, watched = self._runner, self._request.noise is not None, self._watched
        self._first = runner.load(self._request.table)
        runner.prepare(noise=given, keep_x0=watched)
        while self._queue or self._image:
            if self._queue and self._free:
                self._enter()
            runner.tick(self._noise() if given else None, keep_x0=watched)
            self._now += 1
            moved = len(self._image)
            events = self._events() if watched else []
            if self._now in self._due:
                self._leave()
            yield moved, events

    def check(self, unread: int = 0) -> None:
        """Read flags until those of at most ``unread`` departures are left; NonFiniteError where one is raised."""
        while len(self._unread) > unread:
            flags, images = self._unread.popleft()
            for image, broken in zip(images, flags.wait().tolist(), strict=True):
                if broken != FINITE:
                    raise nonfinite(self._request, image, broken - self._first)

    def _enter(self) -> None:
        count = min(len(self._queue), len(self._free))
        lanes, self._free = self._free[:count], self._free[count:]
        images = [self._queue.popleft() for _ in lanes]
        request = self._request
        start = None if request.start is None else request.start[images]
        known = None if request.known is None else request.known[images]
        self._runner.admit(lanes, [request.tickets[image] for image in images], self._first, start, known)
        for lane, image in zip(lanes, images, strict=True):
            self._image[lane], self._entered[lane] = image, self._now
            self._due.setdefault(self._now + request.table.steps(request.parts[image]), []).append(lane)

    def _leave(self) -> None:
        """Take out what is finished."""
        lanes = sorted(self._due.pop(self._now))
        images = [self._image[lane] for lane in lanes]
        runner, where = self._runner, as_index(lanes, self._result.device)
        self._result[as_index(images, self._result.device)] = runner.x[where]
        if self._strict:
            self._unread.append((HostCopy(runner.flags[where].clone()), images))
            if not self._deferred:
                self.check(unread=0 if self._result.device.type == "cpu" else 1)
        for lane, image in zip(lanes, images, strict=True):
            del self._image[lane], self._entered[lane], self._waiting[image]
        self._free = sorted(self._free + lanes)

    def _noise(self) -> torch.Tensor:
        """The z of this tick for every lane, as the request brought it."""
        assert self._request.noise is not None
        noise = torch.zeros_like(self._runner.x)
        lanes = list(self._image)
        steps = [self._now - self._entered[lane] for lane in lanes]
        noise[lanes] = self._request.noise[steps, list(self._image.values())].to(noise.device, noise.dtype)
        return noise

    def _events(self) -> list[Event]:
        """One event for all lanes at the same step of the same part of the table."""
        request, together = self._request, dict[tuple[int, int], list[int]]()
        for lane, image in self._image.items():
            together.setdefault((request.parts[image], self._now - self._entered[lane] - 1), []).append(lane)
        return [self._event(part, step, lanes) for (part, step), lanes in together.items()]

    def _event(self, part: int, step: int, lanes: list[int]) -> Event:
        table, runner = self._request.table, self._runner
        timestep = int(table.timesteps[table.starts[part] + step])
        images = tuple(self._image[lane] for lane in lanes)
        where = as_index(lanes, runner.x.device)
        return Event(step, table.steps(part), timestep, images, runner.x[where].clone(), runner.x0[where].clone())


def nonfinite(request: Request, image: int, row: int) -> NonFiniteError:
    """The error that names an image of a request and the ``row`` of its table at which it became non-finite."""
    table, part, ticket = request.table, request.parts[image], request.tickets[image]
    error = NonFiniteError(
        f"image {request.first + image} (seed {ticket.seed}, index {ticket.index}) became non-finite at step "
        f"{row - table.starts[part] + 1} of {table.steps(part)} (timestep {table.timesteps[row]})"
    )
    error.image = request.first + image
    return error
