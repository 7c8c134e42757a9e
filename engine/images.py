"""Pixels to files: grids, PNGs and animations, each written whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepfusion.files import atomic_write

Pixels = NDArray[np.uint8]

_BACKGROUND = 24


def grid(pixels: Pixels, *, columns: int | None = None, scale: int = 1, gap: int = 2) -> Pixels:
    """Images uint8 [n, H, W, C] side by side in one, uint8 [.., .., C], each enlarged ``scale`` times, ``gap`` pixels apart."""
    n, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), _BACKGROUND, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * cell_h, gap + i % columns * cell_w
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet


def save_png(path: str | Path, pixels: Pixels) -> None:
    """One image, uint8 [H, W, 1] (grey), [H, W, 3] or [H, W, 4], as a PNG, under a temporary name first."""
    buffer = io.BytesIO()
    _picture(pixels).save(buffer, format="PNG", optimize=True)
    atomic_write(path, buffer.getvalue())


def save_gif(path: str | Path, frames: Sequence[Pixels], *, milliseconds: int = 60, hold: int = 1500) -> None:
    """Frames uint8 [H, W, C] as a looping GIF; the last one stays ``hold`` milliseconds."""
    buffer = io.BytesIO()
    pictures = [_picture(frame) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    atomic_write(path, buffer.getvalue())


def _picture(pixels: Pixels) -> Image.Image:
    channels = pixels.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(f"images must have 1, 3 or 4 channels to become a picture, got {channels}")
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
