"""The server-sent events of one request, from its acceptance to its result or its error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from stepfusion.engine import Engine
from stepfusion.serving.http import messages
from stepfusion.serving.http.errors import status_and_message
from stepfusion.serving.http.subscription import Subscription
from stepfusion.serving.http.validation import ValidatedRequest
from stepfusion.serving.served_request import Result

_PING_SECONDS = 10.0  # between comments on a stream where nothing else happens, so that no proxy takes it for dead


class EventStream(StreamingResponse):
    """A response of server-sent events. However it ends, even before it began, its request is cancelled with it."""

    def __init__(
        self, engine: Engine, request: ValidatedRequest, subscription: Subscription, encoding: asyncio.Semaphore
    ) -> None:
        events = _events(engine, request, subscription, encoding)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._subscription.cancel()


async def _events(
    engine: Engine, request: ValidatedRequest, subscription: Subscription, encoding: asyncio.Semaphore
) -> AsyncIterator[bytes]:
    """The events of a request, until its result or its error."""
    yield messages.sent_event("accepted", {"images": len(request), "steps": len(request.table)})
    try:
        while not isinstance(event := await subscription.next(_PING_SECONDS), Result):
            if event is None:
                yield b": waiting\n\n"
                continue
            async with encoding:
                progress = await asyncio.to_thread(messages.progress, event)
            yield progress
        yield await asyncio.to_thread(messages.finished, engine, request, event)
    except Exception as error:
        status, message = status_and_message(error)
        yield messages.sent_event("error", {"status": status, "error": message})
