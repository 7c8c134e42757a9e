"""Between picture files and an engine's images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepfusion.engine import Engine
from stepfusion.files.images import Pixels
from stepfusion.files.picture_reader import read_picture

_BRIGHT = 128  # a mask's grey from which on it says "repaint"


def read_pictures(engine: Engine, paths: Sequence[Path]) -> Tensor:
    """Read pictures of the model's size, converted to its channels.

    Returns:
        float32 [n, C, H, W] in [-1, 1], on the CPU.

    Raises:
        ValueError: naming the file that is no sound picture, or of another size.
    """
    pixels = torch.stack([torch.from_numpy(read_picture(path, engine.image_shape)) for path in paths])
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def read_mask(engine: Engine, path: Path) -> Tensor:
    """Read a picture as a mask, bool [1, 1, H, W]: True if it is bright.

    Raises:
        ValueError: the file is no sound picture, or not of the size of the model's images.
    """
    pixels = read_picture(path, (1, *engine.image_shape[1:]))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] >= _BRIGHT


def pixels_of(engine: Engine, x: Tensor) -> Pixels:
    """Images [n, C, H, W] in [-1, 1] as pixels on the host, uint8 [n, H, W, C]."""
    pixels: Pixels = engine.to_uint8(x).cpu().numpy()
    return pixels
