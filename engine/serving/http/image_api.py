"""The image API that clients of other services speak: ``/v1/images/generations`` and ``/v1/images/edits``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stepfusion.engine import Engine
from stepfusion.files.images import Pixels, why_no_picture
from stepfusion.lanes.editing import make_edit
from stepfusion.serving.http.bodies import read_body, read_bytes
from stepfusion.serving.http.errors import IMAGES, InvalidRequest, as_bad_request, shown
from stepfusion.serving.http.image_edits import edit_options, form_limit
from stepfusion.serving.http.image_requests import EditRequest, ImageRequest, size_of
from stepfusion.serving.http.intake import Intake
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.messages import base64_png, class_name
from stepfusion.serving.http.multipart import boundary_of, parse_form
from stepfusion.serving.http.origin import Origin, Texts
from stepfusion.serving.http.validation import ValidatedRequest, validate

_EDITED = {"image": None, "strength": None, "mask": None, "start": None}
GENERATIONS, EDITS = f"{IMAGES}generations", f"{IMAGES}edits"


class ImageHandlers:
    """What the paths of the image API do, for the model that ``origin`` names."""

    def __init__(self, intake: Intake, limits: Limits, origin: Origin) -> None:
        self._intake, self._limits, self._origin = intake, limits, origin
        self._engine, self._created = intake.service.engine, int(time.time())

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route(GENERATIONS, self.generations, methods=["POST"]),
            Route(EDITS, self.edits, methods=["POST"]),
            Route("/v1/models", self.models),
        ]

    async def generations(self, request: Request) -> Response:
        """Images of a class."""
        return await self._intake.until_the_end(self._generations, request)

    async def edits(self, request: Request) -> Response:
        """Images made from one."""
        return await self._intake.until_the_end(self._edits, request)

    async def models(self, request: Request) -> Response:
        """The one model that is served, in the words of the API."""
        model = {"id": self._origin.name, "object": "model", "created": self._created, "owned_by": "stepfusion"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _generations(self, request: Request) -> Response:
        with self._intake.counting_refusals():
            body = await read_body(request, self._limits)
            with as_bad_request():
                validated = self._validated(ImageRequest.parse(body))
        return await self._made(request, validated, {})

    async def _edits(self, request: Request) -> Response:
        with self._intake.counting_refusals():
            boundary = boundary_of(request.headers.get("content-type", ""))
            body = await read_bytes(
                request, form_limit(self._limits, self._engine.image_shape), self._limits.body_seconds
            )
            with as_bad_request():
                form = parse_form(body, boundary)
                asked = EditRequest.of_form(form)
                validated = self._validated(asked)
                pictures = form.file("image"), form.file("mask")
                edit = await asyncio.to_thread(edit_options, self._engine.image_shape, *pictures, asked.strength)
        return await self._made(request, validated, edit)

    def _validated(self, asked: ImageRequest) -> ValidatedRequest:
        if (reason := why_no_picture(self._engine.image_shape[0])) is not None:
            raise InvalidRequest(f"{reason}: /v1/generate with format 'npz' has arrays")
        if asked.model not in (None, self._origin.name):
            message = f"model must be {self._origin.name!r} or absent, got {shown(asked.model)}"
            raise HTTPException(404, message) from InvalidRequest(message, param="model", code="model_not_found")
        return validate(asked.generate_request(self._engine, self._limits), self._engine, self._limits)

    async def _made(self, request: Request, validated: ValidatedRequest, edit: dict[str, Any]) -> Response:
        pixels = await self._intake.make(request, {**validated.arguments, **edit})
        texts = partial(self._origin.of_image, self._engine, validated, edit=make_edit(**_EDITED | edit))
        return JSONResponse(await asyncio.to_thread(_answer, self._engine, validated, pixels, texts))


def _answer(
    engine: Engine, request: ValidatedRequest, pixels: Pixels, texts: Callable[[int], Texts]
) -> dict[str, Any]:
    """The response of the image API; beside each picture stands what it is a function of."""
    data = []
    for image, one in enumerate(pixels):
        described: dict[str, Any] = {
            "b64_json": base64_png(one, texts(image)),
            "seed": request.seeds[image],
            "index": request.indices[image],
        }
        if request.labels is not None:
            label = request.labels[image]
            described |= {"label": label, "class": class_name(engine, label)}
        data.append(described)
    return {
        "created": int(time.time()),
        "background": "opaque",
        "data": data,
        "output_format": "png",
        "size": size_of(engine),
    }
