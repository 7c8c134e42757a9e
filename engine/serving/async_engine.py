"""An engine for many callers at once: requests share its lanes, and come and go between ticks."""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from stepfusion import _checks
from stepfusion.engine import Engine
from stepfusion.lanes.request import Event, Request, Tables
from stepfusion.options import SamplingOptions
from stepfusion.serving.backlog import Backlog
from stepfusion.serving.errors import DeadlineExceeded, EngineClosed, EngineDead, Overloaded
from stepfusion.serving.events import EventQueue, LastEvents
from stepfusion.serving.metrics import make_metrics
from stepfusion.serving.open_requests import OpenRequests
from stepfusion.serving.scheduler import Scheduler
from stepfusion.serving.served_request import Result, ServedRequest
from stepfusion.serving.tracing import make_tracing
from stepfusion.serving.worker import Worker

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_MOST_PRIORITY = 1000


@dataclass(frozen=True)
class Status:
    """How a serving engine is doing.

    ``state``: "new", "starting", "ready", "closing", "closed" or "dead". ``waiting``: images without a lane;
    ``busy``: images in lanes, of ``lanes`` there are. ``tick_seconds``: mean of late; ``quiet_seconds``: since the
    last round of ticks, while there is something to do; it grows if a device hangs.
    """

    state: str
    waiting: int
    busy: int
    lanes: int
    tick_seconds: float
    quiet_seconds: float


