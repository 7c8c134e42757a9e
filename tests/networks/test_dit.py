"""`DiT` against diffusers and against the authors' equations; what is hoisted, sampled, exported, and refused."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import stepfusion as sf
from stepfusion import kernels
from stepfusion.bench.launches import Tick, counting
from stepfusion.execution.evaluator import Evaluator
from stepfusion.kernels import reference
from stepfusion.lanes.runner import Runner, RunnerKey
from stepfusion.networks import DiT, DiTConfig, prepare_network
from stepfusion.networks.dit.author_keys import author_config, from_author_keys, is_authors, shares_embeddings
from stepfusion.networks.dit.positions import position_embedding
from stepfusion.networks.meta import Unfilled
from stepfusion_testing.walking import walk

TOLERANCE = 1e-4  # of float32, relative to the largest output
CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "patches of 4, no biases": {"patch_size": 4, "attention_bias": False, "norm_eps": 1e-3},
    "patches of a pixel, one head": {
        "patch_size": 1,
        "num_attention_heads": 1,
        "in_channels": 1,
        "out_channels": None,
    },
}
#: facebook/DiT-XL-2-256, as its config.json says it.
PUBLISHED: dict[str, Any] = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}


@torch.no_grad()
def randomised(network: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter random, for modulations are zero at first and would hide what they multiply."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.normal_(0, 0.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3)
    return network.eval()


def make_network(seed: int = 0, **config: Any) -> DiT:
    network: DiT = randomised(DiT.from_config({**TINY, **config}), seed)
    return network


def make_inputs(network: DiT, batch: int = 3) -> tuple[torch.Tensor, ...]:
    """x, timesteps and labels; the second has the null label."""
    x = torch.randn(batch, network.in_channels, network.sample_size, network.sample_size)
    return x, torch.tensor([999, 0, 417, 80])[:batch], torch.tensor([1, network.null_label, 0, 1])[:batch]


def assert_near(got: torch.Tensor, wanted: torch.Tensor, relative: float = TOLERANCE) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=relative * float(wanted.abs().max()))


# diffusers


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_diffusers(name: str, shared: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = randomised(diffusers.DiTTransformer2DModel(**{**TINY, **VARIANTS[name]}))
    if shared:
        for block in theirs.transformer_blocks:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    assert shares_embeddings(theirs.state_dict()) is shared
    ours = DiT.from_config({**theirs.config, "shared_embeddings": shared}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = make_inputs(ours)
    assert_near(ours(*inputs), theirs(*inputs).sample)
    assert_near(ours(inputs[0].to(memory_format=torch.channels_last), *inputs[1:]), theirs(*inputs).sample)
    assert_near(
        ours(*inputs[:1], inputs[1].double() + 0.25, inputs[2]), theirs(inputs[0], inputs[1] + 0.25, inputs[2]).sample
    )


@pytest.mark.parametrize("shared", [False, True])
def test_the_published_config_has_the_state_dict_of_diffusers(shared: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    known = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size")
    arguments = {key: PUBLISHED[key] for key in (*known, "patch_size", "num_embeds_ada_norm", "attention_bias")}
    with torch.device("meta"), Unfilled():
        ours = DiT.from_config({**PUBLISHED, "shared_embeddings": shared})
        theirs = diffusers.DiTTransformer2DModel(**arguments)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == shapes
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert ours.config.parameter_count == count
    if not shared:
        assert count == sum(parameter.numel() for parameter in theirs.parameters())
    else:
        assert (
            count == 674_834_720
        )  # the 675M of the paper's table 4, of which its position embedding is no parameter


def test_a_network_from_the_meta_device_has_its_positions() -> None:
    """They are in no state dict."""
    want = make_network()
    with torch.device("meta"), Unfilled():
        network = DiT(want.config).eval()
    network.load_state_dict(want.state_dict(), strict=True, assign=True)
    inputs = make_inputs(want)
    assert torch.equal(network(*inputs), want(*inputs))


# The authors


def author_names(config: DiTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict as the authors' code saves it."""
    torch.manual_seed(seed)
    d, p = config.width, config.patch_size
    layers = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    layers |= {
        "x_embedder.proj": (d, config.in_channels, p, p),
        "final_layer.linear": (p * p * config.output_channels, d),
    }
    for i in range(config.num_layers):
        layers |= {f"blocks.{i}.attn.qkv": (3 * d, d), f"blocks.{i}.attn.proj": (d, d)}
        layers |= {f"blocks.{i}.mlp.fc1": (4 * d, d), f"blocks.{i}.mlp.fc2": (d, 4 * d)}
        layers[f"blocks.{i}.adaLN_modulation.1"] = (6 * d, d)
    state = {"y_embedder.embedding_table.weight": torch.randn(config.num_embeds_ada_norm + 1, d)}
    for name, shape in layers.items():
        state[f"{name}.weight"] = torch.randn(shape) * 0.5 / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.3
    return state | {"pos_embed": position_embedding(config.grid, d)}


