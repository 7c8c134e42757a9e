"""An ASGI application over a serving engine: images, progress, health, metrics, a description and a form.

It depends on no server: uvicorn runs it (:mod:`stepfusion.serving.http.local_server`), and so does Ray Serve
(:mod:`stepfusion.serving.http.ray_server`). It keeps nothing between requests, so that replicas need no common state.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.errors import EngineClosed, EngineDead
from stepfusion.serving.events import EventQueue
from stepfusion.serving.http import messages
from stepfusion.serving.http.bodies import read_body
from stepfusion.serving.http.errors import EXCEPTION_HANDLERS, as_bad_request, error_response
from stepfusion.serving.http.event_stream import EventStream
from stepfusion.serving.http.hosts import HostCheck, check_hosts
from stepfusion.serving.http.image_api import EDITS, GENERATIONS, ImageHandlers
from stepfusion.serving.http.intake import Intake
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.metadata import engine_status, model_metadata
from stepfusion.serving.http.openapi import describe
from stepfusion.serving.http.origin import Origin
from stepfusion.serving.http.page import page_headers, read_page
from stepfusion.serving.http.previews import PreviewBuffer
from stepfusion.serving.http.requests import GenerateRequest, PictureRequest, StreamRequest
from stepfusion.serving.http.validation import ValidatedRequest, preview_interval, validate

_GENERATE, _STREAM = "/v1/generate", "/v1/stream"
T = TypeVar("T")
AnyRequest = TypeVar("AnyRequest", bound=GenerateRequest)


def make_app(
    service: AsyncEngine,
    *,
    limits: Limits | None = None,
    name: str = "model",
    host: str | None = None,
    allowed_hosts: Sequence[str] | None = None,
    metadata: bool = True,
    weights: str | None = None,
    lora: str | None = None,
) -> Starlette:
    """The application. It starts ``service`` when a server starts it, and closes it at the end.

    Args:
        service: what makes the images.
        limits: the most one request may ask for; by default the model's timesteps bound the steps.
        name: of the model, for people.
        host: what the server is called, beside localhost and its addresses.
        allowed_hosts: other hosts that requests may name; ``*.example.org`` stands for every name that ends so, and
            ``*`` for all. By default, requests that arrive at a loopback address may name no other host, and others
            may name any.
        metadata: PNG files say where they come from (:mod:`stepfusion.files.provenance`).
        weights: SHA-256 of the model's file of weights, which is told there.
        lora: the LoRA files that were added to the model, which are told there.

    Raises:
        ValueError: ``allowed_hosts`` has what is no host.

    Returns:
        an ASGI 3 application. Its ``state.service`` is ``service``. Its ``state.end_requests``, called from any
        thread, ends all requests under way with status 503 or an error event: a server calls it if it is to stop and
        waits for them no longer.
    """
    if limits is None:
        limits = Limits(steps=service.engine.schedule.max_steps)
    allowed_hosts = None if allowed_hosts is None else check_hosts(allowed_hosts)
    intake = Intake(service)
    origin = Origin(name, weights, metadata, lora)
    handlers = _Handlers(intake, limits, origin)
    routes = [
        Route(_GENERATE, handlers.generate, methods=["POST"]),
        Route(_STREAM, handlers.stream, methods=["POST"]),
        *ImageHandlers(intake, limits, origin).routes(),
        Route("/v1/model", handlers.model),
        Route("/healthz", handlers.healthz),
        Route("/readyz", handlers.readyz),
        Route("/metrics", handlers.metrics),
        Route("/openapi.json", handlers.openapi),
        Route("/", handlers.form),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(HostCheck, own=host, allowed=allowed_hosts, on_refusal=handlers.refused_host)],
        lifespan=handlers.lifespan,
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.router.redirect_slashes = False  # a redirect would repeat the Host of the request
    app.state.service = service
    app.state.end_requests = handlers.end_requests
    return app


class _Handlers:
    """What the paths do."""

    def __init__(self, intake: Intake, limits: Limits, origin: Origin) -> None:
        self._intake, self._limits, self._origin = intake, limits, origin
        self._service = service = intake.service
        self._page = read_page()
        self._description = describe(limits, service.engine.schedule)
        # One thread encodes the previews of all streams: Python code holds back the thread that runs the engine.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="stepfusion-previews")

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Warm up while the application already says that it is not ready."""
        starting = asyncio.create_task(asyncio.to_thread(self._service.start))
        try:
            yield
        finally:
            self.end_requests()
            await self._service.aclose(drain=False)  # the server has waited for those who were to be waited for
            with suppress(EngineClosed, EngineDead):
                await starting

    def end_requests(self) -> None:
        """End the requests under way, and those that still come."""
        self._intake.ending.end()

    # Images

    async def generate(self, request: Request) -> Response:
        return await self._intake.until_the_end(self._generate, request)

    async def stream(self, request: Request) -> Response:
        validated, every = await self._intake.until_the_end(self._stream_request, request)
        events = EventQueue(PreviewBuffer())
        arguments = {**validated.arguments, "output": "uint8", "every": every, "progress": events.send}
        # From its submission on nothing is awaited: a handler that is cancelled must not leave a request behind.
        events.follow(await self._intake.submit(arguments))
        engine = self._service.engine
        return EventStream(engine, validated, self._origin, events, self._encoder, self._intake.ending)

    async def _generate(self, request: Request) -> Response:
        with self._intake.counting_refusals():
            asked, validated = await self._validated(request, PictureRequest)
            if asked.format == "png":
                messages.check_picture(self._service.engine)
        pixels = await self._intake.make(request, validated.arguments)
        if asked.format == "png":
            texts = self._origin.of_all(self._service.engine, validated)
            return Response(await asyncio.to_thread(messages.picture, pixels, texts), media_type="image/png")
        data = await asyncio.to_thread(messages.arrays, validated, pixels)
        saved_as = {"Content-Disposition": 'attachment; filename="images.npz"'}
        return Response(data, media_type="application/x-npz", headers=saved_as)

    async def _stream_request(self, request: Request) -> tuple[ValidatedRequest, int]:
        """What is to be streamed, and the steps between two previews."""
        with self._intake.counting_refusals():
            asked, validated = await self._validated(request, StreamRequest)
            messages.check_picture(self._service.engine)
            return validated, preview_interval(validated, asked.every, self._limits)

    async def _validated(self, request: Request, kind: type[AnyRequest]) -> tuple[AnyRequest, ValidatedRequest]:
        body = await read_body(request, self._limits)
        with as_bad_request():
            asked = kind.parse(body)
            return asked, validate(asked, self._service.engine, self._limits)

    def refused_host(self, scope: Scope) -> None:
        """Count a request for images that named a host of others."""
        if scope["method"] == "POST" and scope["path"] in (_GENERATE, _STREAM, GENERATIONS, EDITS):
            self._service.count_rejected("invalid")

    # The model and the state of the engine

    async def model(self, request: Request) -> Response:
        return JSONResponse(model_metadata(self._service.engine, self._limits, self._origin.name))

    async def healthz(self, request: Request) -> Response:
        return self._health(self._service.live)

    async def readyz(self, request: Request) -> Response:
        return self._health(self._service.ready)

    def _health(self, well: bool) -> Response:
        return JSONResponse(engine_status(self._service), 200 if well else 503, {"Cache-Control": "no-store"})

    async def metrics(self, request: Request) -> Response:
        if self._service.registry is None:
            return error_response(501, "metrics need prometheus-client, which is not installed here")
        from prometheus_client import CONTENT_TYPE_LATEST

        return Response(self._service.metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    # The description and the form

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._description)

    async def form(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=page_headers(self._page))
