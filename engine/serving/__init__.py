"""Online serving: many callers, one engine, lanes that images enter and leave between ticks."""

from stepfusion.serving.async_engine import AsyncEngine, Status
from stepfusion.serving.errors import DeadlineExceeded, EngineClosed, EngineDead, Overloaded
from stepfusion.serving.served_request import Result, Timings

__all__ = [
    "AsyncEngine",
    "DeadlineExceeded",
    "EngineClosed",
    "EngineDead",
    "Overloaded",
    "Result",
    "Status",
    "Timings",
]
