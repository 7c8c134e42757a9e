"""What an HTTP request gets: pictures, arrays, and events on the way to them. Nothing here touches a device."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any

import numpy as np
import torch

from stepfusion.engine import Engine
from stepfusion.files.images import CHANNELS, Pixels, encode_png, grid
from stepfusion.kernels.to_uint8 import to_uint8_reference
from stepfusion.lanes.walk import Event
from stepfusion.serving.http.validation import Order, Refused
from stepfusion.serving.job import Result

_PREVIEW = 64  # pixels of the longer side of a preview, at most


def check_picture(engine: Engine) -> None:
    """Refused where the engine's images are no pictures."""
    if engine.shape[0] not in CHANNELS:
        raise Refused(
            f"format must be 'npz' for this model, whose images have {engine.shape[0]} channels; "
            "pictures have 1, 3 or 4"
        )


def picture(pixels: Pixels) -> bytes:
    """The PNG of one image, or of a grid of several; uint8 [n, H, W, C]."""
    return encode_png(pixels[0] if len(pixels) == 1 else grid(pixels, gap=0))


def arrays(order: Order, pixels: Pixels) -> bytes:
    """An .npz with ``images`` uint8 [n, H, W, C], ``seeds`` uint64 [n], ``indices`` and, where the model has classes,
    ``labels`` int64 [n].
    """
    labels = {} if order.labels is None else {"labels": np.array(order.labels, np.int64)}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        allow_pickle=False,
        images=pixels,
        seeds=np.array(order.seeds, np.uint64),
        indices=np.array(order.indices, np.int64),
        **labels,
    )
    return buffer.getvalue()


def progress(event: Event) -> bytes:
    """The server-sent event of a step: its number, how many there are, whose, and small previews of their x0."""
    stride = math.ceil(max(event.x0.shape[2:]) / _PREVIEW)
    pixels = to_uint8_reference(event.x0[:, :, ::stride, ::stride]).numpy()
    return sent_event(
        "progress",
        {
            "step": event.step + 1,
            "steps": event.steps,
            "timestep": event.timestep,
            "images": list(event.images),
            "previews": [_base64_png(one) for one in pixels],
        },
    )


def finished(engine: Engine, order: Order, result: Result) -> bytes:
    """The server-sent event of a result: the images with what each is a function of, and the request's timings."""
    images = []
    for image, pixels in enumerate(result.images.numpy()):
        facts: dict[str, Any] = {
            "name": order.name(image),
            "seed": order.seeds[image],
            "index": order.indices[image],
            "png": _base64_png(pixels),
        }
        if order.labels is not None:
            label = order.labels[image]
            facts |= {"label": label, "class": class_name(engine, label)}
        images.append(facts)
    timings = result.timings
    seconds = {"queued": timings.queued, "running": timings.running, "total": timings.total}
    return sent_event("result", {"images": images, "seconds": seconds})


def sent_event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event, as the HTML standard has them."""
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def class_name(engine: Engine, label: int) -> str | None:
    """What a label is called; None for the one that stands for none, and where nothing has a name."""
    names = engine.class_names or ()
    return names[label] if label != engine.null_label and label < len(names) else None


def pixels_of(result: Result) -> Pixels:
    """The images of a result that was asked for in uint8."""
    assert result.images.dtype == torch.uint8
    pixels: Pixels = result.images.numpy()
    return pixels


def _base64_png(pixels: Pixels) -> str:
    return base64.b64encode(encode_png(pixels)).decode()
