"""Images in Python as pictures: of Pillow's, and as PNG files that say where they come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stepfusion import _checks
from stepfusion.checkpoints.weights_digest import weights_digest
from stepfusion.engine import Engine
from stepfusion.files.images import Pixels, grid, picture_of, save_png, why_no_picture
from stepfusion.files.provenance import Provenance, command_line
from stepfusion.kernels.to_uint8 import to_uint8_reference
from stepfusion.lanes.request import Request
from stepfusion.options import TableOptions
from stepfusion.samplers.registry import OFFERED
from stepfusion.samplers.table_request import TableRequest

_GAP = 2
_MOST_SCALE = 64


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images as pictures of Pillow's, grey, RGB or RGBA.

    Args:
        images: float [n, C, H, W] in [-1, 1], as :meth:`stepfusion.Engine.sample` returns them, or uint8
            [n, H, W, C], as :meth:`stepfusion.Engine.generate` and :meth:`stepfusion.Engine.to_uint8` do (of one
            that decodes latents, these); on any device.

    Raises:
        TypeError, ValueError: they are no such tensor, or have no 1, 3 or 4 channels.
    """
    return [picture_of(one) for one in _pixels(images)]


def save_images(
    images: torch.Tensor,
    path: str | os.PathLike[str],
    request: Request | None = None,
    engine: Engine | None = None,
    *,
    columns: int | None = None,
    scale: int = 1,
    metadata: bool = True,
) -> list[Path]:
    """Write images as PNG files, each whole or not at all, with texts that say where they come from.

    A path that ends in ``.png`` becomes one picture: the image itself, or a grid of several. Any other is a directory
    with SEED-INDEX.png for each image (0.png, 1.png, ... without a request), and is made if it is not there.

    Args:
        images: as for :func:`to_pil`, or of an ``engine`` that decodes them latents.
        request: what :meth:`stepfusion.Engine.request` returned, and the images were made of
            (``engine.sample(request)``): the texts tell its sampler, steps, seeds, labels and guidance.
        engine: what made them: the texts tell its model, and if that has a name the command that makes them again.
        columns, scale: of a grid; each pixel becomes scale x scale.
        metadata: False writes no texts.

    Returns:
        the files.

    Raises:
        TypeError, ValueError: naming the argument. OSError: a file could not be written.
    """
    _check(images, request, columns, scale)
    pixels = _pixels(images if engine is None or images.dtype == torch.uint8 else engine.to_uint8(images))
    if len(pixels) and (reason := why_no_picture(pixels.shape[-1])) is not None:
        raise ValueError(reason)
    texts = _Texts(request if metadata else None, engine)
    path = Path(path)
    if path.suffix.lower() == ".png":
        gap = 0 if len(pixels) == 1 else _GAP
        save_png(path, grid(pixels, columns=columns, scale=scale, gap=gap), texts.of(range(len(pixels))))
        return [path]
    names = range(len(pixels)) if request is None else zip(request.seeds, request.indices, strict=True)
    files = [path / f"{name if isinstance(name, int) else '-'.join(map(str, name))}.png" for name in names]
    path.mkdir(exist_ok=True)
    for image, (file, one) in enumerate(zip(files, pixels, strict=True)):
        save_png(file, grid(one[None], scale=scale, gap=0), texts.of([image]))
    return files


class _Texts:
    """The texts of PNG files with images of a request; none without one."""

    def __init__(self, request: Request | None, engine: Engine | None) -> None:
        self._request, self._source = request, None if engine is None else engine.source
        self._run = {"batch": engine.batch, "invariant": True} if engine is not None and engine.invariant else {}
        self._weights = None if request is None or self._source is None else weights_digest(self._source)

    def of(self, images: Sequence[int]) -> dict[str, str] | None:
        """Those of a file with these images."""
        request = self._request
        if request is None:
            return None
        starts = [request.lane_starts[i] for i in images]
        labels = None if request.labels is None else [request.labels[i] for i in images]
        names = (request.spec.class_names if request.spec is not None else None) or ()
        scales = [start.guidance for start in starts]
        return Provenance(
            model=self._source or "a model in Python",
            sampler=request.table.name,
            steps=request.steps(images[0]),
            seeds=[start.seed for start in starts],
            indices=[start.index for start in starts],
            labels=labels,
            classes=None if labels is None else [names[i] if i < len(names) else None for i in labels],
            guidance=scales if any(scale != 1 for scale in scales) else None,
            weights=self._weights,
            command=self._command(images),
            prompts=_each(request.asked.get("prompt"), images),
            negatives=_each(request.asked.get("negative_prompt"), images),
        ).text()

    def _command(self, images: Sequence[int]) -> str | None:
        """The command that makes one image again; None if no command does."""
        request = self._request
        assert request is not None
        asked = {name: value for name, value in request.asked.items() if value is not None}
        if self._source is None or len(images) != 1 or request.mixed or asked.keys() & _NO_WORDS:
            return None
        start, (image,) = request.lane_starts[images[0]], images
        chosen: Any = {name: asked[name] for name in TableOptions.__annotations__ if name in asked}
        words = TableRequest(**chosen).words()
        if words is None or words.get("sampler", OFFERED[0]) not in OFFERED:
            return None
        options = {
            "num": 1,
            "labels": None if request.labels is None else request.labels[image],
            "prompt": (_each(asked.get("prompt"), images) or [None])[0],
            "negative": (_each(asked.get("negative_prompt"), images) or [None])[0],
            "guidance": None if start.guidance == 1 else start.guidance,
            "seed": start.seed,
            "first_index": start.index or None,
            **words,
            **self._run,
        }
        return command_line("sample", self._source, options={**options, "single": True})


#: Options of a request that no command takes as they are.
_NO_WORDS = {"table", "start", "noise", "image", "mask", "strength", "conditions", "null_conditions"}


def _each(value: Any, images: Sequence[int]) -> list[Any] | None:
    """An option's value for each of these images; None if it was not given."""
    if value is None or isinstance(value, str):
        return None if value is None else [value] * len(images)
    return [value[i] for i in images]


def _pixels(images: torch.Tensor) -> Pixels:
    """Images as pixels on the host, uint8 [n, H, W, C]."""
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        accepted = "float [n, C, H, W] or uint8 [n, H, W, C]"
        raise ValueError(f"images must be {accepted}, got {_checks.describe(images)}")
    pixels: Pixels = (images if images.dtype == torch.uint8 else to_uint8_reference(images.detach())).cpu().numpy()
    return np.ascontiguousarray(pixels)


def _check(images: torch.Tensor, request: Request | None, columns: int | None, scale: int) -> None:
    if request is not None and not isinstance(request, Request):
        raise TypeError(f"request must be what Engine.request returned, got {type(request).__name__}")
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not len(images):
        given = _checks.describe(images) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor with one image or more, got {given}")
    if request is not None and len(request) != len(images):
        raise ValueError(f"request must be for the {len(images)} images, got one for {len(request)}")
    if columns is not None:
        _checks.integer("columns", columns, 1, 1 << 20)
    _checks.integer("scale", scale, 1, _MOST_SCALE)
