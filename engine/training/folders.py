"""Images in folders: each sub-folder is a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepfusion.files.images import Pixels
from stepfusion.files.picture_reader import SUFFIXES, read_any_picture


def read_class_folders(path: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read the pictures in the sub-folders of ``path``, in the order of the sorted names.

    Returns:
        images uint8 [N, C, H, W], C is 1 if all pictures are grey, else 3; labels int64 [N]; the classes' names.

    Raises:
        ValueError: a sub-folder holds no picture, or a picture is damaged or of another size than those before it.
    """
    names = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    pictures: list[Pixels] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = sorted(file for file in (path / name).iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"{path / name} holds no PNG or JPEG image")
        for file in files:
            pictures.append(_read_like(file, pictures))
            labels.append(label)
    return _stack(pictures), torch.tensor(labels, dtype=torch.int64), tuple(names)


def _read_like(file: Path, before: list[Pixels]) -> Pixels:
    """A picture's pixels uint8 [H, W, C]; its size must be that of the pictures before it."""
    pixels = read_any_picture(file)
    if before and pixels.shape[:2] != before[0].shape[:2]:
        (height, width), (wanted_height, wanted_width) = pixels.shape[:2], before[0].shape[:2]
        given = f"{width} x {height} pixels, and the pictures before it are {wanted_width} x {wanted_height}"
        raise ValueError(f"{file} is {given}")
    return pixels


def _stack(pictures: list[Pixels]) -> Tensor:
    """One tensor uint8 [N, C, H, W]; grey pictures among coloured ones become coloured."""
    channels = max(pixels.shape[2] for pixels in pictures)
    whole = np.stack([np.broadcast_to(pixels, (*pixels.shape[:2], channels)) for pixels in pictures])
    return torch.from_numpy(np.ascontiguousarray(whole.transpose(0, 3, 1, 2)))
