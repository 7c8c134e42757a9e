"""How long the blocks of the bundled model's UNet take, and all of it. ``pytest --benchmark-only tests/bench``

Each block is timed on what it gets in a whole forward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stepfusion.bench.measure import synchronize
from stepfusion.bench.models import load_model
from stepfusion.kernels.backend import interpreting
from stepfusion.networks import UNet2D
from stepfusion.networks import blocks as unet_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BATCHES = (1, 16)


def whole_pass(batch: int, kind: type[nn.Module]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The first module of a kind in the bundled model's UNet, and the arguments that a forward pass gives it."""
    model = load_model("fashion-mnist")
    network = model.network.to(DEVICE, DTYPE).to(memory_format=torch.channels_last)
    found: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # up blocks take skip connections off a list
        found.append((module, tuple(list(a) if isinstance(a, list) else a for a in args), kwargs))

    chosen = next(module for module in network.modules() if isinstance(module, kind))
    handle = chosen.register_forward_pre_hook(record, with_kwargs=True)
    labels = model.labels(batch)
    x = torch.randn(batch, *model.image_shape, device=DEVICE, dtype=DTYPE)
    timesteps = torch.full((batch,), 500, device=DEVICE)
    with torch.no_grad():
        network(x, timesteps, *(() if labels is None else (labels.to(DEVICE),)))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["ResnetBlock", "Attention", "UpBlock", "UNet2D"])
def test_block(benchmark: Any, kind: str, batch: int) -> None:
    cls = UNet2D if kind == "UNet2D" else getattr(unet_blocks, kind)
    module, args, kwargs = whole_pass(batch, cls)

    def call() -> None:
        with torch.no_grad():
            module(*(list(a) if isinstance(a, list) else a for a in args), **kwargs)
        synchronize(DEVICE)

    call()
    benchmark(call)
