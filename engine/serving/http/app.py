"""An ASGI application over a serving engine: images, progress, health, metrics, a description and a form.

It depends on no server: uvicorn runs it (:mod:`stepfusion.serving.http.local_server`), and so does Ray Serve
(:mod:`stepfusion.serving.http.ray_server`). It keeps nothing between requests, so that replicas need no common state.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.resources import files
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import stepfusion
from stepfusion.engine import SAMPLERS_WITH_ETA, Engine
from stepfusion.errors import NonFiniteError
from stepfusion.samplers.table_request import OFFERED
from stepfusion.samplers.timesteps import ALL_SPACINGS
from stepfusion.serving import answer
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.errors import DeadlineExceeded, EngineClosed, EngineDead, Overloaded
from stepfusion.serving.http.openapi import describe
from stepfusion.serving.http.validation import Ask, Limits, Order, PictureAsk, Refused, StreamAsk, check_ask
from stepfusion.serving.http.watch import Watch
from stepfusion.serving.job import Result

logger = logging.getLogger("stepfusion.serving")

_PING_SECONDS = 10.0  # between comments on a stream where nothing else happens, so that nobody takes it for dead
_GONE = 499  # nobody reads it

T = TypeVar("T")
AnyAsk = TypeVar("AnyAsk", bound=Ask)


def make_app(service: AsyncEngine, *, limits: Limits | None = None, name: str = "model") -> Starlette:
    """The application. It starts ``service`` when a server starts it, and closes it at the end.

    Args:
        service: what makes the images.
        limits: the most one request may ask for; by default the model's timesteps bound the steps.
        name: of the model, for people.

    Returns:
        an ASGI 3 application; its ``state.service`` is ``service``.
    """
    if limits is None:
        limits = Limits(steps=service.engine.schedule.num_timesteps)
    handlers = _Handlers(service, limits, name)
    routes = [
        Route("/v1/generate", handlers.generate, methods=["POST"]),
        Route("/v1/stream", handlers.stream, methods=["POST"]),
        Route("/v1/model", handlers.model),
        Route("/healthz", handlers.healthz),
        Route("/readyz", handlers.readyz),
        Route("/metrics", handlers.metrics),
        Route("/openapi.json", handlers.openapi),
        Route("/", handlers.form),
    ]
    app = Starlette(routes=routes, lifespan=handlers.lifespan, exception_handlers=_ERRORS)
    app.state.service = service
    return app


class _Handlers:
    """What the paths do."""

    def __init__(self, service: AsyncEngine, limits: Limits, name: str) -> None:
        self._service, self._limits, self._name = service, limits, name
        self._page = files("stepfusion.serving.http").joinpath("form.html").read_text(encoding="utf-8")
        self._description = describe(limits)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Warm up while the application already says that it is not ready."""
        starting = asyncio.create_task(asyncio.to_thread(self._service.start))
        try:
            yield
        finally:
            await self._service.aclose(drain=False)  # the server has waited for those who were to be waited for
            with suppress(EngineClosed, EngineDead):
                await starting

    # Images

    async def generate(self, request: Request) -> Response:
        ask, order = await self._order(request, PictureAsk)
        as_png = ask.format == "png"
        if as_png:
            answer.check_picture(self._service.engine)
        with _refusing():
            future = self._service.submit(**order.arguments, output="uint8")
        pixels = answer.pixels_of(await _unless_gone(request, asyncio.wrap_future(future)))
        if as_png:
            return Response(await asyncio.to_thread(answer.picture, pixels), media_type="image/png")
        data = await asyncio.to_thread(answer.arrays, order, pixels)
        return Response(data, media_type="application/x-npz", headers=_saved_as("images.npz"))

    async def stream(self, request: Request) -> Response:
        ask, order = await self._order(request, StreamAsk)
        answer.check_picture(self._service.engine)
        with _refusing():
            watch = Watch(self._service, **order.arguments, output="uint8", every=order.every(ask.every))
        return _EventStream(self._told(order, watch), watch)

    async def _told(self, order: Order, watch: Watch) -> AsyncIterator[bytes]:
        """The server-sent events of a request, until its result or its error."""
        yield answer.sent_event("accepted", {"images": len(order), "steps": len(order.table)})
        try:
            while not isinstance(event := await watch.next(_PING_SECONDS), Result):
                yield b": waiting\n\n" if event is None else await asyncio.to_thread(answer.progress, event)
            yield await asyncio.to_thread(answer.finished, self._service.engine, order, event)
        except Exception as error:
            status, message = _said(error)
            yield answer.sent_event("error", {"status": status, "error": message})

    async def _order(self, request: Request, kind: type[AnyAsk]) -> tuple[AnyAsk, Order]:
        body = await _body(request, self._limits)
        with _refusing():
            ask = kind.read(body)
            return ask, check_ask(ask, self._service.engine, self._limits)

    # What is there

    async def model(self, request: Request) -> Response:
        return JSONResponse(_facts(self._service, self._limits, self._name))

    async def healthz(self, request: Request) -> Response:
        return _health(self._service.live, self._service)

    async def readyz(self, request: Request) -> Response:
        return _health(self._service.ready, self._service)

    async def metrics(self, request: Request) -> Response:
        if self._service.registry is None:
            return _error(501, "metrics need prometheus-client, which is not installed here")
        from prometheus_client import CONTENT_TYPE_LATEST

        return Response(self._service.metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._description)

    async def form(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=_page_headers(self._page))


