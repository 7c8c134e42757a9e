"""Shortcuts on a UNet's way up, whose product reads x and a skip input, by everyone who has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stepfusion import kernels
from stepfusion.bench.kernel_work import ATEN, INDUCTOR, OURS, REFERENCE, Set, Work
from stepfusion.bench.measure import Limit
from stepfusion.kernels import reference
from stepfusion.kernels.tolerance import UNIT, projection_roundings, tolerance


class _Shortcut(NamedTuple):
    """Lanes, channels of the image, of x and of the skip input, and the side of the image."""

    lanes: int
    channels: int
    of_x: int
    of_skip: int
    side: int


#: On a GPU those of CelebA-HQ 256 that move most, at batch 8, one of a single image, and the widest.
_SHORTCUTS = {
    "tiny": (_Shortcut(2, 16, 16, 8, 4),),
    "cpu": (_Shortcut(2, 128, 256, 128, 32),),
    "cuda": (
        _Shortcut(8, 128, 128, 128, 256),
        _Shortcut(8, 128, 256, 128, 128),
        _Shortcut(1, 128, 128, 128, 256),
        _Shortcut(8, 256, 256, 256, 64),
        _Shortcut(8, 512, 512, 512, 16),
        _Shortcut(1, 512, 512, 512, 8),
    ),
}


def projections(device: torch.device, size: str) -> Iterator[Work]:
    """The product alone, and on the way to an image of twice the size, of every shortcut of the size.

    Peers join the two inputs, as a norm would have to write them, and multiply, add and resample by a launch each.
    """
    for shortcut in _SHORTCUTS[size]:
        for doubles in (False, True):
            yield _work(device, shortcut, doubles=doubles)


def _work(device: torch.device, shortcut: _Shortcut, *, doubles: bool) -> Work:
    lanes, channels, of_x, of_skip, side = shortcut
    dtype, depth = torch.float32 if device.type == "cpu" else torch.bfloat16, of_x + of_skip

    def make() -> Set:
        image, x, skip = (
            torch.randn(lanes, c, side, side, device=device).to(dtype).to(memory_format=torch.channels_last)
            for c in (channels, of_x, of_skip)
        )
        weight = (torch.randn(channels, depth, device=device) / math.sqrt(depth)).to(dtype)
        return {"image": image, "x": x, "skip": skip, "weight": weight, "bias": torch.randn(channels, device=device)}

    def run(add: Callable[..., Tensor], s: Set, given: bool) -> Tensor:
        # compared with others on a copy, for it may be changed; what is timed may add to it again and again
        image = s["image"].clone(memory_format=torch.preserve_format) if given else s["image"]
        return add(image, s["x"], s["weight"], skip=s["skip"], bias=s["bias"])

    op = "add_projection_doubled" if doubles else "add_projection_"
    aten = partial(_aten, doubles=doubles)
    magnitude = 10.0 + math.sqrt(depth)  # of all terms together: image, bias, and products of about 1 / sqrt(K) each
    # peers round to the dtype after the product, its bias and the sum
    peers = 0.0 if dtype == torch.float32 else 3 * 10.0 * UNIT[dtype]
    allowed = tolerance(dtype, magnitude, projection_roundings(depth)) + peers
    pixels = lanes * side * side
    written = (4 if doubles else 1) * channels
    return Work(
        op,
        (lanes, depth, side, side),
        dtype,
        (pixels * (depth + channels + written) + channels * depth) * dtype.itemsize,
        2 * pixels * channels * depth,
        make,
        Limit(allowed),
        {
            OURS: partial(run, getattr(kernels, op)),
            REFERENCE: partial(run, getattr(reference, op)),
            INDUCTOR: partial(run, torch.compile(aten, fullgraph=True, dynamic=False)),
            ATEN: partial(run, aten),
        },
    )


def _aten(image: Tensor, x: Tensor, weight: Tensor, *, skip: Tensor, bias: Tensor, doubles: bool) -> Tensor:
    h = image + functional.conv2d(torch.cat((x, skip), dim=1), weight[:, :, None, None], bias.to(image.dtype))
    return functional.interpolate(h, scale_factor=2.0, mode="nearest") if doubles else h
