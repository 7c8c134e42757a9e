"""The heart of serving: requests enter and leave lanes between ticks. One thread, no waiting but for the device.

A round ends what is late, gives free lanes to whoever is next, ticks every pool that has images, and hands over what
is done. Images are grouped in pools by how the network is called for them: guided ones need it twice, and the others
do not pay for that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from stepfusion.kernels.coefficients import HISTORY
from stepfusion.lanes.conditions import blank_options
from stepfusion.lanes.device_tables import DeviceTables
from stepfusion.lanes.lane_engine import Departure, Image, LaneEngine
from stepfusion.lanes.request import Event, Request
from stepfusion.lanes.runner import Runner, RunnerKey
from stepfusion.lanes.transfer import HostCopy, Pace
from stepfusion.serving.admission import Admission
from stepfusion.serving.backlog import Backlog
from stepfusion.serving.containment import as_exception, contained
from stepfusion.serving.errors import DeadlineExceeded
from stepfusion.serving.metrics import Metrics
from stepfusion.serving.open_requests import OpenRequests
from stepfusion.serving.served_request import ServedRequest

if TYPE_CHECKING:
    from stepfusion.engine import Engine

logger = logging.getLogger("stepfusion.serving")


@dataclass(frozen=True)
class _Transfer:
    """Values on their way to the host, and what is done with them there."""

    copies: Sequence[HostCopy | Departure]
    arrive: Callable[[], None]

    @property
    def ready(self) -> bool:
        return all(copy.ready for copy in self.copies)


@dataclass
class _Pool:
    """The lanes of one kind, and the requests that wait for them."""

    lanes: LaneEngine
    queue: Admission


class Scheduler:
    """Requests, and the lanes that they share.

    Args:
        engine: whose network runs. backlog: where callers announce images. open_requests: which others may end, too.
            widths: how many lanes a pool may have in use, rising. rows: of all tables that are walked at a time.
            aging: see :class:`Admission`.
    """

    def __init__(
        self,
        engine: Engine,
        backlog: Backlog,
        open_requests: OpenRequests,
        *,
        widths: Sequence[int],
        rows: int,
        aging: float,
        metrics: Metrics,
    ) -> None:
        self._engine, self._backlog, self._open = engine, backlog, open_requests
        self._widths, self._aging = tuple(widths), aging
        self._metrics = metrics
        self._tables = DeviceTables(engine.evaluator, engine.plan.device, rows)
        self._pools: dict[tuple[RunnerKey, bool], _Pool] = {}
        self._requests: dict[int, ServedRequest] = {}
        self._transfers: deque[_Transfer] = deque()
        self._pace = Pace(engine.plan.device)
        self._needs_room: ServedRequest | None = None
        self.learned = False  #: whether the network learned its variance
        backlog.lanes, backlog.pools = self._widths[-1], self._loads

    @property
    def idle(self) -> bool:
        """True if no request is left."""
        return not self._requests

    @property
    def busy(self) -> int:
        """Images in lanes."""
        return sum(pool.lanes.busy for pool in self._pools.values())

    @property
    def lanes(self) -> int:
        """Lanes of all pools that were needed so far."""
        return sum(pool.lanes.lanes for pool in self._pools.values())

    @property
    def rows(self) -> int:
        """Rows of the longest table that can be walked."""
        return self._tables.capacity

    @property
    def tables_held(self) -> int:
        """Tables that requests hold rows of."""
        return self._tables.held

    def warm_up(self) -> None:
        """Run the network once for each pool and width that may come, draw noise and make pixels.

        No request waits for what is done once.
        """
        engine = self._engine
        engine.to_uint8(engine.runners.first_state("seed", 0)[None])
        table = engine.table("ddim", 1)
        guided = engine.null_label is not None or engine.spec.conditions
        for guidance in (1.0, 2.0) if guided else (1.0,):
            request = engine.request(1, table, **blank_options(engine.spec, guidance))
            while True:
                pool = self._pool(request)
                try:
                    for runner in pool.lanes.warm_up():
                        self.learned = bool(runner.learned)
                    break
                except torch.OutOfMemoryError as error:
                    self._halve(pool, error)

    def add(self, job: ServedRequest) -> None:
        """Take a request on; its images are in the backlog.

        If there is no memory for the states that its image gives it to start from, it ends, and nothing else changes.
        """
        self._requests[job.number] = job
        try:
            job.request = self._engine.runners.noised(job.request)
        except torch.OutOfMemoryError as error:
            # without its traceback, whose frames hold what was allocated
            self._end(job, "memory", error.with_traceback(None))
            return
        if job.ended:
            self._free(job)
        elif job.future.cancelled():
            self.cancelled(job.number)
        elif job.left:
            self._pool(job.request).queue.add(job)
        else:
            self._finish(job)

    def cancelled(self, number: int) -> None:
        """The caller of a request wants nothing more of it; its lanes are free."""
        job = self._requests.get(number)
        if job is not None:
            self._end(job, "cancelled", None)

    def step(self) -> None:
        """One round. torch.OutOfMemoryError if not even one lane fits."""
        started = time.monotonic()
        self._free_ended()
        self._end_late(started)
        for pool in list(self._pools.values()):
            try:
                self._admit(pool, started)
                if pool.lanes.busy:
                    self._tick(pool.lanes)
            except torch.OutOfMemoryError as error:
                self._halve(pool, error)
        ticked = self.busy > 0 or bool(self._transfers)
        self._pace.step()
        while self._transfers and (self._transfers[0].ready or not self.busy):
            self._transfers.popleft().arrive()
        if ticked:
            self._backlog.measured(time.monotonic() - started)

    def report(self, *, moves: bool = True) -> None:
        """Write down how much there is to do; nothing, if nobody ``moves`` it any more."""
        with contained("the metrics"):
            self._metrics.lanes(self.busy if moves else 0, self.lanes if moves else 0)
            self._metrics.queue(len(self._open) if moves else 0, self._backlog.images if moves else 0)

    # Lanes

    def _loads(self) -> list[tuple[list[int], list[int]]]:
        """Of each pool with work, the rounds for which its lanes are taken, and the steps of the images that wait.

        For any thread, as an estimate.
        """
        pools = [pool for pool in list(self._pools.values()) if pool.lanes.busy or len(pool.queue)]
        return [(pool.lanes.remaining(), pool.queue.upcoming()) for pool in pools]

    def _pool(self, request: Request) -> _Pool:
        """The lanes for a request, by how its network is called; guided ones with the null label as well."""
        runners, given_noise = self._engine.runners, request.noise is not None
        # Whether the network learned its variance is known by now, and the same for all. Every pool has room for the
        # longest history: so all samplers share lanes, and none compiles or captures a tick of its own later.
        key = replace(runners.key(request, self._widths[-1]), learned_variance=False, history=len(HISTORY))
        pool = self._pools.get((key, given_noise))
        if pool is None:

            def make(width: int) -> Runner:
                runner = runners.make(replace(key, lanes=width), self._tables)
                runner.prepare(noise=given_noise, keep_x0=True)
                return runner

            lanes = LaneEngine(make, self._widths, given_noise=given_noise, may_halve=not runners.invariant)
            pool = self._pools[key, given_noise] = _Pool(lanes, Admission(self._aging))
        return pool

    def _admit(self, pool: _Pool, now: float) -> None:
        chosen = pool.queue.pick(pool.lanes.free, now, self._place)
        for job, image in chosen:
            if job.started is None:
                job.started = now
            self._backlog.leave(1, job.steps(image))
        try:
            pool.lanes.admit(chosen)
        except torch.OutOfMemoryError:
            self._put_back(pool, chosen)
            raise

    def _place(self, job: ServedRequest) -> bool:
        """Whether a request's table has its rows. Who finds no room is the next to get some, before all others."""
        if job.first is None and self._needs_room in (None, job):
            job.first = self._tables.hold(job.request.table)
            self._needs_room = job if job.first is None else None
        return job.first is not None

    def _tick(self, lanes: LaneEngine) -> None:
        lanes.tick()
        with contained("the metrics"):
            self._metrics.tick()
        for active, event in lanes.events():
            self._show(cast(ServedRequest, active), event)
        done = lanes.done()
        for pixels in (False, True):
            occupants = [occupant for occupant in done if cast(ServedRequest, occupant.active).pixels is pixels]
            if occupants:
                x = lanes.values(occupants, "x").clone()
                values = HostCopy(self._engine.to_uint8(x) if pixels else x)
                self._hand_over(values, lanes.depart(occupants))

    def _show(self, job: ServedRequest, event: Event) -> None:
        """Call a request's callback with an event, once its values are on the host."""
        x, x0 = HostCopy(event.x), HostCopy(event.x0)

        def arrive() -> None:
            if job.ended or job.progress is None:
                return
            shown = replace(event, x=x.wait(), x0=x0.wait())
            try:
                job.progress(shown)
            except BaseException as error:  # in this thread, nobody but the callback can mean one by it
                self._end(job, "callback", as_exception("progress", error))

        self._transfers.append(_Transfer((x, x0), arrive))

    def _hand_over(self, values: HostCopy, departure: Departure) -> None:
        """Give images to their requests, once they and their flags are on the host."""

        def arrive() -> None:
            for value, (active, image, error) in zip(values.wait(), departure.outcomes(), strict=True):
                job = cast(ServedRequest, active)
                if job.ended:
                    continue
                if error is not None:
                    self._end(job, "nonfinite", error)
                    continue
                job.receive(image, value)
                if not job.left:
                    self._finish(job)

        self._transfers.append(_Transfer((values, departure), arrive))

    def _halve(self, pool: _Pool, error: torch.OutOfMemoryError) -> None:
        """Go on with half the lanes; what was in them starts again, and comes out the same."""
        lost = pool.lanes.halve(error)
        self._engine.runners.pool.clear()
        self._put_back(pool, lost)
        self._backlog.lanes = min(self._backlog.lanes, pool.lanes.lanes)
        with contained("the log"):
            lanes = pool.lanes.lanes
            logger.warning("out of memory: going on with %d lanes", lanes, extra={"lanes": lanes})

    def _put_back(self, pool: _Pool, images: Sequence[Image]) -> None:
        for active, image in images:
            job = cast(ServedRequest, active)
            job.waiting.appendleft(image)
            self._backlog.put_back(1, job.steps(image))
            pool.queue.add(job)

    # Requests

    def _free_ended(self) -> None:
        """Free the lanes of requests that others have ended."""
        for job in [job for job in self._requests.values() if job.ended]:
            self._free(job)

    def _end_late(self, now: float) -> None:
        for job in [job for job in self._requests.values() if job.deadline < math.inf]:
            ticks = max(self._pool(job.request).lanes.ticks_left(job), *map(job.steps, job.waiting), 0)
            if now + self._backlog.fastest * ticks > job.deadline:
                message = f"the deadline was out of reach when {job.progress_made}"
                self._end(job, "deadline", DeadlineExceeded(message))

    def _finish(self, job: ServedRequest) -> None:
        if job.images is None:
            empty = torch.empty((0, *self._engine.shape))
            job.images = self._engine.to_uint8(empty) if job.pixels else empty
        self._end(job, "done", None)

    def _end(self, job: ServedRequest, outcome: str, error: Exception | None) -> None:
        """The end of a request, whichever: its lanes and rows are free, and its caller knows."""
        self._free(job)
        self._open.end(job, outcome, error)

    def _free(self, job: ServedRequest) -> None:
        """Forget a request; its lanes, its rows and its room in the queue are free."""
        del self._requests[job.number]
        pool = self._pool(job.request)
        pool.queue.discard(job)
        pool.lanes.remove(job)
        if job.first is not None:
            self._tables.release(job.request.table)
        if self._needs_room is job:
            self._needs_room = None
        self._backlog.leave(len(job.waiting), job.waiting_steps)
