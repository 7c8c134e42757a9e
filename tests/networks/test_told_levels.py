"""Every network takes noise levels between the integers: c_noise of EDM, t of a flow."""

from __future__ import annotations

import pytest
import torch

from stepfusion.execution.evaluator import Evaluator
from stepfusion.networks import (
    ADMUNet,
    ADMUNetConfig,
    AnnotatedUNet,
    ContextUNet,
    DhariwalUNet,
    DhariwalUNetConfig,
    SongUNet,
    SongUNetConfig,
    UNet1D,
)
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion_testing.networks import tiny_unet

NAMES = ("UNet2D", "ADMUNet", "AnnotatedUNet", "ContextUNet", "SongUNet", "DhariwalUNet", "UNet1D")


def make(name: str) -> TimeConditioned:
    """A small network of three channels without labels, or that does without them."""
    torch.manual_seed(0)
    adm = {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1,),
        "attention_resolutions": (),
    }
    edm = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
    return {
        "UNet2D": lambda: tiny_unet(classes=None, channels=3),
        "ADMUNet": lambda: ADMUNet(ADMUNetConfig(**adm)),
        "AnnotatedUNet": lambda: AnnotatedUNet(3, 16, (1,), (False,), 1),
        "ContextUNet": lambda: ContextUNet(3, 8, 2, 8, 1),
        "SongUNet": lambda: SongUNet(SongUNetConfig(8, 3, 3, **edm)),
        "DhariwalUNet": lambda: DhariwalUNet(DhariwalUNetConfig(8, 3, 3, **edm)),
        "UNet1D": lambda: UNet1D(3, down_dims=(8, 16)),
    }[name]().eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_levels_between_the_integers(name: str) -> None:
    network = make(name)
    x = torch.randn(3, 3, 8) if name == "UNet1D" else torch.randn(3, 3, 8, 8)
    whole, between = torch.tensor([7, 250, 999]), torch.tensor([7.25, 250.5, 998.75])
    assert torch.equal(network(x, whole), network(x, whole.float()))
    out = network(x, between)
    assert float((out - network(x, whole)).abs().max()) > 1e-5
    torch.testing.assert_close(out, network(x, between.double()), rtol=0, atol=1e-5)
    evaluator = Evaluator(network, False)
    assert evaluator.hoisted
    torch.testing.assert_close(evaluator.network(x, evaluator.features(between), whole), out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_levels_are_refused(name: str) -> None:
    """bfloat16 has no 250.5, and no 999."""
    network = make(name)
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        given = str(dtype).removeprefix("torch.")
        message = rf"^timesteps is {given} \[2\]; accepted is int64, float32 or float64 \[B\]$"
        with pytest.raises(ValueError, match=message):
            network.embed_time(torch.tensor([1, 2]).to(dtype))
