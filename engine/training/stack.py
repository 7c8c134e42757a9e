"""Many pictures of one size as one tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepfusion.files.images import Pixels
from stepfusion.training.array_files import MAX_DATASET_BYTES


class PictureStack:
    """Pictures of one size, grey or coloured, which become one tensor when all are there."""

    def __init__(self) -> None:
        self._pictures: list[Pixels] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, name: str | Path, pixels: Pixels) -> None:
        """Add a picture uint8 [H, W, C], C of 1 or 3.

        Raises:
            ValueError: it is of another size than those before it, or they are too many; `name` names it.
        """
        self._bytes += pixels.nbytes
        if self._bytes > MAX_DATASET_BYTES:
            raise ValueError(f"{name} is one picture too many: all together may have {MAX_DATASET_BYTES} bytes")
        if self._pictures and pixels.shape[:2] != self._pictures[0].shape[:2]:
            (height, width), (all_height, all_width) = pixels.shape[:2], self._pictures[0].shape[:2]
            before = f"the pictures before it are {all_width} x {all_height}"
            raise ValueError(f"{name} is {width} x {height} pixels, and {before}")
        self._pictures.append(pixels)

    def whole(self) -> Tensor:
        """All pictures, uint8 [N, C, H, W]: C is 1 if all are grey, else 3, and grey ones become coloured."""
        height, width, _ = self._pictures[0].shape
        channels = max(pixels.shape[2] for pixels in self._pictures)
        whole = np.empty((len(self), channels, height, width), dtype=np.uint8)
        for place, pixels in enumerate(self._pictures):
            whole[place] = pixels.transpose(2, 0, 1)  # a grey picture is the same in every channel
        return torch.from_numpy(whole)
