"""A web service of one's own around the engine: labelled pictures for a shop's test data, by address.

    GET /garments                       the classes, as JSON
    GET /garments/Sneaker.png           a picture; ?seed=7&index=3&steps=25&guidance=1.5
    GET /healthz                        200 while the engine lives

``stepfusion serve`` has far more; this is the other way round: an application that has routes of its own, and the
engine in them. All requests share the lanes of one engine, and a picture has the same bits whatever else runs, so its
address is all that a cache needs.

Run it with the packages of the extra "http":

    python examples/service.py fashion-mnist --port 8080
    curl http://127.0.0.1:8080/garments/Sneaker.png?seed=7 > sneaker.png

FastAPI is Starlette with types: its routes can hold the same three functions, and its ``lifespan`` the same one.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import stepfusion as sf
from stepfusion.serving import AsyncEngine, DeadlineExceeded, EngineClosed, EngineDead, Overloaded

MOST_STEPS = 200


def make_app(service: AsyncEngine, names: tuple[str, ...]) -> Starlette:
    """The application; it starts the engine when the server starts it, and closes it at the end.

    Args:
        service: not started yet, around an engine with classes.
        names: of its classes.
    """
    labels = {name.lower(): label for label, name in enumerate(names)}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service:
            yield

    async def classes(request: Request) -> JSONResponse:
        return JSONResponse(list(names))

    async def picture(request: Request) -> Response:
        name = request.path_params["name"].lower()
        if name not in labels:
            raise HTTPException(404, f"there is no {name}")
        asked = {
            "seed": number(request, "seed", 0, int),
            "steps": number(request, "steps", 25, int, MOST_STEPS),
            "guidance": number(request, "guidance", 1.5, float),
        }
        index = number(request, "index", 0, int)
        try:
            result = await service.generate(
                labels=labels[name], indices=[index], output="uint8", deadline=30, **asked
            )
        except (ValueError, TypeError) as error:  # they name the argument
            raise HTTPException(400, str(error)) from error
        except (Overloaded, DeadlineExceeded) as error:
            raise HTTPException(429, "too many pictures are asked for", {"Retry-After": "5"}) from error
        except (EngineClosed, EngineDead) as error:
            raise HTTPException(503, "the engine does not run") from error
        return Response(as_png(result.images[0].numpy()), media_type="image/png", headers={"Cache-Control": "public"})

    async def health(request: Request) -> Response:
        return Response(status_code=200 if service.live else 503)

    routes = [
        Route("/garments", classes),
        Route("/garments/{name}.png", picture),
        Route("/healthz", health),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def number(request: Request, name: str, default: float, kind: type, most: float | None = None) -> float:
    """A number of the query, or HTTP 400."""
    text = request.query_params.get(name)
    try:
        value: float = default if text is None else kind(text)
    except ValueError as error:
        raise HTTPException(400, f"{name} must be a number, got {text!r}") from error
    if most is not None and value > most:
        raise HTTPException(400, f"{name} must be at most {most}, got {text}")
    return value


def as_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="fashion-mnist", help="with class names (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    engine = sf.Engine.from_pretrained(options.model, invariant=True, batch=16)
    if engine.class_names is None:
        parser.error(f"{options.model} has no class names")
    uvicorn.run(make_app(AsyncEngine(engine), tuple(engine.class_names)), port=options.port)


if __name__ == "__main__":
    main()
