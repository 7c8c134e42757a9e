"""The contents of HTTP responses: pictures, arrays, and server-sent events. Nothing here touches a device."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from stepfusion.engine import Engine
from stepfusion.files.images import Pixels, encode_png, grid, why_no_picture
from stepfusion.kernels.to_uint8 import to_uint8_reference
from stepfusion.serving.http.errors import InvalidRequest
from stepfusion.serving.http.previews import Preview
from stepfusion.serving.http.validation import ValidatedRequest
from stepfusion.serving.served_request import Result


def check_picture(engine: Engine) -> None:
    """InvalidRequest if the engine's images are not written as pictures."""
    if (reason := why_no_picture(engine.image_shape[0])) is not None:
        raise InvalidRequest(f"format must be 'npz' for this model: {reason}")


def picture(pixels: Pixels, texts: Mapping[str, str] | None = None) -> bytes:
    """The PNG of one image, or of a grid of several, uint8 [n, H, W, C]; with these texts."""
    return encode_png(pixels[0] if len(pixels) == 1 else grid(pixels, gap=0), texts=texts)


def arrays(request: ValidatedRequest, pixels: Pixels) -> bytes:
    """An .npz with ``images`` uint8 [n, H, W, C], ``seeds`` uint64 [n], ``indices`` int64 [n] and, if the model has
    classes, ``labels`` int64 [n].
    """
    labels = {} if request.labels is None else {"labels": np.array(request.labels, np.int64)}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        allow_pickle=False,
        images=pixels,
        seeds=np.array(request.seeds, np.uint64),
        indices=np.array(request.indices, np.int64),
        **labels,
    )
    return buffer.getvalue()


def progress(preview: Preview) -> bytes:
    """The server-sent event of a step: its number, how many steps there are, the images that did it, and their
    pictures.
    """
    return sent_event(
        "progress",
        {
            "step": preview.step,
            "steps": preview.steps,
            "timestep": preview.timestep,
            "images": list(preview.images),
            "previews": [base64_png(one) for one in to_uint8_reference(preview.x0).numpy()],
        },
    )


def finished(
    engine: Engine, request: ValidatedRequest, result: Result, texts: Callable[[int], Mapping[str, str] | None]
) -> bytes:
    """The server-sent event of a result: the images, what each is a function of, and the timings of the request.

    ``texts`` are those of each image's PNG.
    """
    images = []
    for image, pixels in enumerate(result.images.numpy()):
        described: dict[str, Any] = {
            "name": request.name(image),
            "seed": request.seeds[image],
            "index": request.indices[image],
            "png": base64_png(pixels, texts(image)),
        }
        if request.labels is not None:
            label = request.labels[image]
            described |= {"label": label, "class": class_name(engine, label)}
        images.append(described)
    timings = result.timings
    seconds = {"queued": timings.queued, "running": timings.running, "total": timings.total}
    return sent_event("result", {"images": images, "seconds": seconds})


def sent_event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event, in the format of the HTML standard, section 9.2."""
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def class_name(engine: Engine, label: int) -> str | None:
    """What a label is called; None for the null label, and if the classes have no names."""
    names = engine.class_names or ()
    return names[label] if label != engine.null_label and label < len(names) else None


def pixels_of(result: Result) -> Pixels:
    """The images of a result that was asked for in uint8."""
    assert result.images.dtype == torch.uint8
    pixels: Pixels = result.images.numpy()
    return pixels


def base64_png(pixels: Pixels, texts: Mapping[str, str] | None = None) -> str:
    """The PNG of one image, uint8 [H, W, C], with these texts, for JSON."""
    return base64.b64encode(encode_png(pixels, texts=texts)).decode()
