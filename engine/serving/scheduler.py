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
from typing import TYPE_CHECKING

import torch

from stepfusion.errors import first_line
from stepfusion.kernels import FINITE
from stepfusion.lanes.device_tables import TableStore
from stepfusion.lanes.request import Request
from stepfusion.lanes.runner import Runner, Settings
from stepfusion.lanes.transfer import HostCopy, Pace
from stepfusion.lanes.walk import Event, nonfinite
from stepfusion.serving.admission import Admission
from stepfusion.serving.backlog import Backlog
from stepfusion.serving.errors import DeadlineExceeded
from stepfusion.serving.job import Job, Result, Timings
from stepfusion.serving.lanes import LanePool, Seat
from stepfusion.serving.metrics import Metrics
from stepfusion.serving.tracing import Tracing

if TYPE_CHECKING:
    from stepfusion.engine import Engine

logger = logging.getLogger("stepfusion.serving")


@dataclass(frozen=True)
class _Landing:
    """Values on their way to the host, and what is done with them there."""

    copies: Sequence[HostCopy]
    land: Callable[..., None]

    @property
    def ready(self) -> bool:
        return all(copy.ready for copy in self.copies)

    def __call__(self) -> None:
        self.land(*(copy.wait() for copy in self.copies))


@dataclass
class _Pool:
    """The lanes of one kind, and who waits for them."""

    lanes: LanePool
    queue: Admission


