"""The body of an HTTP request, read within the limits of its size and its time."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request

from stepfusion.serving.http.limits import Limits


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request that declares it as JSON.

    Raises:
        HTTPException: 415 if it is not declared as JSON, 413 if it is too large (before any of it is read, if its
            declared length is), 408 if it takes too long.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the Content-Type must be application/json")
    return await read_bytes(request, limits.body, limits.body_seconds)


async def read_bytes(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request, of at most so many bytes, that arrives within so many seconds.

    Raises:
        HTTPException: 413 if it is too large (before any of it is read, if its declared length is), 408 if it takes
            too long.
    """
    too_large = HTTPException(413, f"the body must have at most {most} bytes", {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        message = f"the body must arrive within {seconds:g} s"
        raise HTTPException(408, message, {"Connection": "close"}) from None
    return bytes(body)
