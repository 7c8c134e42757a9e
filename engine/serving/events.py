"""Events of a request on their way from the engine's thread to a reader in an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future

from stepfusion.lanes.request import Event
from stepfusion.serving.served_request import Result

_KEPT = 64  # events, for a reader who is slower than the lanes


class EventQueue:
    """The events of one request, and then its result, for one reader in the running event loop.

    A reader who is slower than the lanes misses the oldest events, but never the result.
    """

    def __init__(self) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[Event] = deque(maxlen=_KEPT)

    def follow(self, future: Future[Result]) -> None:
        """Take the result from this future once the events are read."""
        self._future = future
        self._result = asyncio.wrap_future(future)
        self._result.add_done_callback(lambda _: self._arrived.set())

    def send(self, event: Event) -> None:
        """Enter an event; called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._receive, event)

    async def next(self, timeout: float | None = None) -> Event | Result | None:
        """The next event, the oldest first, and at last the result.

        Returns:
            None if nothing happened for ``timeout`` seconds.

        Raises:
            Whatever the request ended with.
        """
        if not self._events and not self._result.done():
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except TimeoutError:
                return None
        return self._events.popleft() if self._events else self._result.result()

    def cancel(self) -> None:
        """Free the lanes by the next tick. Nothing happens if the request is over."""
        self._future.cancel()

    def _receive(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()
