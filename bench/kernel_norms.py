"""GroupNorm and SiLU at every shape that the published UNets normalise, by everyone who has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import kernels
from stepfusion.bench.kernel_work import ATEN, INDUCTOR, OURS, REFERENCE, Set, Work
from stepfusion.bench.measure import Limit
from stepfusion.bench.models import load_model
from stepfusion.kernels import reference
from stepfusion.kernels.tolerance import UNIT, tolerance

_NORM_BYTES = {"tiny": 1 << 12, "cpu": 4 << 20, "cuda": 128 << 20}  # of the input of a normalisation
_NORM_MODELS = {"tiny": ("tiny",), "cpu": ("cifar10",), "cuda": ("cifar10", "celebahq-256")}
_NORM_EPS = 1e-6


def normalisations(device: torch.device, size: str) -> Iterator[Work]:
    """Every (channels, height, width) that the size's UNets normalise and activate, channels_last."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    seen: dict[tuple[int, int, int, int], None] = {}
    for name in _NORM_MODELS[size]:
        seen |= dict.fromkeys(_normalised(name))
    for groups, channels, height, width in seen:
        batch = max(1, _NORM_BYTES[size] // (channels * height * width * dtype.itemsize))
        yield _group_norm(device, (batch, channels, height, width), groups, dtype)


def _normalised(name: str) -> list[tuple[int, int, int, int]]:
    """(groups, C, H, W) of every GroupNorm of a model, in the order of its layers; nothing is computed."""
    model = load_model(name)
    network = model.network.to("meta")
    found: list[tuple[int, int, int, int]] = []

    def record(module: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(module, nn.GroupNorm)
        found.append((module.num_groups, *out.shape[1:]))

    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(record)
    x = torch.empty(1, *model.image_shape, device="meta")
    network(x, torch.zeros(1, dtype=torch.int64, device="meta"))
    return found


def _group_norm(device: torch.device, shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> Work:
    channels = shape[1]

    def make() -> Set:
        return {
            "x": torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last),
            "weight": torch.randn(channels, device=device).to(dtype),
            "bias": torch.randn(channels, device=device).to(dtype),
        }

    def run(norm: Callable[..., Tensor], s: Set, given: bool) -> Tensor:
        return norm(s["x"], s["weight"], s["bias"], groups, _NORM_EPS)

    def aten(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        return functional.silu(functional.group_norm(x, groups, weight, bias, eps))

    magnitude = 24.0  # of normalised values up to 6 times weights up to 4
    roundings = 2 * math.ceil(math.sqrt(math.prod(shape[1:]) // groups)) + 16
    # peers round to the dtype between norm and activation, too
    allowed = tolerance(dtype, magnitude, roundings) + (0.0 if dtype == torch.float32 else magnitude * UNIT[dtype])
    return Work(
        "group_norm_silu",
        shape,
        dtype,
        2 * math.prod(shape) * dtype.itemsize,
        12 * math.prod(shape),
        make,
        Limit(allowed),
        {
            OURS: partial(run, kernels.group_norm_silu),
            REFERENCE: partial(run, reference.group_norm_silu),
            INDUCTOR: partial(run, torch.compile(aten, fullgraph=True, dynamic=False)),
            ATEN: partial(run, aten),
        },
    )
