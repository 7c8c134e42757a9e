"""Waiting for a result that a disconnect of the client, or the end of the server, may interrupt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from stepfusion.serving.errors import EngineClosed

T = TypeVar("T")
Interruption = Coroutine[Any, Any, NoReturn]


async def wait_unless(interruption: Interruption, result: Awaitable[T]) -> T:
    """Wait for ``result``; if ``interruption`` raises before, cancel the result and raise the same."""
    working, interrupting = asyncio.ensure_future(result), asyncio.ensure_future(interruption)
    try:
        await asyncio.wait({working, interrupting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else interrupting.result()
    finally:
        for task in (working, interrupting):
            if not task.cancel() and not task.cancelled():
                task.exception()  # marks it as seen: one of the two was enough


async def disconnected(request: Request) -> NoReturn:
    """Raise ClientDisconnect when the client is gone. The body of the request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


class Ending:
    """The end of a server that waits for its requests no longer. For any thread and any event loop."""

    def __init__(self) -> None:
        self.ended = False
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def end(self) -> None:
        """Interrupt everybody who waits, now or later."""
        self.ended = True
        for loop, woken in self._waiters.copy():
            loop.call_soon_threadsafe(woken.set)

    async def wait(self) -> NoReturn:
        """Raise EngineClosed as soon as the end has come."""
        woken = asyncio.Event()
        waiter = asyncio.get_running_loop(), woken
        self._waiters.add(waiter)
        try:
            if not self.ended:
                await woken.wait()
        finally:
            self._waiters.discard(waiter)
        raise EngineClosed("the server was stopped before this request was done")
