"""Events of a request on their way from the engine's thread to a reader in an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from stepfusion.lanes.request import Event
from stepfusion.serving.served_request import Result

_KEPT = 64  # events, for a reader who is slower than the lanes
Item = TypeVar("Item")
ItemOut = TypeVar("ItemOut", covariant=True)


class Buffer(Protocol[ItemOut]):
    """What a queue keeps of events that its reader has not taken. One thread puts, and another takes."""

    def put(self, event: Event) -> None:
        """Keep an event, or what is wanted of it."""

    def take(self) -> ItemOut | None:
        """The oldest of what is kept; None if nothing is."""

    def close(self) -> None:
        """Forget everything, and what still comes."""


class LastEvents:
    """A buffer of the last 64 events."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._closed = False

    def put(self, event: Event) -> None:
        if not self._closed:
            self._events.append(event)

    def take(self) -> Event | None:
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        self._closed = True
        self._events.clear()


class EventQueue(Generic[Item]):
    """The events of one request, and then its result, for one reader in the running event loop.

    A reader who is slower than the lanes misses events, as the buffer decides, but never the result.
    """

    def __init__(self, buffer: Buffer[Item]) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._buffer = buffer

    def follow(self, future: Future[Result]) -> None:
        """Take the result from this future once the events are read."""
        self._future = future
        self._result = asyncio.wrap_future(future)
        self._result.add_done_callback(lambda _: self._arrived.set())

    def send(self, event: Event) -> None:
        """Enter an event; called in the engine's thread."""
        self._buffer.put(event)
        self._loop.call_soon_threadsafe(self._arrived.set)

    async def next(self, timeout: float | None = None) -> Item | Result | None:
        """The next of what the buffer keeps, the oldest first, and at last the result.

        Returns:
            None if nothing happened for ``timeout`` seconds.

        Raises:
            Whatever the request ended with.
        """
        while True:
            self._arrived.clear()
            if (item := self._buffer.take()) is not None:
                return item
            if self._result.done():
                return self._result.result()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except TimeoutError:
                return None

    def cancel(self) -> None:
        """Read no more: free the lanes by the next tick, if the request is not over, and forget its events."""
        self._future.cancel()
        self._buffer.close()
