"""The OpenAPI description of the HTTP API."""

from __future__ import annotations

from typing import Any

import stepfusion
from stepfusion.samplers.path import Path
from stepfusion.samplers.registry import samplers_of
from stepfusion.serving.http.image_requests import EditRequest, ImageRequest
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.multipart import MEDIA_TYPE
from stepfusion.serving.http.requests import GenerateRequest, PictureRequest, StreamRequest

_HOST = "the Host header names a host that this server does not accept"
_PROBLEMS = {
    400: "a field is unknown, or its value is wrong",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    421: _HOST,
    429: "too many images are waiting; Retry-After says when to come again",
    500: "an image became NaN or infinite, or the server failed",
    503: "the engine is starting, closing or dead, or the server was stopped before the request was done",
    504: "the deadline is, or was, out of reach",
}
_PRIORITY = "an integer from -1000 to {}, of which higher ones get lanes first"
_STREAM = """Server-sent events: "accepted" {images, steps}; "progress" {step, steps, timestep, images, previews},
the timestep being what the network is told, an integer or on some paths a float, and the last a small base64 PNG for
each of the images; at the end "result" {images: [{name, seed, index, label, class, png}], seconds: {queued, running,
total}}, or "error" {status, error}. Closing the connection cancels."""


def describe(limits: Limits, path: Path) -> dict[str, Any]:
    """The document that /openapi.json serves for a model on ``path``."""
    bytes_of = {"type": "string", "format": "binary"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "stepfusion",
            "version": stepfusion.__version__,
            "description": "An image is a function of model, sampler, seed, index, label, "
            f"prompts and guidance. Limits of a request: {limits.images} images, {limits.steps} steps an image, "
            f"{limits.evaluations} evaluations of the network (n * steps, twice that with guidance), "
            f"{limits.elements} elements (n * C * H * W), {limits.previews} previews (n * steps / every, of "
            f"/v1/stream) and a body of {limits.body} bytes.",
        },
        "paths": {
            "/v1/generate": {
                "post": _post(
                    PictureRequest,
                    limits,
                    path,
                    "Make images",
                    {"image/png": {"schema": bytes_of}, "application/x-npz": {"schema": bytes_of}},
                    "One PNG (several images as a grid), or an .npz with images uint8 [n, H, W, C], seeds, indices "
                    "and labels",
                )
            },
            "/v1/stream": {
                "post": _post(
                    StreamRequest,
                    limits,
                    path,
                    "Make images, and tell of progress",
                    {"text/event-stream": {"schema": _EVENT}},
                    _STREAM,
                )
            },
            "/v1/images/generations": {
                "post": _images(ImageRequest, path, "Make images of a prompt or a class", "application/json")
            },
            "/v1/images/edits": {"post": _images(EditRequest, path, "Make images from one", MEDIA_TYPE)},
            "/v1/models": {"get": _get("The served model, as a list", "application/json")},
            "/v1/model": {"get": _get("The model, its classes, the samplers and the limits", "application/json")},
            "/healthz": {"get": _get("200 while the engine lives", "application/json", 503)},
            "/readyz": {"get": _get("200 while requests are taken", "application/json", 503)},
            "/metrics": {"get": _get("Metrics in Prometheus' text format", "text/plain", 501)},
            "/openapi.json": {"get": _get("This description", "application/json")},
            "/": {"get": _get("A form to try it", "text/html")},
        },
        "components": {"schemas": {"Error": _ERROR, "ImageError": _IMAGE_ERROR, "Images": _IMAGES}},
    }


_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "one sentence"}},
    "required": ["error"],
}
_IMAGE_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "one sentence"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field that is wrong"},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_IMAGES = {
    "type": "object",
    "properties": {
        "created": {"type": "integer", "description": "seconds since 1970"},
        "background": {"const": "opaque"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "b64_json": {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"},
                    "seed": {"type": "integer"},
                    "index": {"type": "integer"},
                    "label": {"type": "integer"},
                    "class": {"type": ["string", "null"]},
                },
                "required": ["b64_json", "seed", "index"],
            },
        },
        "output_format": {"const": "png"},
        "size": {"type": "string", "examples": ["28x28"]},
    },
    "required": ["created", "background", "data", "output_format", "size"],
}
_EVENT = {  # of a stream, one after the other
    "type": "object",
    "properties": {
        "event": {"enum": ["accepted", "progress", "result", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
_FILES = {
    "image": {
        "type": "string",
        "format": "binary",
        "description": "PNG, JPEG or WebP, of the size of the model's images",
    },
    "mask": {
        "type": "string",
        "format": "binary",
        "description": "a PNG of the same size, fully transparent where to paint anew; else the image's own alpha",
    },
}


def _images(request: type[ImageRequest], path: Path, summary: str, media: str) -> dict[str, Any]:
    """An operation of the image API."""
    schema = request.model_json_schema()
    schema["properties"]["sampler"]["enum"] = [*samplers_of(path), None]
    problems = {**_PROBLEMS, 404: "the model is another than the served one"}
    if media == MEDIA_TYPE:
        schema["properties"] |= _FILES
        schema["required"] = ["image", *schema["required"]]
        problems[415] = "the body is not declared as a form"
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/ImageError"}}}
    made = {"application/json": {"schema": {"$ref": "#/components/schemas/Images"}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {media: {"schema": schema}}},
        "responses": {
            "200": {"description": "The images, each as a PNG in base64", "content": made},
            **{str(code): {"description": text, "content": problem} for code, text in sorted(problems.items())},
        },
    }


def _post(
    request: type[GenerateRequest], limits: Limits, path: Path, summary: str, content: dict[str, Any], response: str
) -> dict[str, Any]:
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    schema = request.model_json_schema()
    schema["properties"]["sampler"]["enum"] = [*samplers_of(path), None]
    schema["properties"]["priority"] |= {"maximum": limits.priority, "description": _PRIORITY.format(limits.priority)}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": response, "content": content},
            **{str(code): {"description": text, "content": problem} for code, text in _PROBLEMS.items()},
        },
    }


def _get(summary: str, media: str, otherwise: int | None = None) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {"description": summary, "content": {media: {}}},
        "421": {"description": _HOST},
    }
    if otherwise is not None:
        responses[str(otherwise)] = {"description": "otherwise"}
    return {"summary": summary, "responses": responses}
