"""A request on its way, watched from an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from stepfusion.lanes.walk import Event
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.job import Result

_KEPT = 64  # events, for a reader who is slower than the lanes


class Watch:
    """Submits a request, and has its events and then its result for one reader.

    Args:
        service: whom to ask.
        arguments: of :meth:`AsyncEngine.submit`, which raises here what it raises.
    """

    def __init__(self, service: AsyncEngine, **arguments: Any) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._request = service.submit(progress=self._send, **arguments)
        self._result = asyncio.wrap_future(self._request)
        self._result.add_done_callback(lambda _: self._arrived.set())

    async def next(self, timeout: float) -> Event | Result | None:
        """The next event, the oldest first, and at last the result, or what the request ended with; None where
        nothing happened for ``timeout`` seconds.
        """
        if not self._events and not self._result.done():
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except TimeoutError:
                return None
        return self._events.popleft() if self._events else self._result.result()

    def cancel(self) -> None:
        """Free the lanes by the next tick. Nothing happens where the request is over."""
        self._request.cancel()

    def _send(self, event: Event) -> None:
        """Called in the worker's thread."""
        self._loop.call_soon_threadsafe(self._receive, event)

    def _receive(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()