def authors(
    state: dict[str, torch.Tensor], heads: int, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The paper's equations on the authors' state dict, in float64: [B, C', S, S]."""
    w = {name: value.double() for name, value in state.items()}
    batch, _, size, _ = x.shape
    width, _, p, _ = w["x_embedder.proj.weight"].shape

    def linear(h: torch.Tensor, name: str) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", h, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def silu(h: torch.Tensor) -> torch.Tensor:
        return h / (1 + torch.exp(-h))

    def modulated(h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        centred = h - h.mean(2, keepdim=True)
        normed = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    def attention(h: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = linear(h, f"{name}.qkv").reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(width // heads)).softmax(3)
        return linear(torch.einsum("bhnm,bhmd->bnhd", weights, v).flatten(2), f"{name}.proj")

    def mlp(h: torch.Tensor, name: str) -> torch.Tensor:
        h = linear(h, f"{name}.fc1")
        h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return linear(h, f"{name}.fc2")

    angles = t.double()[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128).double())
    c = linear(silu(linear(torch.cat((angles.cos(), angles.sin()), 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = silu(c + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).mT
    h = h + w["pos_embed"]
    for i in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        parts = linear(c, f"blocks.{i}.adaLN_modulation.1").chunk(6, dim=1)
        h = h + parts[2][:, None] * attention(modulated(h, *parts[:2]), f"blocks.{i}.attn")
        h = h + parts[5][:, None] * mlp(modulated(h, *parts[3:5]), f"blocks.{i}.mlp")
    h = linear(modulated(h, *linear(c, "final_layer.adaLN_modulation.1").chunk(2, dim=1)), "final_layer.linear")
    pixels = h.reshape(batch, size // p, size // p, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(batch, -1, size, size)


@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_the_authors_checkpoints_are_converted(learned: bool) -> None:
    given = author_names(DiTConfig(**{**TINY, "out_channels": 6 if learned else None}))
    assert is_authors(given)
    config = author_config(given, num_heads=2)
    assert (config.freq_shift, config.norm_eps, config.shared_embeddings) == (0, 1e-6, True)
    assert (config.sample_size, config.num_layers, config.output_channels) == (8, 3, 6 if learned else 3)
    network = DiT(config).eval()
    state = from_author_keys(given)
    network.load_state_dict(state, strict=True)
    inputs = make_inputs(network)
    assert_near(network(*inputs), authors(given, 2, *inputs))
    assert not is_authors(state)
    assert shares_embeddings(state)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in given.values()}
    assert all(tensor.untyped_storage().data_ptr() in addresses for tensor in state.values())
    rounded = DiT.from_config({**network.to_config(), "freq_shift": 1}).eval()
    rounded.load_state_dict(state)
    with pytest.raises(AssertionError):  # the control: the frequencies of diffusers are others
        assert_near(rounded(*inputs), authors(given, 2, *inputs))


def test_the_papers_models_have_known_heads() -> None:
    with torch.device("meta"), Unfilled():
        config = DiTConfig(num_layers=1, num_attention_heads=6, attention_head_dim=64)
        state = {name: tensor.to("meta") for name, tensor in author_names(config).items()}
        assert author_config(state).num_attention_heads == 6
        assert from_author_keys(state).keys() == DiT(config).state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "the DiT state dict lacks blocks.1.mlp.fc2.bias"),
        (lambda s: s.update(more=s["pos_embed"]), "the DiT state dict has the unknown name 'more'"),
        (lambda s: s.update(pos_embed=s["pos_embed"] + 0.1), "pos_embed is not the sine-cosine embedding"),
        (lambda s: s.update({"blocks.0.attn.qkv.bias": torch.zeros(50)}), "blocks.0.attn.qkv.bias is of shape [50]"),
        (dict.clear, "the DiT state dict has no blocks"),
    ],
)
def test_refuses_other_state_dicts(change: Any, message: str) -> None:
    state = author_names(DiTConfig(**TINY))
    change(state)
    with pytest.raises(sf.CheckpointError) as caught:
        from_author_keys(state)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        ({}, None, "the width of the network is 16; without num_heads, accepted are [384, 768, 1024, 1152]"),
        ({}, 3, "num_heads is 3; accepted is a divisor of 16, the width"),
        ({"pos_embed": torch.zeros(1, 15, 16)}, 2, "pos_embed has 15 tokens; accepted is a square of an integer"),
        ({"final_layer.linear.weight": torch.zeros(22, 16)}, 2, "final_layer.linear.weight has 22 rows"),
        ({"x_embedder.proj.weight": torch.zeros(16, 3)}, 2, "x_embedder.proj.weight is of shape [16, 3]"),
    ],
)
def test_refuses_shapes_that_no_config_has(change: dict[str, Any], heads: int | None, message: str) -> None:
    with pytest.raises(sf.CheckpointError) as caught:
        author_config(author_names(DiTConfig(**TINY)) | change, heads)
    assert str(caught.value).startswith(message)


# What is hoisted, and fused


class Products(TorchDispatchMode):
    """Notes the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            self.rows.append(out.numel() // out.shape[-1])
        return out


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_modulations_are_hoisted(shared: bool) -> None:
    """Rows of products: 3 images have 3 of conditions, and 48 of tokens."""
    network = make_network(shared_embeddings=shared)
    x, timesteps, labels = make_inputs(network)
    table = network.embed_time(torch.arange(0, 1000, 50))
    assert table.shape == (20, 16 if shared else 48)
    rows = torch.tensor([19, 0, 3])
    with Products() as of_condition:
        projections = network.condition(table[rows], labels)
    with Products() as of_prediction:
        out = network.predict(x, projections)
    assert of_condition.rows == [3] * 4
    assert of_prediction.rows == [48] * (1 + 3 * 6 + 1)
    assert projections.shape == (3, network.projection_size) == (3, 3 * 6 * 16 + 2 * 16)
    assert_near(out, network(x, 50 * rows, labels))
    evaluator = Evaluator(network, labelled=True)
    assert evaluator.hoisted
    assert_near(evaluator.network(x, evaluator.features(timesteps), labels), network(x, timesteps, labels))
    fused = prepare_network(network, CPU, torch.float32, fused=True)
    with Products() as of_condition:
        assert_near(fused.condition(table[rows], labels), projections)
    assert len(of_condition.rows) == (1 if shared else 2)


@pytest.fixture
def in_eager_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own; here their twins do, which are quick."""
    for name in ("layer_norm_modulate", "add_layer_norm_modulate"):
        monkeypatch.setattr(kernels, name, getattr(reference, name))


@pytest.mark.usefixtures("in_eager_pytorch")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_fused_network_gives_the_same_output(name: str, shared: bool) -> None:
    network = make_network(**VARIANTS[name], shared_embeddings=shared)
    plain = prepare_network(network, CPU, torch.float64, fused=False)
    fused = prepare_network(network, CPU, torch.float64, fused=True)
    assert fused.defers
    x, *others = make_inputs(network)
    for _ in range(2):  # what is folded, and what was kept
        assert_near(fused(x.double(), *others), plain(x.double(), *others), 1e-12)
    assert fused.state_dict().keys() == network.state_dict().keys()
    seen: list[object] = []
    fused.transformer_blocks[1].norm3.register_forward_hook(lambda *given: seen.append(given))
    assert_near(fused(x.double(), *others), plain(x.double(), *others), 1e-12)
    assert len(seen) == 1  # a hook sees what it watches


@pytest.mark.interpreter
@torch.no_grad()
def test_a_fused_network_runs_by_the_kernels() -> None:
    network = make_network()
    inputs = make_inputs(network)
    assert_near(prepare_network(network, CPU, torch.float32, fused=True)(*inputs), network(*inputs))


@torch.no_grad()
def test_a_fused_tick_has_few_launches() -> None:
    """Products: of the patches, the modulations, four a block, and the last; norms: two a block, and the last."""
    meta = torch.device("meta")
    network = prepare_network(make_network(shared_embeddings=True), meta, torch.bfloat16, fused=True)
    key = RunnerKey(2, (3, 8, 8), meta, torch.bfloat16, null_label=network.null_label)
    runner = Runner(Evaluator(network, labelled=True), key, kernels)
    runner.load(sf.ddim(sf.NoiseSchedule.linear(1000), 10))
    with counting(Tick()):
        runner.tick()  # what is done once is done before
    tick = Tick()
    with counting(tick):
        runner.tick()
    count = {kind: number for kind, (number, _) in tick.kinds().items()}
    assert (count["matrix product"], count["norm"], count["attention"]) == (3 + 4 * 3, 1 + 2 * 3, 3)
    assert count["elementwise"] <= 3 + 6  # an activation a block, and what makes conditions and the two halves


def test_gradients_reach_every_parameter() -> None:
    network = prepare_network(make_network(), CPU, torch.float32, fused=True)
    network(*make_inputs(network)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_a_new_network_returns_zeros() -> None:
    """Modulations and output are zero at first (Peebles & Xie 2023, section 3.2)."""
    network = DiT(DiTConfig(**TINY))
    inputs = make_inputs(network)
    assert not network(*inputs).any()
    assert not network.condition(network.embed_time(inputs[1]), inputs[2]).any()


@torch.no_grad()
def test_half_precision_stays_near() -> None:
    network = make_network()
    inputs = make_inputs(network)
    half = copy.deepcopy(network).bfloat16()
    out = half(inputs[0].bfloat16(), *inputs[1:])
    assert out.dtype == torch.bfloat16
    assert_near(out, network(*inputs), 0.05)


# Engines


@pytest.mark.parametrize(("sampler", "learned"), [("ddpm", True), ("ddim", False)])
@torch.no_grad()
def test_an_engine_samples_with_labels_and_guidance(sampler: str, learned: bool) -> None:
    """The engine's images are the sampler's table walked with the network called by hand."""
    network = make_network()
    schedule = sf.NoiseSchedule.linear(1000)
    options = {"num_classes": network.num_classes, "null_label": network.null_label, "shape": (3, 8, 8)}
    engine = sf.Engine(network, schedule, **options, device="cpu", dtype="float32")
    how: dict[str, Any] = {"variance": "learned_range"} if learned else {"eta": 0.5}
    table = engine.table(sampler, timesteps=[900, 500, 100, 0], **how)
    assert table.learned_variance is learned
    labels, start = torch.tensor([2, 5, 0]), torch.randn(3, 3, 8, 8)
    noise = torch.randn(4, 3, 3, 8, 8)

    def predicted(x: torch.Tensor, t: int) -> torch.Tensor:
        told = torch.full((len(x),), t)
        out, none = network(x, told, labels), network(x, told, torch.full_like(labels, 5))
        guided = torch.lerp(none[:, :3], out[:, :3], 1.5)
        return torch.cat((guided, out[:, 3:]), dim=1) if learned else guided

    images = engine.sample(table=table, labels=labels.tolist(), start=start, noise=noise, guidance=1.5)
    assert_near(images, walk(table, predicted, start, noise), 1e-3)
    other = engine.sample(table=table, labels=[3, 3, 3], start=start, noise=noise, guidance=1.5)
    assert float((images - other).abs().max()) > 0.01


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    network = make_network()
    engine = sf.Engine(
        network,
        sf.NoiseSchedule.linear(1000),
        null_label=network.null_label,
        device="cpu",
        dtype="float32",
        batch=4,
        invariant=True,
    )
    together = engine.sample(4, steps=3, seed=7, labels=[1, 2, 3, 4], guidance=2.0)
    alone = engine.sample(steps=3, seed=7, indices=[2], labels=3, guidance=2.0)
    beside = engine.sample(steps=3, seed=7, indices=[9, 2], labels=[0, 3], guidance=2.0)
    assert torch.equal(alone[0], together[2])
    assert torch.equal(beside[1], together[2])


def test_a_velocity_network_walks_the_flow_path() -> None:
    """SiT (Ma et al. 2024): the same network with as many channels out as in, on straight paths."""
    network = make_network(out_channels=None, freq_shift=0)
    engine = sf.Engine(network, sf.FlowPath(), null_label=network.null_label, device="cpu", dtype="float32")
    assert (engine.prediction, engine.num_classes) == ("flow", 6)
    start = torch.randn(2, 3, 8, 8)
    table = engine.table("euler", 4)
    images = engine.sample(table=table, start=start, labels=[1, 4])
    x, times = start, [1.0, 0.75, 0.5, 0.25, 0.0]
    with torch.no_grad():
        for t, after in itertools.pairwise(times):
            x = x + (after - t) * network(x, torch.full((2,), t), torch.tensor([1, 4]))
    assert_near(images, x, 1e-3)


@torch.no_grad()
def test_exports_with_a_dynamic_batch() -> None:
    network = make_network()
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here depends on its version
        program = torch.export.export(network, make_inputs(network), dynamic_shapes=({0: batch},) * 3)
    inputs = make_inputs(network, batch=4)
    assert_near(program.module()(*inputs), network(*inputs))


# What it refuses

X, T = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X[0], T, T), "x is float32 [3, 8, 8]; accepted is float32 [B, 3, 8, 8]"),
        ((X[..., :4], T, T), "x is float32 [2, 3, 8, 4]; accepted is float32 [B, 3, 8, 8]"),
        ((X.double(), T, T), "x is float64 [2, 3, 8, 8]; accepted is float32 [B, 3, 8, 8]"),
        ((X, T.half(), T), "timesteps is float16 [2]; accepted is int64, float32 or float64 [B]"),
        ((X, T[:1], T), "timesteps is int64 [1]; accepted is int64 [2], as x has"),
        ((X, T), "class_labels is None; this network is conditioned on a class and needs them"),
        ((X, T, T[:1]), "class_labels is int64 [1]; accepted is int64 [2], as timesteps has"),
    ],
)
def test_refuses_inputs_that_do_not_fit(inputs: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        DiT(DiTConfig(**TINY))(*inputs)
    assert str(caught.value) == message


def test_refuses_hoisted_inputs_that_do_not_fit() -> None:
    network = DiT(DiTConfig(**TINY))
    for call, message in (
        (lambda: network.condition(torch.zeros(2, 16), T), "time is float32 [2, 16]; accepted is float32 [B, 48]"),
        (
            lambda: network.condition(torch.zeros(2, 48)),
            "class_labels is None; this network is conditioned on a class",
        ),
        (lambda: network.predict(X, torch.zeros(2, 319)), "projections is float32 [2, 319]; accepted is [2, 320]"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_a_config_comes_back() -> None:
    for changed in ({}, {"shared_embeddings": True, "freq_shift": 0}, {"dropout": 0.1, "out_channels": None}):
        config = DiTConfig.from_dict({**TINY, **changed})
        assert DiTConfig.from_dict(config.to_dict()) == config
    assert not {"shared_embeddings", "freq_shift"} & DiTConfig(**TINY).to_dict().keys()
    assert DiTConfig.from_dict({**PUBLISHED, "cross_attention_dim": None}).width == 1152


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "activation_fn",
            "geglu",
            "activation_fn = 'geglu'; accepted is 'gelu-approximate' (nothing else is implemented)",
        ),
        ("norm_type", "layer_norm", "norm_type = 'layer_norm'; accepted is 'ada_norm_zero' (nothing else"),
        ("norm_elementwise_affine", True, "norm_elementwise_affine = True; accepted is false (nothing else"),
        ("norm_elementwise_affine", 0, "norm_elementwise_affine = 0; accepted is false (nothing else"),
        ("upcast_attention", True, "upcast_attention = True; accepted is false (nothing else"),
        ("cross_attention_dim", 768, "cross_attention_dim = 768; accepted is null (nothing else"),
        ("_class_name", "UNet2DModel", "_class_name = 'UNet2DModel'; accepted is 'DiTTransformer2DModel' or"),
        ("sample_size", 9, "sample_size = 9; accepted is a multiple of 2, the patch_size"),
        ("attention_head_dim", 5, "attention_head_dim = 5; accepted is a number whose product with"),
        ("attention_head_dim", 16000, "attention_head_dim = 16000; accepted is a number whose product with"),
    ],
)
def test_refuses_values_that_it_does_not_implement(key: str, value: object, message: str) -> None:
    with pytest.raises(sf.CheckpointError) as caught:
        DiT.from_config({**TINY, key: value})
    assert str(caught.value).startswith(f"the DiT config has {message}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY, "depth": 3}, "the DiT config has the unknown key 'depth'; accepted are activation_fn, "),
        ({**TINY, "num_layers": 0}, "the DiT config is refused: num_layers must be in [1, 1024], got 0"),
        ({**TINY, "num_embeds_ada_norm": None}, "the DiT config is refused: num_embeds_ada_norm must be an integer"),
        ({**TINY, "freq_shift": 2}, "the DiT config is refused: freq_shift must be in [0, 1], got 2"),
        ({"num_layers": 1024, "attention_head_dim": 1024}, "the DiT config describes "),
        ([], "a DiT config is []; accepted is a JSON object"),
        ({"_class_name": "Transformer2DModel"}, "the DiT config lacks attention_head_dim, which is needed with"),
    ],
)
def test_refuses_other_configs(config: Any, message: str) -> None:
    with pytest.raises(sf.CheckpointError) as caught:
        DiT.from_config(config)
    assert str(caught.value).startswith(message)
