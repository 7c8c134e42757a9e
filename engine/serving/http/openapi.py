"""The OpenAPI description of the HTTP API."""

from __future__ import annotations

from typing import Any

import stepfusion
from stepfusion.samplers.table_request import OFFERED
from stepfusion.serving.http.validation import Ask, Limits, PictureAsk, StreamAsk

_PROBLEMS = {
    400: "a field is unknown, or its value is wrong",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    429: "too many images are waiting; Retry-After says when to come again",
    500: "an image became NaN or infinite, or the server failed",
    503: "the engine is starting, closing or dead",
    504: "the deadline is, or was, out of reach",
}
_STREAM = """Server-sent events: "accepted" {images, steps}; "progress" {step, steps, timestep, images, previews}, the
last a small base64 PNG for each of the images; at the end "result" {images: [{name, seed, index, label, class, png}],
seconds: {queued, running, total}}, or "error" {status, error}. Closing the connection cancels."""


def describe(limits: Limits) -> dict[str, Any]:
    """The document that /openapi.json serves."""
    bytes_of = {"type": "string", "format": "binary"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "stepfusion",
            "version": stepfusion.__version__,
            "description": "An image is a function of model, sampler, seed, index, label "
            f"and guidance. Limits of a request: {limits.images} images, {limits.steps} steps an image, "
            f"{limits.evaluations} evaluations of the network (n * steps, twice that with guidance), "
            f"{limits.elements} elements (n * C * H * W) and a body of {limits.body} bytes.",
        },
        "paths": {
            "/v1/generate": {
                "post": _asks(
                    PictureAsk,
                    "Make images",
                    {"image/png": {"schema": bytes_of}, "application/x-npz": {"schema": bytes_of}},
                    "One PNG (several images as a grid), or an .npz with images uint8 [n, H, W, C], seeds, indices "
                    "and labels",
                )
            },
            "/v1/stream": {
                "post": _asks(
                    StreamAsk,
                    "Make images, and tell of progress",
                    {"text/event-stream": {"schema": {"type": "string"}}},
                    _STREAM,
                )
            },
            "/v1/model": {"get": _gives("The model, its classes, the samplers and the limits", "application/json")},
            "/healthz": {"get": _gives("200 while the engine lives", "application/json", 503)},
            "/readyz": {"get": _gives("200 while requests are taken", "application/json", 503)},
            "/metrics": {"get": _gives("Metrics in Prometheus' text format", "text/plain", 501)},
            "/openapi.json": {"get": _gives("This description", "application/json")},
            "/": {"get": _gives("A form to try it", "text/html")},
        },
        "components": {"schemas": {"Error": _ERROR}},
    }


_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "one sentence"}},
    "required": ["error"],
}


def _asks(ask: type[Ask], summary: str, content: dict[str, Any], answer: str) -> dict[str, Any]:
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    schema = ask.model_json_schema()
    schema["properties"]["sampler"]["enum"] = list(OFFERED)
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": answer, "content": content},
            **{str(code): {"description": text, "content": problem} for code, text in _PROBLEMS.items()},
        },
    }


def _gives(summary: str, media: str, otherwise: int | None = None) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": summary, "content": {media: {}}}}
    if otherwise is not None:
        responses[str(otherwise)] = {"description": "otherwise"}
    return {"summary": summary, "responses": responses}
