"""Decoding an image tile by tile, where memory does not hold what a decoder makes of a whole one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def decode_tiles(decode: Callable[[Tensor], Tensor], z: Tensor, tile: int) -> Tensor:
    """Decode square tiles that overlap by a quarter, and blend them.

    The weight of a tile's pixel grows linearly from the tile's edge to the end of the overlap, so that no seam shows.
    Norms and attention see a tile at a time, so that the image is close to that of a whole decode, and not equal.

    Args:
        decode: maps [n, C, h, w] to images [n, C', f h, f w].
        z: [n, C, h, w].
        tile: the length of a tile's sides in pixels of z, at least 4. An axis of z that is shorter is not cut.

    Returns:
        float32 [n, C', f h, f w].
    """
    height, width = z.shape[-2:]
    total, weights = None, None
    for top in _starts(height, tile):
        for left in _starts(width, tile):
            part = decode(z[..., top : top + tile, left : left + tile]).float()
            factor = part.shape[-1] // min(tile, width)
            if total is None or weights is None:
                total = part.new_zeros(*part.shape[:2], factor * height, factor * width)
                weights = part.new_zeros(factor * height, factor * width)
            rows = _ramp(top, min(tile, height), height, tile // 4, factor, part)
            columns = _ramp(left, min(tile, width), width, tile // 4, factor, part)
            weight = rows[:, None] * columns
            place = (
                slice(factor * top, factor * top + part.shape[-2]),
                slice(factor * left, factor * left + part.shape[-1]),
            )
            total[..., *place].add_(part * weight)
            weights[place].add_(weight)
    assert total is not None
    assert weights is not None
    return total.div_(weights)


def _starts(size: int, tile: int) -> list[int]:
    """Where tiles begin along an axis; the last one ends where the axis does."""
    if size <= tile:
        return [0]
    step = tile - tile // 4
    return [*range(0, size - tile, step), size - tile]


def _ramp(start: int, length: int, size: int, overlap: int, factor: int, like: Tensor) -> Tensor:
    """The weights of a tile along an axis, as a vector [factor * length]."""
    places = torch.arange(factor * length, device=like.device, dtype=torch.float32)
    edge = factor * overlap + 1
    weight = torch.ones_like(places)
    if start > 0:
        weight = torch.minimum(weight, (places + 1) / edge)
    if start + length < size:
        weight = torch.minimum(weight, (factor * length - places) / edge)
    return weight.to(like.dtype)
