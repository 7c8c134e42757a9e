"""`AnnotatedUNet` against the text's equations in float64 on its state dict; that it trains, samples and exports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import stepfusion as sf
from stepfusion.export import export_program
from stepfusion.networks import AnnotatedUNet

TOLERANCE = 1e-4
SMALL: dict[str, Any] = {"n_channels": 16, "ch_mults": (1, 2), "is_attn": (False, True), "n_blocks": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults at a quarter of the width": {"n_channels": 16},
    "32 groups": {"n_channels": 32, "ch_mults": (1, 2, 2), "is_attn": (True, False, True), "n_groups": 32},
    "wider at once, one channel": {**SMALL, "ch_mults": (2, 3), "image_channels": 1},
    "one level, three blocks": {**SMALL, "ch_mults": (1,), "is_attn": (True,), "n_blocks": 3},
}


def make_network(seed: int = 0, **config: Any) -> AnnotatedUNet:
    """Random weights, with norms that are not the identity."""
    torch.manual_seed(seed)
    network = AnnotatedUNet(**config).eval()
    for name, value in network.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(value, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return network


def forward(network: AnnotatedUNet, config: dict[str, Any], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The text's forward pass, from the state dict and the text's own loops, in float64."""
    w = {name: value.double() for name, value in network.state_dict().items()}
    mults = config.get("ch_mults", (1, 2, 2, 4))
    attends, blocks = config.get("is_attn", (False, False, True, True)), config.get("n_blocks", 2)
    groups = config.get("n_groups", 8)

    def swish(h: torch.Tensor) -> torch.Tensor:
        return h / (1 + torch.exp(-h))

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(h: torch.Tensor, name: str, **how: int) -> torch.Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    def norm(h: torch.Tensor, name: str, count: int) -> torch.Tensor:
        parts = h.reshape(len(h), count, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return parts.reshape(h.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    half = config.get("n_channels", 64) // 2
    angles = t.double()[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half).double())
    time = linear(swish(linear(torch.cat((angles.sin(), angles.cos()), 1), "time_emb.lin1")), "time_emb.lin2")

    def residual(h: torch.Tensor, name: str) -> torch.Tensor:
        left = conv(swish(norm(h, f"{name}.norm1", groups)), f"{name}.conv1", padding=1)
        left = left + linear(swish(time), f"{name}.time_emb")[:, :, None, None]
        left = conv(swish(norm(left, f"{name}.norm2", groups)), f"{name}.conv2", padding=1)
        return left + (conv(h, f"{name}.shortcut") if f"{name}.shortcut.weight" in w else h)

    def attention(h: torch.Tensor, name: str) -> torch.Tensor:
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = linear(tokens, f"{name}.projection").tensor_split(3, 2)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(h.shape[1]), 2)
        return (linear(weights @ v, f"{name}.output") + tokens).transpose(1, 2).reshape(h.shape)

    def block(h: torch.Tensor, name: str, attending: bool) -> torch.Tensor:
        h = residual(h, f"{name}.res")
        return attention(h, f"{name}.attn") if attending else h

    h = conv(x.double(), "image_proj", padding=1)
    left, place = [h], 0
    for level in range(len(mults)):
        for _ in range(blocks):
            h = block(h, f"down.{place}", attends[level])
            left.append(h)
            place += 1
        if level + 1 < len(mults):
            h = conv(h, f"down.{place}.conv", stride=2, padding=1)
            left.append(h)
            place += 1
    h = residual(attention(residual(h, "middle.res1"), "middle.attn"), "middle.res2")
    place = 0
    for level in reversed(range(len(mults))):
        for _ in range(blocks + 1):
            h = block(torch.cat((h, left.pop()), 1), f"up.{place}", attends[level])
            place += 1
        if level:
            name = f"up.{place}.conv"
            h = F.conv_transpose2d(h, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
            place += 1
    return conv(swish(norm(h, "norm", 8)), "final", padding=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_equations(variant: str) -> None:
    config = VARIANTS[variant]
    network = make_network(**config)
    x, t = torch.randn(2, config.get("image_channels", 3), 16, 24), torch.tensor([999, 3])
    with torch.no_grad():
        out = network(x, t)
    expected = forward(network, config, x, t)
    assert float((out.double() - expected).abs().max()) <= TOLERANCE
    assert float(expected.std()) > 0.1
    assert float((forward(network, config, x, t.flip(0)) - expected).abs().max()) > 1e-2  # t matters


def test_names_and_sizes_are_the_texts() -> None:
    """Its defaults, with the levels' channels multiplied one after the other: 64, 128, 256, 1024."""
    with torch.device("meta"):
        network = AnnotatedUNet()
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert shapes["time_emb.lin1.weight"] == [256, 64]
    assert shapes["down.9.res.conv1.weight"] == [1024, 256, 3, 3]
    assert shapes["middle.attn.projection.weight"] == [3072, 1024]
    assert shapes["up.2.res.shortcut.weight"] == [256, 1280, 1, 1]
    assert shapes["up.3.conv.weight"] == [256, 256, 4, 4]
    assert shapes["final.weight"] == [3, 64, 3, 3]
    assert network.projection_size == sum(v[0] for k, v in shapes.items() if k.endswith("time_emb.weight"))


def test_it_trains_and_samples() -> None:
    """Flat images of one grey: the loss falls to a part, and samples are of that grey."""
    network = make_network(image_channels=1, dropout=0.0, sample_size=8, **SMALL).train()
    diffusion = sf.GaussianDiffusion(sf.NoiseSchedule.linear(100), prediction="sample")
    weights = list(network.parameters())
    images, losses = torch.full((4, 1, 8, 8), 0.5), []
    for step in range(25):
        identity = {"seeds": torch.full((4,), step), "indices": torch.arange(4)}
        loss = diffusion.training_losses(network, images, torch.randint(0, 100, (4,)), **identity).mean()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, [gradient.sign() for gradient in gradients], alpha=-1e-3)
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    engine = sf.Engine(network, diffusion.schedule, prediction="sample", device="cpu", dtype="float32")
    samples = engine.sample(2, steps=10)
    assert samples.shape == (2, 1, 8, 8)
    assert float((samples - 0.5).abs().mean()) < 0.15


def test_hoisted_time_and_export() -> None:
    network = make_network(sample_size=8, **SMALL)
    engine = sf.Engine(network, sf.NoiseSchedule.linear(), device="cpu")
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([5, 0, 999])
    with torch.no_grad():
        whole = network(x, t)
        torch.testing.assert_close(network.predict(x, network.condition(network.embed_time(t))), whole)
        torch.testing.assert_close(export_program(engine).module()(x, t), whole, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled() -> None:
    network = make_network(sample_size=8, n_channels=16, ch_mults=(1,), is_attn=(True,), n_blocks=1)
    schedule = sf.NoiseSchedule.linear()
    eager = sf.Engine(network, schedule, device="cpu", dtype="float32").sample(2, steps=2)
    compiled = sf.Engine(network, schedule, device="cpu", dtype="float32", network="compile")
    torch.testing.assert_close(compiled.sample(2, steps=2), eager, rtol=0, atol=1e-3)


@pytest.mark.interpreter
def test_fused_norms_give_the_same_network() -> None:
    network = make_network(**{**SMALL, "is_attn": (False, False)})
    fused = sf.networks.prepare_network(network, torch.device("cpu"), torch.float32, fused=True)
    x, t = torch.randn(1, 3, 4, 4), torch.tensor([9])
    with torch.no_grad():
        torch.testing.assert_close(fused(x, t), network(x, t), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_channels": 20}, "n_channels must be a multiple of 8, got 20"),
        ({"n_channels": 8}, "n_channels must be in [16, 16384], got 8"),
        ({"n_groups": 7}, "n_groups must divide n_channels 64, got 7"),
        ({"ch_mults": ()}, "ch_mults must be a sequence of 1 to 16 entries, got ()"),
        ({"ch_mults": "1224"}, "ch_mults must be a sequence of 1 to 16 entries, got '1224'"),
        ({"ch_mults": (1, 2)}, "is_attn must have 2 entries, as ch_mults has, got 4"),
        ({"ch_mults": (1, 2, 2, 0)}, "ch_mults must be in [1, 16384], got 0"),
        ({"ch_mults": (1, 2, 2, 100)}, "ch_mults must keep a level within 16384 channels, got 25600"),
        ({"is_attn": (0, 0, 1, 1)}, "is_attn must be True or False, got 0"),
        ({"n_blocks": 0}, "n_blocks must be in [1, 32], got 0"),
        ({"dropout": 2}, "dropout must be a finite number in [0, 1], got 2"),
        ({"image_channels": True}, "image_channels must be an integer, got True"),
        ({"sample_size": 0}, "sample_size must be in [1, 65536], got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        AnnotatedUNet(**arguments)
    assert str(error.value) == message


def test_bad_inputs() -> None:
    network = make_network(**SMALL)
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    for arguments, message in {
        (x[:, :1], t): "x is float32 [2, 1, 8, 8]; accepted is float32 [B, 3, H, W]",
        (x[:, :, :7], t): "x is float32 [2, 3, 7, 8]; accepted are height and width that are multiples of 2",
        (x, t[:1]): "timesteps is int64 [1]; accepted is int64 [2], as x has",
        (x, t.int()): "timesteps is int32 [2]; accepted is int64, float32 or float64 [B]",
        (x, t, t): "class_labels is given; this network takes none",
    }.items():
        with pytest.raises(ValueError) as error:
            network(*arguments)
        assert str(error.value) == message
