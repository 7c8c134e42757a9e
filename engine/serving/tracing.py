"""OpenTelemetry spans of requests: one a request, with what it waited and what it ran as children.

They go to whatever provider the application has set up, under the span in which the request was made. Nothing where
OpenTelemetry is not installed.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

from stepfusion.errors import first_line
from stepfusion.serving.served_request import ServedRequest, Timings

_NS = 1_000_000_000


class Tracing:
    """What is traced. This one forgets everything."""

    def context(self) -> Any:
        """Where a request is made, for :meth:`ended`."""

    def ended(self, job: ServedRequest, outcome: str, timings: Timings, error: Exception | None) -> None:
        """A request ended now."""


class SpanTracing(Tracing):
    """The same as spans, written when the request is over and all is known."""

    def context(self) -> Any:
        from opentelemetry import context

        return context.get_current()

    def ended(self, job: ServedRequest, outcome: str, timings: Timings, error: Exception | None) -> None:
        from opentelemetry import trace

        tracer = trace.get_tracer("stepfusion.serving")
        end = time.time_ns()
        start, middle = end - int(timings.total * _NS), end - int(timings.running * _NS)
        attributes: dict[str, str | int] = {
            "stepfusion.request": job.number,
            "stepfusion.images": len(job.request),
            "stepfusion.table": job.request.table.name,
            "stepfusion.outcome": outcome,
        }
        span = tracer.start_span("stepfusion.request", job.context, start_time=start, attributes=attributes)
        inside = trace.set_span_in_context(span, job.context)
        tracer.start_span("stepfusion.queued", inside, start_time=start).end(middle)
        if job.started is not None:
            tracer.start_span("stepfusion.running", inside, start_time=middle).end(end)
        if error is not None:
            span.set_status(trace.StatusCode.ERROR, first_line(error))
        span.end(end)


def make_tracing() -> Tracing:
    """Spans, if OpenTelemetry is installed."""
    return SpanTracing() if find_spec("opentelemetry") else Tracing()