class AsyncEngine:
    """Serves an engine to coroutines and threads, one image a lane, with continuous batching.

    ::

        async with sf.serving.AsyncEngine(engine) as service:
            result = await service.generate(2, steps=25, seed=3, labels=[1, 2])

    Images of any request enter free lanes between two ticks and leave when they are done. If the engine is
    ``invariant``, ``result.images`` equals ``engine.sample(...)`` with the same arguments bit for bit, whatever else
    runs; else the noise is identical, and images agree to rounding.

    Args:
        engine: what samples. While this runs, leave its Triton interpreter, if it uses one, to this alone.
        lanes: the most images at a time of each kind, guided ones being one kind and the others another; by default
            ``engine.batch``, from which an invariant engine cannot differ.
        queue: the most images that may wait for a lane.
        rows: of all tables that are walked at a time; by default 4096, or as many as two of the longest need.
        aging: seconds without a lane that are worth one step of priority.
        hang_after: seconds after which a round of ticks that has not ended makes the engine dead; None for never. A
            round that compiles or captures something counts; start-up does not.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        lanes: int | None = None,
        queue: int = 1024,
        rows: int | None = None,
        aging: float = 5.0,
        hang_after: float | None = 300.0,
    ) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, got {type(engine).__name__}")
        if lanes is not None:
            lanes = _checks.integer("lanes", lanes, 1, 1 << 20)
            if engine.invariant and lanes != engine.batch:
                raise ValueError(f"lanes must be the {engine.batch} of this invariant engine, got {lanes}")
        least = 2 * engine.schedule.max_steps
        rows = max(4096, least) if rows is None else _checks.integer("rows", rows, 1, 1 << 24)
        aging = _checks.number("aging", aging, 0.0, 1e9, open_low=True)
        if hang_after is not None:
            hang_after = _checks.number("hang_after", hang_after, 0.0, 1e9, open_low=True)
        self._engine, self._rows = engine, rows
        self._queue = _checks.integer("queue", queue, 1, 1 << 31)
        self._backlog = Backlog(self._queue)
        self._metrics, self._tracing = make_metrics(), make_tracing()
        self._numbers = itertools.count(1)
        backlog, metrics = self._backlog, self._metrics
        requests = OpenRequests(metrics, self._tracing)

        # It holds no reference to this object: so this object and its thread end when nobody uses it any more.
        def make() -> Scheduler:
            widths = _widths(engine, engine.batch if lanes is None else lanes)
            return Scheduler(engine, backlog, requests, widths=widths, rows=rows, aging=aging, metrics=metrics)

        self._worker = Worker(make, engine.plan.device, requests, hang_after)
        self._abandon = weakref.finalize(self, self._worker.abandon)

    def __repr__(self) -> str:
        status = self.status
        return f"AsyncEngine({self._engine!r}, {status.state}, {status.busy} busy, {status.waiting} waiting)"

    # Requests

    def submit(
        self,
        n: int | Request | None = None,
        table: Tables | None = None,
        *,
        output: str = "float32",
        priority: int = 0,
        deadline: float | None = None,
        progress: Callable[[Event], object] | None = None,
        every: int = 1,
        **options: Unpack[SamplingOptions],
    ) -> Future[Result]:
        """Ask for images, from any thread. ``future.cancel()`` frees their lanes by the next tick, at any time.

        Args:
            n, table, options: as for :meth:`stepfusion.Engine.sample`.
            output: "float32" images in [-1, 1], or "uint8" pixels, as ``engine.to_uint8`` makes them.
            priority: in [-1000, 1000]; higher ones get lanes first.
            deadline: seconds from now after which the images are of no use.
            progress: called in the worker's thread with an :class:`stepfusion.Event` after every ``every``-th step
                and the last, its tensors on the host. Keep it short. What it raises ends this request alone.

        Returns:
            A future of the :class:`Result`, or of NonFiniteError, DeadlineExceeded, EngineClosed, EngineDead, or what
            ``progress`` raised: a RuntimeError from it, if it is no Exception (KeyboardInterrupt, SystemExit,
            CancelledError) or a StopIteration. What a callback of the future raises is logged.

        Raises:
            TypeError, ValueError: naming the argument.
            Overloaded: too many images are waiting. DeadlineExceeded: the lanes cannot be so fast.
            EngineClosed, EngineDead: nothing is taken any more.
        """
        try:
            self._worker.check()
            every = _checks.integer("every", every, 1, 1 << 31)
            job = ServedRequest(
                self._engine.request(n, table, **options),
                every=None if progress is None else every,
                number=next(self._numbers),
                submitted=time.monotonic(),
                pixels=_checks.choice("output", output, ("float32", "uint8")) == "uint8",
                priority=_checks.integer("priority", priority, -_MOST_PRIORITY, _MOST_PRIORITY),
                progress=progress,
                context=self._tracing.context(),
            )
            self._check(job, deadline)
            self._enter(job)
        except Exception as error:
            self._metrics.rejected(_REASONS.get(type(error), "invalid"))
            raise
        worker, number = self._worker, job.number
        job.future.add_done_callback(lambda future: worker.cancel(number) if future.cancelled() else None)
        return job.future

    async def generate(self, n: int | Request | None = None, table: Tables | None = None, **arguments: Any) -> Result:
        """:meth:`submit`, and wait. A task that is cancelled meanwhile frees its lanes by the next tick."""
        return await asyncio.wrap_future(self.submit(n, table, **arguments))

    async def stream(
        self, n: int | Request | None = None, table: Tables | None = None, **arguments: Any
    ) -> AsyncIterator[Event | Result]:
        """:meth:`submit`, and yield an :class:`stepfusion.Event` after every ``every``-th step, then the Result.

        A reader who is slower than the lanes misses events, never the result. Leaving the loop (``aclose``) cancels.
        """
        if "progress" in arguments:
            raise TypeError("stream takes no progress: it yields the events")
        events = EventQueue(LastEvents())
        events.follow(self.submit(n, table, progress=events.send, **arguments))
        try:
            while not isinstance(event := await events.next(), Result):
                if event is not None:
                    yield event
            yield event
        finally:
            events.cancel()

    # Life

    def start(self) -> Self:
        """Start the thread that works, and wait until it is warm. EngineDead if that fails."""
        self._worker.start()
        return self

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, finish those there are, and stop. True if all were finished.

        Args:
            drain: False ends them with EngineClosed instead.
            timeout: seconds to drain for; what is left then ends with EngineClosed.

        Once nothing is left it waits 5 seconds at most for the tick under way. If that does not end, the thread is
        left behind (:attr:`left_behind`).
        """
        if timeout is not None:
            timeout = _checks.number("timeout", timeout, 0.0, 1e9)
        return self._worker.close(drain=_checks.boolean("drain", drain), timeout=timeout)

    async def aclose(self, drain: bool = True, timeout: float | None = None) -> bool:
        """:meth:`close`, without stopping the event loop."""
        return await asyncio.to_thread(self.close, drain, timeout)

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose(drain=kind is None)

    # State

    @property
    def engine(self) -> Engine:
        """What samples."""
        return self._engine

    @property
    def live(self) -> bool:
        """False if the engine is dead: nothing but a new process helps."""
        return self._worker.state != "dead"

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return self._worker.state == "ready"

    @property
    def left_behind(self) -> bool:
        """True if the thread that works is inside a tick that nobody waits for any more, because it did not end in
        ``hang_after`` seconds, or while the engine was closed. Only the end of the process is sure to end it.
        """
        return self._worker.left_behind

    @property
    def status(self) -> Status:
        """How it is doing."""
        worker, backlog, state = self._worker, self._backlog, self._worker.state
        if not worker.moves:
            return Status(state, 0, 0, 0, backlog.seconds, 0.0)
        scheduler, since = worker.scheduler, worker.round_since
        busy, lanes = (0, 0) if scheduler is None else (scheduler.busy, scheduler.lanes)
        quiet = 0.0 if since is None or state == "closed" else time.monotonic() - since
        return Status(state, backlog.images, busy, lanes, backlog.seconds, quiet)

    @property
    def registry(self) -> CollectorRegistry | None:
        """The Prometheus registry of its metrics; None without prometheus-client."""
        return self._metrics.registry

    def count_rejected(self, reason: str) -> None:
        """Count a request that a front, such as the HTTP application, refused before :meth:`submit` saw it.

        Args:
            reason: "invalid", "overloaded", "deadline", "closed" or "dead".
        """
        self._metrics.rejected(_checks.choice("reason", reason, ("invalid", *_REASONS.values())))

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text format; empty without prometheus-client."""
        return self._metrics.exposition()

    # How it does it

    def _check(self, job: ServedRequest, deadline: float | None) -> None:
        """What :meth:`stepfusion.Engine.request` cannot know."""
        table, size, scheduler = job.request.table, len(job.request), self._worker.scheduler
        assert scheduler is not None  # the worker was ready
        if job.progress is not None and not callable(job.progress):
            raise TypeError(f"progress must be callable, got {job.progress!r}")
        if size > self._queue:
            raise ValueError(f"n must be at most {self._queue}, the length of the queue, got {size}")
        if len(table) > scheduler.rows:
            raise ValueError(f"table must have at most {scheduler.rows} rows, got {len(table)}")
        if table.learned_variance and not scheduler.learned:
            raise ValueError("table needs the variance that the network learned, and this network returns none")
        if deadline is not None:
            seconds = _checks.number("deadline", deadline, 0.0, 1e9, open_low=True)
            job.deadline = job.submitted + seconds
            steps = [job.steps(image) for image in job.waiting]
            least = self._backlog.least(max(steps, default=0), sum(steps))
            if least > seconds:
                raise DeadlineExceeded(
                    f"deadline must be at least {least:.3g} s, which these images take on idle lanes, got {deadline}"
                )

    def _enter(self, job: ServedRequest) -> None:
        """Announce a request's images, and hand it over."""
        images, steps = len(job.waiting), job.waiting_steps
        self._backlog.enter(images, steps)
        try:
            self._worker.submit(job)
        except (EngineClosed, EngineDead):
            self._backlog.leave(images, steps)
            raise


_REASONS: dict[type[Exception], str] = {
    Overloaded: "overloaded",
    DeadlineExceeded: "deadline",
    EngineClosed: "closed",
    EngineDead: "dead",
}


def _widths(engine: Engine, lanes: int) -> tuple[int, ...]:
    """The numbers of lanes that may be in use: powers of two up to ``lanes``; only one if bits must not depend on it
    or if each would be compiled.
    """
    if engine.invariant or engine.plan.compiles_each_width:
        return (lanes,)
    return (*(1 << i for i in range((lanes - 1).bit_length())), lanes)