# Requests


async def _body(request: Request, limits: Limits) -> bytes:
    """The body; HTTPException where it is too large (before it is read, if it says so), too slow, or no JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the Content-Type must be application/json")
    too_large = HTTPException(413, f"the body must have at most {limits.body} bytes", {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limits.body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body:
                    raise too_large
    except TimeoutError:
        message = f"the body must arrive within {limits.body_seconds:g} s"
        raise HTTPException(408, message, {"Connection": "close"}) from None
    return bytes(body)


async def _unless_gone(request: Request, result: Awaitable[T]) -> T:
    """Wait for ``result``, and cancel it as soon as nobody waits for the response: ClientDisconnect."""
    working, gone = asyncio.ensure_future(result), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Responses


class _EventStream(StreamingResponse):
    """Server-sent events. However it ends, even before it began, the request that they are of ends with it."""

    def __init__(self, events: AsyncIterator[bytes], watch: Watch) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._watch.cancel()


@contextmanager
def _refusing() -> Iterator[None]:
    """Turns what a request is checked by, ValueError and TypeError, into 400."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise HTTPException(400, _sentence(error)) from error


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _said(error: Exception) -> tuple[int, str]:
    """The status of an error, and what a caller is told: nothing of what is none of theirs."""
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return status, _sentence(error)
    logger.error("a request failed", exc_info=error)
    return 500, "the server failed; its log says why"


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        headers = None if error.headers is None else dict(error.headers)
        return _error(error.status_code, _ROUTING.get(error.status_code, error.detail), headers)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_GONE)
    status, message = _said(error)
    retry = {"Retry-After": str(max(1, math.ceil(error.retry_after)))} if isinstance(error, Overloaded) else None
    return _error(status, message, retry)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_ROUTING = {
    404: "there is nothing at this path; /openapi.json says what there is",
    405: "this path takes no such method",
}
_STATUS: dict[type[Exception], int] = {
    Refused: 400,
    Overloaded: 429,
    DeadlineExceeded: 504,
    EngineClosed: 503,
    EngineDead: 503,
    NonFiniteError: 500,
}
_ERRORS: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = dict.fromkeys(
    [HTTPException, ClientDisconnect, *_STATUS, Exception], _on_error
)


def _health(well: bool, service: AsyncEngine) -> Response:
    status = service.status
    facts = {"state": status.state, "waiting": status.waiting, "busy": status.busy, "lanes": status.lanes}
    return JSONResponse(facts, 200 if well else 503, {"Cache-Control": "no-store"})


def _facts(service: AsyncEngine, limits: Limits, name: str) -> dict[str, Any]:
    """What a client needs to know to ask for something sensible."""
    engine = service.engine
    return {
        "name": name,
        "version": stepfusion.__version__,
        "shape": list(engine.shape),
        "classes": _classes(engine),
        "null_label": engine.null_label,
        "guidance": engine.null_label is not None,
        "samplers": list(OFFERED),
        "eta": SAMPLERS_WITH_ETA,
        "spacings": list(ALL_SPACINGS),
        "timesteps": engine.schedule.num_timesteps,
        "prediction": engine.prediction,
        "invariant": engine.invariant,
        "device": str(engine.plan.device),
        "limits": vars(limits),
    }


def _classes(engine: Engine) -> list[dict[str, Any]]:
    labels = [label for label in range(engine.num_classes or 0) if label != engine.null_label]
    return [{"label": label, "name": answer.class_name(engine, label)} for label in labels]


def _saved_as(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def _page_headers(page: str) -> dict[str, str]:
    """The page runs its own script and style, talks to its own server, and is framed by nobody."""

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