class Scheduler:
    """Requests, and the lanes that they share.

    Args:
        engine: whose network runs. backlog: where callers announce images. widths: how many lanes a pool may have in
            use, rising. rows: of all tables that are walked at a time. aging: see :class:`Admission`.
    """

    def __init__(
        self,
        engine: Engine,
        backlog: Backlog,
        *,
        widths: Sequence[int],
        rows: int,
        aging: float,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._engine, self._backlog = engine, backlog
        self._widths, self._aging = tuple(widths), aging
        self._metrics, self._tracing = metrics, tracing
        self._tables = TableStore(engine._evaluator, engine.plan.device, rows)
        self._pools: dict[Settings, _Pool] = {}
        self._jobs: dict[int, Job] = {}
        self._landings: deque[_Landing] = deque()
        self._pace = Pace(engine.plan.device)
        self._needs_room: Job | None = None
        self.learned = False  #: whether the network learned its variance
        backlog.lanes = self._widths[-1]

    @property
    def idle(self) -> bool:
        """True where no request is left."""
        return not self._jobs

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
        """Run the network once for each pool and width that may come: no request waits for what is done once."""
        engine = self._engine
        table = engine.table("ddim", 1)
        for guidance in (1.0,) if engine.null_label is None else (1.0, 2.0):
            request = engine.request(1, table, labels=None if engine.num_classes is None else 0, guidance=guidance)
            while True:
                pool = self._pool(request)
                try:
                    for runner in pool.lanes.warm_up():
                        self.learned = bool(runner.learned)
                    break
                except torch.OutOfMemoryError as error:
                    self._halve(pool, error)

    def add(self, job: Job) -> None:
        """Take a request on; its images are in the backlog."""
        self._jobs[job.number] = job
        if job.future.cancelled():
            self.cancelled(job.number)
        elif job.left:
            self._pool(job.request).queue.add(job)
        else:
            self._finish(job)

    def cancelled(self, number: int) -> None:
        """The caller of a request wants nothing more of it; its lanes are free."""
        job = self._jobs.get(number)
        if job is not None:
            self._end(job, "cancelled", None)

    def end_all(self, outcome: str, error: Exception) -> None:
        """End every request with this error."""
        for job in list(self._jobs.values()):
            self._end(job, outcome, error)

    def bury(self, late: Sequence[Job], error: Exception) -> None:
        """Tell every caller, of ``late`` requests too, that nothing more comes; the device, which may be broken, is
        left alone.
        """
        for job in (*self._jobs.values(), *late):
            self._tell(job, "dead", error)
        self._jobs.clear()

    def step(self) -> None:
        """One round. torch.OutOfMemoryError where not even one lane fits."""
        started = time.monotonic()
        self._end_late(started)
        for pool in list(self._pools.values()):
            try:
                self._admit(pool, started)
                if pool.lanes.busy:
                    self._tick(pool.lanes)
            except torch.OutOfMemoryError as error:
                self._halve(pool, error)
        ticked = self.busy > 0 or bool(self._landings)
        self._pace.step()
        while self._landings and (self._landings[0].ready or not self.busy):
            self._landings.popleft()()
        if ticked:
            self._backlog.measured(time.monotonic() - started)
        self._metrics.lanes(self.busy, self.lanes)
        self._metrics.queue(len(self._jobs), self._backlog.images)

    # Lanes

    def _pool(self, request: Request) -> _Pool:
        """The lanes for a request, by how its network is called; guided ones with the null label as well."""
        # whether the network learned its variance is known by now, and the same for all
        settings = replace(self._engine._settings(request, self._widths[-1]), learned_variance=False)
        pool = self._pools.get(settings)
        if pool is None:

            def make(width: int) -> Runner:
                runner = self._engine._runner(replace(settings, lanes=width), self._tables)
                runner.prepare(noise=False, keep_x0=True)
                self._engine._note_capture(runner)
                return runner

            pool = self._pools[settings] = _Pool(LanePool(make, self._widths), Admission(self._aging))
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

    def _place(self, job: Job) -> bool:
        """Whether a request's table has its rows. Who finds no room is the next to get some, before all others."""
        if job.first is None and self._needs_room in (None, job):
            job.first = self._tables.hold(job.request.table)
            self._needs_room = job if job.first is None else None
        return job.first is not None

    def _tick(self, lanes: LanePool) -> None:
        lanes.tick()
        self._metrics.tick()
        for job, part, step, seats in lanes.watched():
            self._show(job, part, step, [seat.image for seat in seats], *lanes.copies(seats, "x", "x0"))
        done = lanes.done()
        if not done:
            return
        landings = []
        for pixels in (False, True):
            seats = [seat for seat in done if seat.job.pixels is pixels]
            if seats:
                x, flags = lanes.copies(seats, "x", "flags")
                landings.append(self._landing(seats, self._engine.to_uint8(x) if pixels else x, flags))
        lanes.leave(done)
        self._landings.extend(landings)

    def _show(self, job: Job, part: int, step: int, images: Sequence[int], x: torch.Tensor, x0: torch.Tensor) -> None:
        table = job.request.table
        timestep = int(table.timesteps[table.starts[part] + step])

        def land(x: torch.Tensor, x0: torch.Tensor) -> None:
            if job.ended or job.progress is None:
                return
            try:
                job.progress(Event(step, table.steps(part), timestep, tuple(images), x, x0))
            except Exception as error:
                self._end(job, "callback", error)

        self._landings.append(_Landing((HostCopy(x), HostCopy(x0)), land))

    def _landing(self, seats: Sequence[Seat], values: torch.Tensor, flags: torch.Tensor) -> _Landing:
        whose = [(seat.job, seat.image) for seat in seats]

        def land(values: torch.Tensor, flags: torch.Tensor) -> None:
            for (job, image), value, flag in zip(whose, values, flags.tolist(), strict=True):
                if job.ended:
                    continue
                if flag != FINITE:
                    self._end(job, "nonfinite", nonfinite(job.request, image, flag - (job.first or 0)))
                    continue
                job.receive(image, value)
                if not job.left:
                    self._finish(job)

        return _Landing((HostCopy(values), HostCopy(flags)), land)

    def _halve(self, pool: _Pool, error: torch.OutOfMemoryError) -> None:
        """Go on with half the lanes; what was in them starts again, and comes out the same."""
        lost = None if self._engine.invariant else pool.lanes.halve()
        if lost is None:
            raise error
        self._engine._idle.clear()
        self._put_back(pool, [(seat.job, seat.image) for seat in lost])
        self._backlog.lanes = min(self._backlog.lanes, pool.lanes.lanes)
        logger.warning("out of memory: going on with %d lanes", pool.lanes.lanes, extra={"lanes": pool.lanes.lanes})

    def _put_back(self, pool: _Pool, images: Sequence[tuple[Job, int]]) -> None:
        for job, image in images:
            job.waiting.appendleft(image)
            self._backlog.put_back(1, job.steps(image))
            pool.queue.add(job)

    # Requests

    def _end_late(self, now: float) -> None:
        for job in [job for job in self._jobs.values() if job.deadline < math.inf]:
            ticks = max(self._pool(job.request).lanes.ticks_left(job), *map(job.steps, job.waiting), 0)
            if now + self._backlog.fastest * ticks > job.deadline:
                done = len(job.request) - job.left
                message = f"the deadline was out of reach when {done} of {len(job.request)} images were done"
                self._end(job, "deadline", DeadlineExceeded(message))

    def _finish(self, job: Job) -> None:
        if job.images is None:
            empty = torch.empty((0, *self._engine.shape))
            job.images = self._engine.to_uint8(empty) if job.pixels else empty
        self._end(job, "done", None)

    def _end(self, job: Job, outcome: str, error: Exception | None) -> None:
        """The end of a request, whichever: its lanes and rows are free, and its caller knows."""
        del self._jobs[job.number]
        pool = self._pool(job.request)
        pool.queue.discard(job)
        pool.lanes.remove(job)
        if job.first is not None:
            self._tables.release(job.request.table)
        if self._needs_room is job:
            self._needs_room = None
        self._tell(job, outcome, error)

    def _tell(self, job: Job, outcome: str, error: Exception | None) -> None:
        """Resolve the future of a request, unless it was cancelled, and write down how it ended."""
        job.ended = True
        self._backlog.leave(len(job.waiting), job.waiting_steps)
        now = time.monotonic()
        started = now if job.started is None else job.started
        timings = Timings(started - job.submitted, now - started, now - job.submitted)
        self._metrics.ended(outcome, len(job.request) - job.left, timings)
        self._tracing.ended(job, outcome, timings, error)
        logger.info(
            "request %d: %s",
            job.number,
            outcome if error is None else f"{outcome}: {first_line(error)}",
            extra={
                "request": job.number,
                "outcome": outcome,
                "images": len(job.request),
                "queued_s": timings.queued,
                "running_s": timings.running,
            },
        )
        if not job.future.set_running_or_notify_cancel():
            return
        if error is not None:
            job.future.set_exception(error)
        elif job.images is not None:
            job.future.set_result(Result(job.images, timings))
