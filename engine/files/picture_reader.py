"""Pictures to pixels: the one reader of picture files, for commands and for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from stepfusion.files.images import CHANNELS, Pixels

SUFFIXES = (".png", ".jpg", ".jpeg")

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_GREY = ("L", "1")


def read_picture(path: str | Path, shape: Sequence[int]) -> Pixels:
    """Read a PNG or JPEG for images of ``shape`` (C, H, W), converted to their channels: grey, RGB or RGBA.

    Returns:
        uint8 [H, W, C].

    Raises:
        ValueError: the file is no sound picture, or of another size, or ``shape`` is not one of pictures.
    """
    channels, height, width = shape
    if channels not in CHANNELS:
        raise ValueError(f"images must have 1, 3 or 4 channels to be read from a picture, got {channels}")
    pixels = _read(path, channels)
    if pixels.shape[:2] != (height, width):
        given = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise ValueError(f"{path} is {given} pixels, and images are {width} x {height}")
    return pixels


def read_any_picture(path: str | Path) -> Pixels:
    """Read a PNG or JPEG of any size, uint8 [H, W, C]: C is 1 if the picture is grey, else 3.

    Raises:
        ValueError: the file is no sound picture.
    """
    return _read(path, None)


def _read(path: str | Path, channels: int | None) -> Pixels:
    """Pixels uint8 [H, W, C]; without ``channels``, of as many as the picture has."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            if channels is None:
                channels = 1 if picture.mode in _GREY else 3
            pixels = np.array(picture.convert(_MODES[channels]), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a sound PNG or JPEG image: {error}") from None
    return pixels.reshape(*pixels.shape[:2], channels)
