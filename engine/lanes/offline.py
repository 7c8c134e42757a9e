"""One request alone in lanes of its own, from its first image to its last."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from tqdm import tqdm

from stepfusion.errors import SamplingCancelled
from stepfusion.kernels.launch import plain_torch
from stepfusion.lanes.lane_engine import Departure, LaneEngine, Occupant
from stepfusion.lanes.request import ActiveRequest, Event, Request
from stepfusion.lanes.runner import Runner, RunnerKey
from stepfusion.lanes.runners import Runners
from stepfusion.lanes.transfer import HostCopy, as_index


class OfflineLanes:
    """Takes a request through lanes, and writes each image into ``result`` when it is done.

    If memory runs out, the lanes are halved and the unfinished images start again: they come out the same.

    Args:
        result: float32 [n, ...] on the device.
        strict: raise NonFiniteError if an image becomes non-finite. Flags are read when the next images leave, and
            the last ones by :meth:`check`.
        watched: yield events.
        deferred: read no flags before :meth:`check`.
        record: called when images have entered lanes, and after every tick, with log-probabilities of steps in the
            lanes' runner.
    """

    def __init__(
        self,
        runners: Runners,
        request: Request,
        result: torch.Tensor,
        *,
        strict: bool,
        watched: bool,
        deferred: bool = False,
        record: Callable[[LaneEngine], None] | None = None,
    ) -> None:
        self._runners, self._result = runners, result
        self._strict, self._watched, self._deferred, self._record = strict, watched, deferred, record
        self._active = ActiveRequest(runners.noised(request), every=1 if watched else None)
        self._borrowed: tuple[RunnerKey, Runner] | None = None
        self._unread: deque[Departure] = deque()

    def run(self) -> Generator[tuple[int, list[Event]], None, None]:
        """Tick until every image is done; yields how many images each tick moved, and its events."""
        active, lanes = self._active, self._lane_engine()
        try:
            while active.waiting or lanes.busy:
                try:
                    moved = self._round(lanes)
                except torch.OutOfMemoryError as error:
                    self._halve(lanes, error)
                    continue
                yield moved
        finally:
            self._give_back()

    @plain_torch(gradients=False)  # and not around the loop: between two rounds the caller's own settings hold
    def _round(self, lanes: LaneEngine) -> tuple[int, list[Event]]:
        self._admit(lanes)
        if self._record is not None:
            self._record(lanes)
        lanes.tick()
        if self._record is not None:
            self._record(lanes)
        moved = lanes.busy
        events = [event for _, event in lanes.events()] if self._watched else []
        self._depart(lanes)
        return moved, events

    def check(self, unread: int = 0) -> None:
        """Read flags until those of at most ``unread`` departures are left; NonFiniteError if one is raised."""
        while len(self._unread) > unread:
            for _, _, error in self._unread.popleft().outcomes():
                if error is not None:
                    raise error

    def _lane_engine(self) -> LaneEngine:
        return LaneEngine(
            self._borrow,
            (self._runners.bucket(len(self._active.request), self._active.request),),
            watched=self._watched,
            given_noise=self._active.request.noise is not None,
            may_halve=not self._runners.invariant,
        )

    def _admit(self, lanes: LaneEngine) -> None:
        waiting = self._active.waiting
        count = min(len(waiting), lanes.free)
        if count:
            lanes.admit([(self._active, waiting[place]) for place in range(count)])
        for _ in range(count):
            waiting.popleft()

    def _depart(self, lanes: LaneEngine) -> None:
        """Write out the images that are done, and take them out of their lanes."""
        done = lanes.done()
        if not done:
            return
        self._write(lanes, done)
        departure = lanes.depart(done)
        if self._strict:
            self._unread.append(departure)
            if not self._deferred:
                # On a GPU these flags are read with the next departure, so that the host does not wait.
                self.check(unread=0 if self._result.device.type == "cpu" else 1)

    def _write(self, lanes: LaneEngine, done: list[Occupant]) -> None:
        where = as_index([occupant.image for occupant in done], self._result.device)
        self._result[where] = lanes.values(done, "x")

    def _halve(self, lanes: LaneEngine, error: torch.OutOfMemoryError) -> None:
        lost = lanes.halve(error)
        self._borrowed = None  # it is too large to be lent again
        self._runners.shrink(lanes.lanes)
        self._active.waiting.extendleft(image for _, image in reversed(lost))
        warnings.warn(f"out of memory: going on with {lanes.lanes} lanes at a time", RuntimeWarning, stacklevel=4)

    def _borrow(self, lanes: int) -> Runner:
        """A runner of so many lanes with the request's table in its store, and its kind of tick captured."""
        request = self._active.request
        key = self._runners.key(request, lanes, logprobs=self._record is not None)
        runner = self._runners.pool.take(key, self._runners.make)
        self._borrowed = key, runner
        self._active.first = runner.load(request.table)
        runner.prepare(noise=request.noise is not None, keep_x0=self._watched)
        return runner

    def _give_back(self) -> None:
        if self._borrowed is not None:
            self._runners.pool.give(*self._borrowed)
            self._borrowed = None


