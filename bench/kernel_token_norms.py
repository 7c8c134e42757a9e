"""LayerNorm with adaLN's modulation at the shapes of DiT (Peebles & Xie 2023), by everyone who has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stepfusion import kernels
from stepfusion.bench.kernel_work import ATEN, INDUCTOR, OURS, REFERENCE, Set, Work
from stepfusion.bench.measure import Limit
from stepfusion.kernels import reference
from stepfusion.kernels.tolerance import ROUNDINGS, UNIT, tolerance

_EPS = 1e-6
#: (B, N, D): two images of DiT-S/2; on a GPU a guided batch of 32 of DiT-XL/2 at 256 x 256 pixels, and of 8 at 512.
_SHAPES = {
    "tiny": ((2, 4, 16),),
    "cpu": ((2, 256, 384),),
    "cuda": ((64, 256, 1152), (16, 1024, 1152)),
}


def token_normalisations(device: torch.device, size: str) -> Iterator[Work]:
    """The norm at the head of a block, and the one behind a gated residual, at every shape of the size."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for shape in _SHAPES[size]:
        yield _work(device, shape, dtype, residual=False)
        yield _work(device, shape, dtype, residual=True)


def _work(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, *, residual: bool) -> Work:
    batch, _, width = shape
    op = "add_layer_norm_modulate" if residual else "layer_norm_modulate"

    def make() -> Set:
        images = {name: torch.randn(shape, device=device).to(dtype) for name in ("x", "branch")[: 1 + residual]}
        names = ("scale", "shift", "gate")[: 2 + residual]
        return images | {name: torch.randn(batch, width, device=device).to(dtype) for name in names}

    def run(norm: Callable[..., Any], s: Set, given: bool) -> Tensor:
        if not residual:
            normalised: Tensor = norm(s["x"], s["scale"], s["shift"], _EPS)
            return normalised
        both: tuple[Tensor, Tensor] = norm(s["x"], s["scale"], s["shift"], _EPS, branch=s["branch"], gate=s["gate"])
        return both[0]

    elements = math.prod(shape)
    magnitude = 36.0  # of normalised values up to 6 times scales up to 5, and shifts
    # peers round to the dtype after the norm, the product and the residual, too
    peers = 0.0 if dtype == torch.float32 else 3 * magnitude * UNIT[dtype]
    aten = _add_aten if residual else _aten
    return Work(
        op,
        shape,
        dtype,
        (4 if residual else 2) * elements * dtype.itemsize,
        (10 if residual else 8) * elements,
        make,
        Limit(tolerance(dtype, magnitude, ROUNDINGS["layer_norm_modulate"]) + peers),
        {
            OURS: partial(run, getattr(kernels, op)),
            REFERENCE: partial(run, getattr(reference, op)),
            INDUCTOR: partial(run, torch.compile(aten, fullgraph=True, dynamic=False)),
            ATEN: partial(run, aten),
        },
    )


def _aten(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, (x.shape[2],), eps=eps) * (1 + scale[:, None]) + shift[:, None]


def _add_aten(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, *, branch: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    h = x + gate[:, None] * branch
    return _aten(h, scale, shift, eps), h
