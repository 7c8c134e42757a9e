"""Errors over HTTP: the status that each gets, and the one sentence that a client is told."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from stepfusion.errors import NonFiniteError
from stepfusion.serving.errors import DeadlineExceeded, EngineClosed, EngineDead, Overloaded

logger = logging.getLogger("stepfusion.serving")

#: Where the paths of the image API are.
IMAGES = "/v1/images/"

_CLIENT_CLOSED_REQUEST = 499  # nginx's status of a response that nobody reads
_MAX_SHOWN = 60  # characters of a value in a message
_FIELD = re.compile(
    "(prompt|negative_prompt|image|mask|n|size|seed|sampler|steps|eta|guidance|indices|strength|model|[a-z]+_format)\\b"
)
_KINDS: dict[int, tuple[str, str | None]] = {  # of errors of the image API, beside the general ones
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("server_error", "service_unavailable"),
    504: ("server_error", "deadline_exceeded"),
}


class InvalidRequest(ValueError):
    """A request that is wrong; the message says how, in one sentence.

    Args:
        param: the field that is wrong, if the message does not begin with its name.
        code: what is wrong with it, in the words of the image API.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


def shown(value: object) -> str:
    """A value as it stands in a message, cut if it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * _MAX_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


@contextmanager
def as_bad_request() -> Iterator[None]:
    """Turn the ValueError or TypeError by which a check refuses an argument into a response with status 400."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise HTTPException(400, _sentence(error)) from error


def error_response(
    status: int,
    message: str,
    headers: dict[str, str] | None = None,
    *,
    path: str = "",
    cause: BaseException | None = None,
) -> Response:
    """The JSON body that every error has: ``{"error": message}``, or below :data:`IMAGES` the image API's object.

    Args:
        path: of the request.
        cause: what refused the request, if it is known.
    """
    told = _image_error(status, message, cause) if path.startswith(IMAGES) else message
    return JSONResponse({"error": told}, status, headers)


def _image_error(status: int, message: str, cause: BaseException | None) -> dict[str, str | None]:
    """The error in the form that clients of the image API read."""
    kind, code = _KINDS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    param = None
    if isinstance(cause, InvalidRequest):
        param, code = cause.param, cause.code
    if param is None and status == 400 and (found := _FIELD.match(message)):
        param = found[0]
    return {"message": message, "type": kind, "param": param, "code": code}


def status_and_message(error: Exception) -> tuple[int, str]:
    """The status of an error, and what the client is told: of a fault of the server, only that there was one."""
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return status, _sentence(error)
    logger.error("a request failed", exc_info=error)
    return 500, "the server failed; its log says why"


async def handle_error(request: Request, error: Exception) -> Response:
    """The response to a request whose handler raised ``error``."""
    path = request.url.path
    if isinstance(error, HTTPException):
        headers = None if error.headers is None else dict(error.headers)
        default = error.detail == HTTPStatus(error.status_code).phrase
        message = _ROUTING.get(error.status_code, error.detail) if default else error.detail
        return error_response(error.status_code, message, headers, path=path, cause=error.__cause__)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    status, message = status_and_message(error)
    retry = {"Retry-After": str(max(1, math.ceil(error.retry_after)))} if isinstance(error, Overloaded) else None
    return error_response(status, message, retry, path=path, cause=error)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_ROUTING = {
    404: "there is nothing at this path; /openapi.json says what there is",
    405: "this path takes no such method",
}
_STATUS: dict[type[Exception], int] = {
    InvalidRequest: 400,
    Overloaded: 429,
    DeadlineExceeded: 504,
    EngineClosed: 503,
    EngineDead: 503,
    NonFiniteError: 500,
}
#: Of a Starlette application.
EXCEPTION_HANDLERS: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = dict.fromkeys(
    [HTTPException, ClientDisconnect, *_STATUS, Exception], handle_error
)
