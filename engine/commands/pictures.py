"""Between picture files and an engine's images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from stepfusion.engine import Engine
from stepfusion.files.images import Pixels
from stepfusion.lanes.pictures import images_of_pictures, masks_of_pictures


def read_pictures(engine: Engine, paths: Sequence[Path]) -> Tensor:
    """Read pictures of the model's size, converted to its channels.

    Returns:
        float32 [n, C, H, W] in [-1, 1], on the CPU.

    Raises:
        ValueError: naming the file that is no sound picture, or of another size.
    """
    return images_of_pictures(list(paths), engine.image_shape)


def read_mask(engine: Engine, path: Path) -> Tensor:
    """Read a picture as a mask, bool [1, 1, H, W]: True if it is bright.

    Raises:
        ValueError: the file is no sound picture, or not of the size of the model's images.
    """
    return masks_of_pictures(path, engine.image_shape)


def pixels_of(engine: Engine, x: Tensor) -> Pixels:
    """Images [n, C, H, W] in [-1, 1] as pixels on the host, uint8 [n, H, W, C]."""
    pixels: Pixels = engine.to_uint8(x).cpu().numpy()
    return pixels
