"""Requests to a serving engine, and what the same engine makes of them offline."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import torch

import stepfusion as sf
from stepfusion.kernels import PARKED
from stepfusion.serving import AsyncEngine, Result
from stepfusion.serving.backlog import Backlog
from stepfusion.serving.metrics import Metrics
from stepfusion.serving.open_requests import OpenRequests
from stepfusion.serving.scheduler import Scheduler
from stepfusion.serving.served_request import ServedRequest
from stepfusion.serving.tracing import Tracing
from stepfusion_testing.networks import labelled

SHAPE = (2, 4, 4)
NAN_LABEL = 3
NULL_LABEL = 4


def breaks(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """:func:`labelled`, but NaN for one label."""
    out = labelled(x, timesteps, labels)
    return torch.where((labels == NAN_LABEL).view(-1, 1, 1, 1), torch.nan, out)


def small_engine(model: Any = breaks, /, **arguments: Any) -> sf.Engine:
    """An invariant engine of eight lanes on the CPU, with labels, one of which breaks the image."""
    given = {"shape": SHAPE, "device": "cpu", "num_classes": 5, "null_label": NULL_LABEL, "batch": 8}
    return sf.Engine(model, sf.NoiseSchedule.linear(), **{**given, "invariant": True, **arguments})


def offline(engine: sf.Engine, arguments: dict[str, Any]) -> torch.Tensor:
    """What :meth:`stepfusion.Engine.sample` makes of a request."""
    known = ("output", "priority", "deadline", "progress", "every")
    images = engine.sample(**{k: v for k, v in arguments.items() if k not in known}, progress=False)
    return engine.to_uint8(images) if arguments.get("output") == "uint8" else images


def leaks(service: AsyncEngine) -> dict[str, int]:
    """What an idle service still holds; nothing, where all is well."""
    scheduler = service._worker.scheduler
    assert scheduler is not None
    runners = [runner for pool in scheduler._pools.values() for runner in pool.lanes.runners]
    found = {
        "lanes": scheduler.busy,
        "rows": sum(int((runner.rows != PARKED).sum()) for runner in runners),
        "tables": scheduler.tables_held,
        "requests": len(scheduler._requests) + sum(len(pool.queue) for pool in scheduler._pools.values()),
        "backlog": service._backlog.images,
        "steps": service._backlog.steps,
    }
    return {name: count for name, count in found.items() if count}


def wait_until_idle(service: AsyncEngine, seconds: float = 30.0) -> None:
    """Wait until no request is left, nor an image in a lane: an ended request's are freed in the next round."""
    limit = time.monotonic() + seconds
    worker = service._worker
    while not worker.idle or (worker.scheduler is not None and worker.scheduler.busy):
        assert time.monotonic() < limit, "requests, or their images, are left"
        time.sleep(0.002)


class Gate:
    """A network that stops until it is let through, and counts its calls. Open at first."""

    def __init__(self, network: Any = labelled) -> None:
        self._network, self._open, self.entered = network, threading.Event(), threading.Semaphore(0)
        self.calls = 0
        self._open.set()

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.entered.release()
        assert self._open.wait(30)
        return self._network(x, timesteps, *labels)

    def shut(self) -> None:
        """Stop the next call."""
        while self.entered.acquire(blocking=False):
            pass
        self._open.clear()

    def open(self) -> None:
        """Let everything through."""
        self._open.set()

    def wait_for_call(self) -> None:
        """Wait until a call has been stopped."""
        assert self.entered.acquire(timeout=30)


class Desk:
    """A scheduler without its thread: what happens, happens in :meth:`round`."""

    def __init__(
        self, engine: sf.Engine, *, widths: tuple[int, ...] = (8,), rows: int = 4096, queue: int = 1 << 20
    ) -> None:
        self.engine, self.backlog = engine, Backlog(queue)
        self.open = OpenRequests(Metrics(), Tracing())
        self.scheduler = Scheduler(
            engine, self.backlog, self.open, widths=widths, rows=rows, aging=5.0, metrics=Metrics()
        )
        self._number = 0

    def ask(
        self, *, priority: int = 0, progress: Any = None, every: int = 1, pixels: bool = False, **arguments: Any
    ) -> Future[Result]:
        """Make a request; nothing happens yet."""
        self._number += 1
        request = self.engine.request(**arguments)
        job = ServedRequest(
            request,
            every=None if progress is None else every,
            number=self._number,
            submitted=time.monotonic(),
            priority=priority,
            progress=progress,
            pixels=pixels,
        )
        self.backlog.enter(len(job.waiting), job.waiting_steps)
        self.open.add(job)
        self.scheduler.add(job)
        return job.future

    def round(self, count: int = 1) -> None:
        """So many rounds."""
        with torch.no_grad():
            for _ in range(count):
                self.scheduler.step()

    def finish(self) -> int:
        """Rounds until nothing is left; how many."""
        rounds = 0
        while not self.scheduler.idle:
            self.round()
            rounds += 1
            assert rounds < 10_000
        return rounds
