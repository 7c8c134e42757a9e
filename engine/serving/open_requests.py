"""The requests of a serving engine whose callers wait, and how each of them ends, once."""

from __future__ import annotations

import logging
import math
import time

from stepfusion.errors import first_line
from stepfusion.serving.containment import contained
from stepfusion.serving.errors import DeadlineExceeded
from stepfusion.serving.metrics import Metrics
from stepfusion.serving.served_request import Result, ServedRequest, Timings
from stepfusion.serving.tracing import Tracing

logger = logging.getLogger("stepfusion.serving")


class OpenRequests:
    """Requests that were accepted and have not ended. For any thread.

    The engine's thread, the watchdog and whoever closes the engine may all end a request: the first one does. The
    lanes of a request are the engine's thread's alone, which frees them when it finds that the request has ended.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing) -> None:
        self._metrics, self._tracing = metrics, tracing
        self._jobs: dict[int, ServedRequest] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def next_deadline(self) -> float:
        """The earliest deadline, a time of ``time.monotonic``; infinity if there is none."""
        return min([job.deadline for job in list(self._jobs.values())], default=math.inf)

    def add(self, job: ServedRequest) -> None:
        """Take a request in."""
        self._jobs[job.number] = job

    def end(self, job: ServedRequest, outcome: str, error: Exception | None) -> bool:
        """Tell the caller of a request how it ended, and write it down; False if somebody else has done so."""
        if not job.claim():
            return False
        self._jobs.pop(job.number, None)
        now = time.monotonic()
        started = now if job.started is None else job.started
        timings = Timings(started - job.submitted, now - started, now - job.submitted)
        try:
            self._write_down(job, outcome, error, timings)
        finally:
            if error is not None:
                job.future.resolve(error)
            elif job.images is not None:
                job.future.resolve(Result(job.images, timings))
            else:  # its caller cancelled it
                job.future.set_running_or_notify_cancel()
        return True

    def end_all(self, outcome: str, error: Exception) -> int:
        """End every request with this error; returns how many that were."""
        return sum(self.end(job, outcome, error) for job in list(self._jobs.values()))

    def end_late(self, now: float) -> None:
        """End those whose deadline has passed by ``now``, a time of ``time.monotonic``."""
        for job in [job for job in list(self._jobs.values()) if job.deadline <= now]:
            message = f"the deadline passed when {job.progress_made}"
            self.end(job, "deadline", DeadlineExceeded(message))

    def _write_down(self, job: ServedRequest, outcome: str, error: Exception | None, timings: Timings) -> None:
        images = len(job.request) - job.left
        with contained("the metrics"):
            self._metrics.ended(outcome, images, timings)
        with contained("the tracing"):
            self._tracing.ended(job, outcome, timings, error)
        with contained("the log"):
            logger.info(
                "request %d, %d images, %.3f s queued, %.3f s running: %s",
                job.number,
                len(job.request),
                timings.queued,
                timings.running,
                outcome if error is None else f"{outcome}: {first_line(error)}",
                extra={
                    "request": job.number,
                    "outcome": outcome,
                    "images": len(job.request),
                    "queued_s": timings.queued,
                    "running_s": timings.running,
                },
            )
