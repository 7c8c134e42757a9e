"""A request on its way, watched from an event loop."""

from __future__ import annotations

from typing import Any

from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.events import EventQueue


class Watch(EventQueue):
    """Submits a request, and has its events and then its result for one reader.

    Args:
        service: what makes the images.
        arguments: of :meth:`AsyncEngine.submit`, which raises here what it raises.
    """

    def __init__(self, service: AsyncEngine, **arguments: Any) -> None:
        super().__init__()
        self.follow(service.submit(progress=self.send, **arguments))
