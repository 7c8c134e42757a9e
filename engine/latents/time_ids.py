"""The sizes that SDXL is told of an image: micro-conditioning (Podell et al. 2023, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion import _checks

MOST = 1 << 16

Size = tuple[int, int]


def size_ids(
    height: int, width: int, *, original: Size | None = None, crop: Size = (0, 0), target: Size | None = None
) -> Tensor:
    """SDXL's six numbers, its condition ``time_ids``.

    Args:
        height, width: of the image, in pixels.
        original: height and width of the photograph that it is to look as if it was scaled from; by default its own.
        crop: the top and left of what it is to look as if it was cut out of; (0, 0) for a centred subject.
        target: height and width of what it was cut to; by default its own.

    Returns:
        float32 [6]: original height and width, top, left, target height and width.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    own = _size("height and width", (height, width), 1)
    first = own if original is None else _size("original", original, 1)
    last = own if target is None else _size("target", target, 1)
    return torch.tensor([*first, *_size("crop", crop, 0), *last], dtype=torch.float32, device="cpu")


def refiner_ids(
    height: int, width: int, *, original: Size | None = None, crop: Size = (0, 0), aesthetic_score: float = 6.0
) -> Tensor:
    """The five numbers of SDXL's refiner: those of :func:`size_ids` with a score in place of the target.

    Args:
        height, width, original, crop: as for :func:`size_ids`.
        aesthetic_score: how good the image is to look, from 0 to 10; diffusers takes 6, and 2.5 where there is no
            prompt.

    Returns:
        float32 [5].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    own = _size("height and width", (height, width), 1)
    first = own if original is None else _size("original", original, 1)
    score = _checks.number("aesthetic_score", aesthetic_score, 0, 10)
    return torch.tensor([*first, *_size("crop", crop, 0), score], dtype=torch.float32, device="cpu")


def _size(name: str, value: object, low: int) -> Size:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two integers, got {value!r:.100}")
    return _checks.integer(name, value[0], low, MOST), _checks.integer(name, value[1], low, MOST)
