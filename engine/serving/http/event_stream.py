"""The server-sent events of one request, from its acceptance to its result or its error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from stepfusion.engine import Engine
from stepfusion.serving.events import EventQueue
from stepfusion.serving.http import messages
from stepfusion.serving.http.errors import status_and_message
from stepfusion.serving.http.origin import Origin
from stepfusion.serving.http.previews import Preview
from stepfusion.serving.http.validation import ValidatedRequest
from stepfusion.serving.http.waiting import Ending, disconnected, wait_unless
from stepfusion.serving.served_request import Result

_PING_SECONDS = 10.0  # between comments on a stream if nothing else happens, so that no proxy takes it for dead


class EventStream(StreamingResponse):
    """A response of server-sent events. However it ends, even before it began, its request is cancelled with it.

    Args:
        origin: what the pictures say of themselves. encoder: what encodes previews. ending: of the server, which ends
            this with an error event.
    """

    def __init__(
        self,
        engine: Engine,
        request: ValidatedRequest,
        origin: Origin,
        events: EventQueue[Preview],
        encoder: Executor,
        ending: Ending,
    ) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._engine, self._request, self._origin, self._queue = engine, request, origin, events
        self._encoder, self._ending = encoder, ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = disconnected(Request(scope, receive))
        try:
            # not Starlette's own call, which under a server of ASGI 2.4 sees who is gone when it next sends something
            with suppress(ClientDisconnect, OSError):  # the latter is what sending raises there
                await wait_unless(gone, self.stream_response(send))
        finally:
            self._queue.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        """The events of the request, until its result or its error."""
        yield messages.sent_event("accepted", {"images": len(self._request), "steps": len(self._request.table)})
        try:
            while not isinstance(item := await self._next(), Result):
                yield b": waiting\n\n" if item is None else await self._progress(item)
            texts = partial(self._origin.of_image, self._engine, self._request)
            yield await asyncio.to_thread(messages.finished, self._engine, self._request, item, texts)
        except Exception as error:
            status, message = status_and_message(error)
            yield messages.sent_event("error", {"status": status, "error": message})

    async def _next(self) -> Preview | Result | None:
        return await wait_unless(self._ending.wait(), self._queue.next(_PING_SECONDS))

    async def _progress(self, preview: Preview) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, messages.progress, preview)
