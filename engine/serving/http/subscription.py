"""A submitted request, followed from an event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from stepfusion.lanes.request import Event
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.http.previews import Preview, PreviewBuffer
from stepfusion.serving.served_request import Result


class Subscription:
    """Submits a request, and has previews and then the result for one reader.

    Args:
        service: the engine that the request is submitted to.
        arguments: of :meth:`AsyncEngine.submit`, which raises here what it raises.
    """

    def __init__(self, service: AsyncEngine, **arguments: Any) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._previews = PreviewBuffer()
        self._request = service.submit(progress=self._receive, **arguments)
        self._result = asyncio.wrap_future(self._request)
        self._result.add_done_callback(lambda _: self._arrived.set())

    async def next(self, timeout: float) -> Preview | Result | None:
        """The next preview, the oldest first, and after the last the result.

        None if nothing happens for ``timeout`` seconds. Raises the error that the request ended with.
        """
        self._arrived.clear()
        if (preview := self._previews.take()) is not None:
            return preview
        if self._result.done():
            return self._result.result()
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout)
        except TimeoutError:
            return None
        return await self.next(timeout)

    def cancel(self) -> None:
        """Read no more: free the lanes by the next tick, if the request is not over, and forget its previews."""
        self._request.cancel()
        self._previews.close()

    def _receive(self, event: Event) -> None:
        """Called in the worker's thread."""
        self._previews.put(Preview.of_event(event))
        self._loop.call_soon_threadsafe(self._arrived.set)
