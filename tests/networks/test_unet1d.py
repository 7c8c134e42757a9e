"""`UNet1D`: its output against an independent forward in float64, stage by stage; and what it refuses."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import stepfusion as sf
from stepfusion.execution.evaluator import Evaluator
from stepfusion.networks import UNet1D, prepare_network

TOLERANCE = 1e-4  # float32 against float64, max abs; stages reach 10
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """The arguments of a network."""

    channels: int
    context: int
    step: int
    dims: tuple[int, ...]
    kernel: int
    groups: int
    scales: bool

    def make(self, length: int | None = None) -> UNet1D:
        network = UNet1D(
            self.channels,
            self.context or None,
            self.step,
            self.dims,
            self.kernel,
            self.groups,
            cond_predict_scale=self.scales,
            sample_size=length,
        )
        network.load_state_dict(random_state(self), strict=True)
        return network.eval()


CASES = {
    "context that shifts": Architecture(2, 5, 16, (16, 32, 48), 5, 8, False),
    "context that scales": Architecture(7, 3, 8, (8, 24), 3, 4, True),
    "no context": Architecture(1, 0, 12, (16, 16), 3, 8, False),
    "one level": Architecture(3, 2, 8, (8,), 1, 2, True),
}


def blocks(a: Architecture) -> dict[str, tuple[int, int]]:
    """The residual blocks by name, with their channels in and out."""
    n = len(a.dims)
    found = {f"mid_modules.{i}": (a.dims[-1], a.dims[-1]) for i in (0, 1)}
    for i, (above, here) in enumerate(zip((a.channels, *a.dims), a.dims, strict=False)):
        found |= {f"down_modules.{i}.0": (above, here), f"down_modules.{i}.1": (here, here)}
    for i in range(n - 1):
        here, above = a.dims[n - 1 - i], a.dims[n - 2 - i]
        found |= {f"up_modules.{i}.0": (2 * here, above), f"up_modules.{i}.1": (above, above)}
    return found


def shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The names and shapes of diffusion_policy's ConditionalUnet1D."""
    found: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *shape: int, outputs: int | None = None) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, (shape[0] if outputs is None else outputs,)

    affine("diffusion_step_encoder.1", 4 * a.step, a.step)
    affine("diffusion_step_encoder.3", a.step, 4 * a.step)
    for name, (inputs, out) in blocks(a).items():
        affine(f"{name}.blocks.0.block.0", out, inputs, a.kernel)
        affine(f"{name}.blocks.0.block.1", out)
        affine(f"{name}.blocks.1.block.0", out, out, a.kernel)
        affine(f"{name}.blocks.1.block.1", out)
        affine(f"{name}.cond_encoder.1", out * (2 if a.scales else 1), a.step + a.context)
        if inputs != out:
            affine(f"{name}.residual_conv", out, inputs, 1)
    for i, width in enumerate(a.dims[:-1]):
        affine(f"down_modules.{i}.2.conv", width, width, 3)
        affine(f"up_modules.{len(a.dims) - 2 - i}.2.conv", width, width, 4)
    affine("final_conv.0.block.0", a.dims[0], a.dims[0], a.kernel)
    affine("final_conv.0.block.1", a.dims[0])
    affine("final_conv.1", a.channels, a.dims[0], 1)
    return found


