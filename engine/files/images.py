"""Pixels to files: grids, PNGs and animations, each written whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepfusion.files.atomic import atomic_write
from stepfusion.files.png_text import png_info

Pixels = NDArray[np.uint8]

CHANNELS = (1, 3, 4)
_OF_MODELS = (1, 3)

_BACKGROUND = 24


def grid_size(
    n: int, height: int, width: int, *, columns: int | None = None, scale: int = 1, gap: int = 2
) -> tuple[int, int]:
    """Height and width of the :func:`grid` of ``n`` images, in pixels."""
    columns = _columns(n, columns)
    rows = math.ceil(n / columns)
    return rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap


def grid(pixels: Pixels, *, columns: int | None = None, scale: int = 1, gap: int = 2) -> Pixels:
    """Images uint8 [n, H, W, C] side by side in one, uint8 [.., .., C].

    Each is enlarged ``scale`` times. They stand row by row, ``gap`` pixels apart, in a square without ``columns``.
    """
    n, height, width, channels = pixels.shape
    size = grid_size(n, height, width, columns=columns, scale=scale, gap=gap)
    columns = _columns(n, columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((*size, channels), _BACKGROUND, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * cell_h, gap + i % columns * cell_w
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet


def save_png(path: str | Path, pixels: Pixels, texts: Mapping[str, str] | None = None) -> None:
    """One image, uint8 [H, W, C] with 1 (grey), 3 or 4 channels, as a PNG with ``texts`` by their keywords."""
    _write(path, encode_png(pixels, optimize=True, texts=texts))


def encode_png(pixels: Pixels, *, optimize: bool = False, texts: Mapping[str, str] | None = None) -> bytes:
    """The PNG of one image, uint8 [H, W, C] with 1 (grey), 3 or 4 channels; smaller and slower with ``optimize``.

    ``texts`` are what it carries beside its pixels, by their keywords.
    """
    buffer = io.BytesIO()
    picture_of(pixels).save(buffer, format="PNG", optimize=optimize, pnginfo=png_info(texts) if texts else None)
    return buffer.getvalue()


def save_gif(path: str | Path, frames: Sequence[Pixels], *, milliseconds: int = 60, hold: int = 1500) -> None:
    """Frames uint8 [H, W, C] as a looping GIF; the last one stays ``hold`` milliseconds."""
    buffer = io.BytesIO()
    pictures = [picture_of(frame) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    _write(path, buffer.getvalue())


def _columns(n: int, columns: int | None) -> int:
    if n < 1:
        raise ValueError("a grid needs at least one image, got none")
    return math.ceil(math.sqrt(n)) if columns is None else min(columns, n)


def why_no_picture(channels: int) -> str | None:
    """The reason why a model's images are not written as pictures; None if they are, which 1 or 3 channels are.

    Four channels could be RGBA. Models with four channels are denoisers of latents, nearly without exception, and a
    picture of latents looks like a broken image of a sound model.
    """
    if channels in _OF_MODELS:
        return None
    latents = ", as the latents of an autoencoder have, which needs its decoder" if channels == 4 else ""
    return f"pictures have 1 or 3 channels, and this model's images have {channels}{latents}"


def _write(path: str | Path, data: bytes) -> None:
    """An error names ``path`` and not the temporary file beside it."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def picture_of(pixels: Pixels) -> Image.Image:
    """One image, uint8 [H, W, C], as a picture of Pillow's; ValueError unless it has 1, 3 or 4 channels."""
    channels = pixels.shape[-1]
    if channels not in CHANNELS:
        raise ValueError(f"images must have 1, 3 or 4 channels to become a picture, got {channels}")
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
