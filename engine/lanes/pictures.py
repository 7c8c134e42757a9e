"""Pictures in place of tensors: what is given as ``image`` and ``mask`` of a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image

from stepfusion.files.images import Pixels
from stepfusion.files.picture_reader import pixels_of_picture, read_picture
from stepfusion.options import Picture, SamplingOptions

_BRIGHT = 128  # a mask's grey from which on it says "repaint"


def with_tensors(options: SamplingOptions, image_shape: Callable[[], Sequence[int]]) -> SamplingOptions:
    """The options with tensors where ``image`` and ``mask`` are pictures; others stay as they are.

    Args:
        image_shape: says the shape (C, H, W) of the model's images, and is called if there is a picture.

    Raises:
        TypeError, ValueError: naming the argument or the file.
    """
    changed = dict[str, Any](options)
    if _holds_pictures("image", options.get("image")):
        changed["image"] = images_of_pictures(options["image"], image_shape())
    if _holds_pictures("mask", options.get("mask")):
        changed["mask"] = masks_of_pictures(options["mask"], image_shape())
    return cast(SamplingOptions, changed)


def images_of_pictures(pictures: Any, shape: Sequence[int], name: str = "image") -> torch.Tensor:
    """Pictures of the model's size, float32 [n, C, H, W] in [-1, 1] on the CPU, converted to its channels.

    Args:
        pictures: paths or pictures of Pillow's: one, or a sequence.
        shape: (C, H, W).

    Raises:
        ValueError: naming the file that is no sound picture, or of another size.
    """
    pixels = [torch.from_numpy(_pixels(name, one, shape)) for one in _each(pictures)]
    return torch.stack(pixels).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def masks_of_pictures(pictures: Any, shape: Sequence[int], name: str = "mask") -> torch.Tensor:
    """Pictures as masks, bool [n, 1, H, W]: True where they are bright. ValueError as :func:`images_of_pictures`."""
    pixels = [torch.from_numpy(_pixels(name, one, (1, *shape[1:]))) for one in _each(pictures)]
    return torch.stack(pixels).permute(0, 3, 1, 2) >= _BRIGHT


def _holds_pictures(name: str, value: object) -> bool:
    if value is None or isinstance(value, torch.Tensor):
        return False
    pictures = _each(value)
    if not pictures or not all(isinstance(one, str | os.PathLike | Image.Image) for one in pictures):
        kinds = "a tensor, a PIL.Image, the path of a picture, or a list of pictures"
        raise TypeError(f"{name} must be {kinds}, got {type(value).__name__}")
    return True


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _pixels(name: str, picture: Picture, shape: Sequence[int]) -> Pixels:
    if isinstance(picture, Image.Image):
        return pixels_of_picture(name, picture, shape)
    return read_picture(os.fspath(picture), shape)