class _Bar(tqdm):  # type: ignore[misc]
    """A bar on stderr that moves with every step of every image, and counts the images that they make."""

    def __init__(self, request: Request, shown: bool) -> None:
        self._images = len(request)
        drawn = self._images > 0 and request.asked.get("seed", 0) is None
        super().__init__(
            total=sum(request.steps(image) for image in range(len(request))),
            desc=f"seed {request.lane_starts[0].seed}" if drawn else None,
            bar_format="{l_bar}{bar}| {images} [{elapsed}<{remaining}, {images_rate}]",
            disable=not shown,
            dynamic_ncols=True,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the format of the bar names."""
        found: dict[str, Any] = super().format_dict
        steps = (found["total"] or 1) / max(1, self._images)  # of an image
        rate = found["rate"] or (found["n"] / found["elapsed"] if found["elapsed"] else 0)
        images = f"{int(found['n'] / steps)}/{self._images} images"
        return found | {"images": images, "images_rate": f"{rate / steps:.3g} images/s"}


def sample(
    runners: Runners, request: Request, *, shown: bool, strict: bool, callback: Callable[[Event], object] | None
) -> torch.Tensor:
    """The images of a request, float32 [n, ...] on the device, with a bar on stderr if ``shown``.

    SamplingCancelled if ``callback``, which sees every event, returns False.
    """
    result = room_for(runners, request)
    lanes = OfflineLanes(runners, request, result, strict=strict, watched=callback is not None)
    done = 0
    with _Bar(request, shown) as bar:
        for moved, events in lanes.run():
            done += moved
            if shown:
                bar.update(moved)
            if callback is not None and False in [callback(event) for event in events]:
                raise SamplingCancelled(f"the callback cancelled sampling after {done} of {bar.total} steps")
        lanes.check()
    return result


def stream(runners: Runners, request: Request, every: int) -> Iterator[Event]:
    """An event after every ``every``-th step of an image and after its last."""
    lanes = OfflineLanes(runners, request, room_for(runners, request), strict=True, watched=True)
    for _, events in lanes.run():
        for event in events:
            if (event.step + 1) % every == 0 or event.step + 1 == event.steps:
                yield event
    lanes.check()


def generate(
    runners: Runners, request: Request, to_pixels: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Pixels uint8 [k, H, W, C] on the host: one batch is on its way there while the next one is computed."""
    under_way: deque[tuple[HostCopy, OfflineLanes]] = deque()
    first = 0
    while first < len(request) or under_way:
        if first < len(request):
            part = request.part(first, min(first + runners.batch_for(request), len(request)))
            result = room_for(runners, part)
            lanes = OfflineLanes(runners, part, result, strict=True, watched=False, deferred=True)
            for _ in lanes.run():
                pass
            under_way.append((HostCopy(to_pixels(result)), lanes))
            first += len(part)
        if len(under_way) > 1 or first == len(request):
            copy, lanes = under_way.popleft()
            lanes.check()
            yield copy.wait()


@plain_torch(gradients=False)  # or it could not be written to if the caller is in inference mode
def room_for(runners: Runners, request: Request) -> torch.Tensor:
    """Room for the images of a request, float32 [n, ...] on the device."""
    return torch.empty((len(request), *runners.spec.shape), dtype=torch.float32, device=runners.plan.device)