def random_state(a: Architecture, seed: int = 0) -> State:
    """Weights under which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(a).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values = values / math.sqrt(math.prod(shape[1:]))
        else:
            values = 0.3 * values + (1 if name.endswith(".weight") else 0)
        state[name] = values
    return state


def forward(state: State, a: Architecture, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> State:
    """What each residual block and resampler returns, and the network under "out", in float64."""
    w, x, seen = {name: value.double() for name, value in state.items()}, x.double(), {}

    def mish(h: torch.Tensor) -> torch.Tensor:
        return h * torch.tanh(torch.log1p(torch.exp(h)))

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(h: torch.Tensor, name: str, groups: int) -> torch.Tensor:
        """Convolution, norm, Mish."""
        h = F.conv1d(h, w[f"{name}.block.0.weight"], w[f"{name}.block.0.bias"], padding=a.kernel // 2)
        grouped = h.reshape(len(h), groups, -1)
        grouped = grouped - grouped.mean(2, keepdim=True)
        h = (grouped / (grouped.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
        return mish(h * w[f"{name}.block.1.weight"][:, None] + w[f"{name}.block.1.bias"][:, None])

    def block(h: torch.Tensor, name: str) -> torch.Tensor:
        left = conv(h, f"{name}.blocks.0", a.groups)
        film = linear(mish(condition), f"{name}.cond_encoder.1")[:, :, None]
        out = left.shape[1]
        left = film[:, :out] * left + film[:, out:] if a.scales else left + film
        left = conv(left, f"{name}.blocks.1", a.groups)
        if f"{name}.residual_conv.weight" in w:
            h = F.conv1d(h, w[f"{name}.residual_conv.weight"], w[f"{name}.residual_conv.bias"])
        seen[name] = left + h
        return seen[name]

    half = a.step // 2
    angles = t.double()[:, None] * torch.exp(torch.arange(half).double() * -math.log(10000) / (half - 1))
    waves = torch.cat((angles.sin(), angles.cos()), 1)
    step = linear(mish(linear(waves, "diffusion_step_encoder.1")), "diffusion_step_encoder.3")
    condition = torch.cat((step, context.double()), 1)
    h, skips, last = x, [], len(a.dims) - 1
    for i in range(last + 1):
        h = block(block(h, f"down_modules.{i}.0"), f"down_modules.{i}.1")
        skips.append(h)
        if i < last:
            name = f"down_modules.{i}.2"
            h = F.conv1d(h, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2, padding=1)
            seen[name] = h
    h = block(block(h, "mid_modules.0"), "mid_modules.1")
    for i in range(last):
        h = block(block(torch.cat((h, skips.pop()), 1), f"up_modules.{i}.0"), f"up_modules.{i}.1")
        name = f"up_modules.{i}.2"
        h = F.conv_transpose1d(h, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2, padding=1)
        seen[name] = h
    h = conv(h, "final_conv.0", 8)
    seen["out"] = F.conv1d(h, w["final_conv.1.weight"], w["final_conv.1.bias"])
    return seen


def inputs(a: Architecture, length: int = 12) -> tuple[torch.Tensor, ...]:
    """x, timesteps, and contexts if the network takes any."""
    torch.manual_seed(1)
    x, t = torch.randn(3, a.channels, length), torch.tensor([0.0, 17.5, 99.0])
    return (x, t, torch.randn(3, a.context)) if a.context else (x, t)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_stage_equals_an_independent_forward(case: str) -> None:
    a = CASES[case]
    network, seen = a.make(), dict[str, torch.Tensor]()
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes(a)
    stages = {*blocks(a), *(f"{way}_modules.{i}.2" for way in ("down", "up") for i in range(len(a.dims) - 1))}
    for name, stage in network.named_modules():
        if name in stages:
            stage.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    x, t, *context = inputs(a)
    seen["out"] = network(x, t, *context)
    expected = forward(random_state(a), a, x, t, context[0] if context else torch.zeros(3, 0))
    assert seen.keys() == expected.keys()
    assert float(expected["out"].std()) > 0.1
    wrong = {name: float((seen[name].double() - value).abs().max()) for name, value in expected.items()}
    assert {name: error for name, error in wrong.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("wrong", ["scales", "waves", "groups"])
@torch.no_grad()
def test_the_comparison_sees_a_wrong_network(wrong: str) -> None:
    a = CASES["context that scales"]
    network = a.make()
    x, t, context = inputs(a)
    for part in network.modules():
        if wrong == "scales" and hasattr(part, "scales"):
            part.scales, part.size = False, part.size // 2
        if wrong == "groups" and isinstance(part, torch.nn.GroupNorm):
            part.num_groups = 2
    out = network(x, t + 1 if wrong == "waves" else t, context)
    expected = forward(random_state(a), a, x, t, context)["out"]
    assert float((out.double() - expected).abs().max()) > 10 * TOLERANCE


@torch.no_grad()
def test_labels_stand_for_contexts() -> None:
    a = CASES["context that shifts"]
    network = a.make()
    x, t, _ = inputs(a)
    vectors = torch.zeros(3, 5)
    vectors[0, 2] = vectors[1, 4] = 1
    assert torch.equal(network(x, t, torch.tensor([2, 4, 5])), network(x, t, vectors))
    assert torch.equal(network(x, t), network(x, t, torch.tensor([5, 5, 5])))
    assert not torch.equal(network(x, t), network(x, t, vectors))
    assert (network.context_size, network.num_classes) == (5, 6)
    assert CASES["no context"].make().num_classes is None


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_time_path_can_be_hoisted(case: str) -> None:
    a = CASES[case]
    network = a.make()
    x, t, *context = inputs(a)
    rows = network.condition(network.embed_time(t), *context)
    order = torch.tensor([2, 0, 1])
    whole = network(x, t, *context)
    torch.testing.assert_close(network.predict(x[order], rows[order]), whole[order], rtol=0, atol=1e-5)
    evaluator = Evaluator(network, bool(context))
    assert evaluator.hoisted
    given = context[0] if context else torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(evaluator.network(x, evaluator.features(t), given), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float64(dtype: torch.dtype) -> None:
    a = CASES["context that shifts"]
    half = prepare_network(a.make(), torch.device("cpu"), dtype, fused=True)
    x, t, context = inputs(a)
    out = half(x.to(dtype), t, context.to(dtype))
    truth = copy.deepcopy(half).double()(x.to(dtype).double(), t, context.to(dtype).double())
    assert out.dtype == dtype
    error = (out.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 8 * torch.finfo(dtype).eps


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    a = CASES["context that scales"]
    network, given = a.make(), inputs(a)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), network(*given), rtol=0, atol=1e-5)


def test_an_engine_samples_sequences() -> None:
    """[C, L] through the engine, with contexts and with labels; a sequence does not depend on its neighbours."""
    a = CASES["context that shifts"]
    engine = sf.Engine(a.make(16), sf.NoiseSchedule.linear(100), null_label=5, device="cpu", dtype="float32")
    assert engine.shape == (2, 16)
    context = torch.randn(3, 5)
    out = engine.sample(3, steps=4, labels=context, progress=False)
    assert out.shape == (3, 2, 16)
    alone = engine.sample(1, steps=4, labels=context[1:2], indices=[1], progress=False)
    torch.testing.assert_close(alone, out[1:2], rtol=0, atol=1e-3)
    guided = engine.sample(2, steps=4, labels=[0, 5], guidance=2.0, progress=False)
    assert guided.shape == (2, 2, 16)
    assert guided.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_dim": 0}, "input_dim must be in [1, 16384], got 0"),
        ({"global_cond_dim": 0}, "global_cond_dim must be in [1, 65536], got 0"),
        ({"diffusion_step_embed_dim": 9}, "diffusion_step_embed_dim must be even, got 9"),
        ({"down_dims": 16}, "down_dims must be a sequence of 1 to 16 entries, got 16"),
        ({"down_dims": (16, 20)}, "down_dims must be multiples of n_groups 8, got 20"),
        ({"down_dims": (12,), "n_groups": 4}, "down_dims must begin with a multiple of 8, got 12"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"cond_predict_scale": 1}, "cond_predict_scale must be True or False, got 1"),
        ({"sample_size": 9}, "sample_size must be a multiple of 2, got 9"),
    ],
)
def test_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        UNet1D(**{"input_dim": 2, "down_dims": (16, 32), **arguments})
    assert str(error.value) == message


def test_refuses_inputs() -> None:
    a = CASES["context that shifts"]
    network, (x, t, context) = a.make(), inputs(a)
    for arguments, message in {
        (x[:, :1], t, context): "x is float32 [3, 1, 12]; accepted is float32 [B, 2, L]",
        (x[:, :, None], t, context): "x is float32 [3, 2, 1, 12]; accepted is float32 [B, 2, L]",
        (x[..., :10], t, context): "x is float32 [3, 2, 10]; accepted are lengths that are multiples of 4",
        (x, t[:1], context): "timesteps is float32 [1]; accepted is float32 [3], as x has",
        (x, t.half(), context): "timesteps is float16 [3]; accepted is int64, float32 or float64 [B]",
        (x, t, context[:, :4]): "labels is float32 [3, 4]; accepted is int64 [3] or float32 [3, 5]",
    }.items():
        with pytest.raises(ValueError) as error:
            network(*arguments)
        assert str(error.value) == message
    with pytest.raises(ValueError, match=r"^labels is given; this network takes none$"):
        CASES["no context"].make()(x[:, :1], t, context)
