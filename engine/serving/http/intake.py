"""What every path that makes images does with a request: count refusals, wait for the result, end with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from stepfusion.files.images import Pixels
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.http import messages
from stepfusion.serving.http.errors import InvalidRequest, as_bad_request
from stepfusion.serving.http.waiting import Ending, disconnected, wait_unless
from stepfusion.serving.served_request import Result

T = TypeVar("T")


class Intake:
    """Takes requests for images to a serving engine. ``ending`` is the end of the server."""

    def __init__(self, service: AsyncEngine) -> None:
        self.service, self.ending = service, Ending()

    async def until_the_end(self, handler: Callable[[Request], Awaitable[T]], request: Request) -> T:
        """What a handler returns, unless the server was stopped before, or is now."""
        if self.ending.ended:
            self.service.count_rejected("closed")
            await self.ending.wait()
        return await wait_unless(self.ending.wait(), handler(request))

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count the requests that are refused here; those that the engine refuses, it counts itself."""
        try:
            yield
        except (HTTPException, InvalidRequest):
            self.service.count_rejected("invalid")
            raise

    async def make(self, request: Request, arguments: dict[str, Any]) -> Pixels:
        """The pixels of the images that ``arguments`` ask for, unless the client leaves before.

        Raises:
            HTTPException: 400, naming the argument that the engine refuses. What else
                :meth:`stepfusion.serving.AsyncEngine.submit` raises. ClientDisconnect: the client is gone.
        """
        future = await self.submit({**arguments, "output": "uint8"})
        return messages.pixels_of(await wait_unless(disconnected(request), asyncio.wrap_future(future)))

    async def submit(self, arguments: dict[str, Any]) -> Future[Result]:
        """:meth:`stepfusion.serving.AsyncEngine.submit`, in a thread if encoders have texts or a picture to work on.

        A request whose caller is cancelled meanwhile is cancelled with it.

        Raises:
            HTTPException: 400, naming the argument that the engine refuses.
        """
        with as_bad_request():
            if not self.service.engine.runners.takes_prompts and arguments.get("image") is None:
                return self.service.submit(**arguments)
            submitting = asyncio.ensure_future(asyncio.to_thread(self.service.submit, **arguments))
            try:
                return await asyncio.shield(submitting)
            except asyncio.CancelledError:
                submitting.add_done_callback(_withdraw)
                raise


def _withdraw(submitting: asyncio.Future[Future[Result]]) -> None:
    """Cancel what was submitted, if it was."""
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
