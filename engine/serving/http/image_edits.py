"""The pictures of an edit: what images are made from, and where they may differ from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from stepfusion.files.images import Pixels
from stepfusion.files.picture_reader import PictureError, decode_picture
from stepfusion.serving.http.errors import InvalidRequest
from stepfusion.serving.http.limits import Limits

_IMAGE_FORMATS, _MASK_FORMATS = ("PNG", "JPEG", "WEBP"), ("PNG",)
_BYTES_A_PIXEL = 8  # of a PNG with four channels of 16 bits that is not compressed
_BYTES_BESIDE = 1 << 16  # of a picture: its metadata


def form_limit(limits: Limits, shape: Sequence[int]) -> int:
    """The most bytes of a form: its texts, and two pictures of the model's size that are not compressed."""
    return limits.body + 2 * (_BYTES_A_PIXEL * math.prod(shape[1:]) + _BYTES_BESIDE)


def edit_options(
    shape: Sequence[int], image: bytes | None, mask: bytes | None, strength: float | None
) -> dict[str, torch.Tensor | float]:
    """``image``, ``mask`` and ``strength`` as :class:`stepfusion.options.SamplingOptions` takes them.

    Where the mask, or without one the image, is fully transparent, images are painted anew; the rest of it stays.

    Args:
        shape: (C, H, W) of the model's images.
        image, mask: the bytes of the files; None for a file that was not given.

    Raises:
        InvalidRequest: a picture is missing, damaged, of another size or format, or there is nothing to change.
    """
    if image is None:
        raise InvalidRequest("image must be a file, and is missing", code="missing_required_parameter")
    pixels, alpha = _decoded("image", image, shape, _IMAGE_FORMATS)
    if mask is not None:
        alpha = _decoded("mask", mask, (1, *shape[1:]), _MASK_FORMATS)[1]
        if alpha is None or bool((alpha > 0).all()):
            raise InvalidRequest(
                "mask must be a PNG with fully transparent pixels, where to paint anew, and has none"
            )
    options: dict[str, torch.Tensor | float] = {
        "image": torch.from_numpy(pixels).permute(2, 0, 1)[None].to(torch.float32) / 127.5 - 1
    }
    if alpha is not None and bool((alpha == 0).any()):
        options["mask"] = torch.from_numpy(np.ascontiguousarray(alpha == 0))[None, None]
    elif strength is None:
        raise InvalidRequest(
            "mask must be given, or an image with fully transparent pixels, or a strength above 0 and at most 1"
        )
    if strength is not None:
        options["strength"] = strength
    return options


def _decoded(name: str, data: bytes, shape: Sequence[int], formats: tuple[str, ...]) -> tuple[Pixels, Pixels | None]:
    try:
        return decode_picture(name, data, shape, formats=formats)
    except PictureError as error:
        raise InvalidRequest(str(error), param=name, code="invalid_image_file") from None
