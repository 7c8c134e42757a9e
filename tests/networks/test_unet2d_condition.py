"""`UNet2DCondition` against diffusers' ``UNet2DConditionModel``: same weights, same output; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepfusion import kernels
from stepfusion.errors import CheckpointError
from stepfusion.kernels import reference
from stepfusion.networks import UNet2DCondition, UNet2DConditionConfig, prepare_network
from stepfusion.networks.attention import attend
from stepfusion.networks.meta import Unfilled
from stepfusion.networks.unet2d_condition import transformer
from stepfusion_testing.twins import NETWORK_OPS

pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel

TOLERANCE = 1e-5  # float32, max abs; outputs are of order 1
CPU = torch.device("cpu")

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
XL: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 68,
    "upcast_attention": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "stable diffusion 1": {},
    "stable diffusion 2": {
        "use_linear_projection": True,
        "attention_head_dim": [2, 4],
        "upcast_attention": True,
        "layers_per_block": 2,
    },
    "sdxl": XL,
    "inpainting": {"in_channels": 9},
    "upscaler": {
        "in_channels": 7,
        "num_class_embeds": 11,
        "only_cross_attention": [True, False],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    },
    "three levels": {
        "block_out_channels": [32, 48, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": [1, 2, 1],
        "sample_size": [8, 12],
    },
    "class timestep": {"class_embed_type": "timestep", "num_class_embeds": 11, "mid_block_scale_factor": 1.5},
    "no middle": {"mid_block_type": None, "downsample_padding": 0, "norm_eps": 1e-3},
    "another sinusoid": {"freq_shift": 1, "flip_sin_to_cos": False, "time_embedding_dim": 24, "act_fn": "swish"},
}
ARGUMENTS: dict[str, dict[str, int]] = {
    "inpainting": {"concatenated_channels": 5},
    "upscaler": {"concatenated_channels": 3},
    "sdxl": {"num_time_ids": 6, "sequence_length": 9},
    "three levels": {"sequence_length": 20},
}

STABLE_DIFFUSION_1 = {"sample_size": 64, "cross_attention_dim": 768}
STABLE_DIFFUSION_2 = {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_REFINER = {
    **SDXL,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
}
#: Configs, numbers of parameters, and the shapes of what else than a text the networks are conditioned on.
PUBLISHED: dict[str, tuple[dict[str, Any], int, list[tuple[int, ...]]]] = {
    "stable diffusion 1.5": (STABLE_DIFFUSION_1, 859_520_964, []),
    "stable diffusion 1.5 inpainting": ({**STABLE_DIFFUSION_1, "in_channels": 9}, 859_535_364, []),
    "stable diffusion 2.1": (STABLE_DIFFUSION_2, 865_910_724, []),
    "stable diffusion x4 upscaler": (UPSCALER, 473_398_020, []),
    "sdxl": (SDXL, 2_567_463_684, [(1280,), (6,)]),
    "sdxl refiner": (SDXL_REFINER, 2_259_526_660, [(1280,), (5,)]),
}


def make_twins(name: str, **changes: Any) -> tuple[UNet2DConditionModel, UNet2DCondition]:
    """Both networks with the same random weights, loaded strictly; no bias is zero, no norm's weight one."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**{**SMALL, **VARIANTS[name], **changes}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours = UNet2DCondition.from_config(dict(theirs.config), **ARGUMENTS.get(name, {})).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_inputs(network: UNet2DCondition, batch: int = 3) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """x, timesteps and, if the network takes them, labels; and its conditions. Nothing is the same in two images."""
    dtype = network.conv_in.weight.dtype
    size = network.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.randn(batch, network.image_channels, height, width, dtype=dtype)
    labels = (torch.tensor([10, 0, 3])[:batch],) if network.num_classes else ()
    conditions = {
        spec.name: torch.randn(batch, *spec.shape, dtype=dtype) * (300 if spec.name == "time_ids" else 1)
        for spec in network.conditions
    }
    return (x, torch.tensor([999, 0, 417])[:batch], *labels), conditions


def run_theirs(theirs: UNet2DConditionModel, given: tuple[Tensor, ...], conditions: dict[str, Tensor]) -> Tensor:
    """What diffusers' network makes of our network's inputs."""
    x = torch.cat([given[0], conditions["concatenated"]], dim=1) if "concatenated" in conditions else given[0]
    added = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
    options: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
    out: Tensor = theirs(x, given[1], conditions["encoder_hidden_states"], *given[2:], **options).sample
    return out


@torch.no_grad()
def difference(theirs: UNet2DConditionModel, ours: UNet2DCondition) -> float:
    """The largest absolute difference, after checking that there is something to compare."""
    given, conditions = make_inputs(ours)
    expected, out = run_theirs(theirs, given, conditions), ours(*given, **conditions)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert expected.std() > 0.05
    return float((out - expected).abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name: str) -> None:
    theirs, ours = make_twins(name)
    assert difference(theirs, ours) <= TOLERANCE
    assert sum(p.numel() for p in ours.parameters()) == ours.config.parameter_count
    assert difference(theirs, ours.to(memory_format=torch.channels_last)) <= TOLERANCE


def test_equals_diffusers_in_float64() -> None:
    theirs, ours = make_twins("sdxl")
    assert difference(theirs.double(), ours.double()) <= 1e-12


@pytest.mark.parametrize("name", ["stable diffusion 1", "sdxl"])
@torch.no_grad()
def test_in_bfloat16_it_is_as_near_to_float64_as_diffusers(name: str) -> None:
    theirs, ours = make_twins(name)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    given, conditions = make_inputs(ours)
    outs = ours(*given, **conditions), run_theirs(theirs, given, conditions)
    wide = {key: value.double() for key, value in conditions.items()}
    exact = run_theirs(theirs.double(), (given[0].double(), *given[1:]), wide)
    errors = [float((out.double() - exact).square().mean().sqrt()) for out in outs]
    assert 0 < errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("change", ["text", "weight", "heads", "sinusoid", "columns", "sizes"])
def test_the_comparison_sees_a_wrong_network(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = make_twins("sdxl")
    layer = ours.down_blocks[1].attentions[0].transformer_blocks[1].attn2
    if change in ("text", "sizes"):
        name = {"text": "encoder_hidden_states", "sizes": "time_ids"}[change]
        prepare = ours.prepare
        monkeypatch.setattr(ours, "prepare", lambda given: prepare({**given, name: 0.9 * given[name]}))
    elif change == "weight":
        with torch.no_grad():
            layer.to_k.weight[0] += 1
    elif change == "heads":
        layer.heads = 2
    elif change == "sinusoid":
        object.__setattr__(ours.config, "flip_sin_to_cos", False)
    else:
        layer.keys_start -= 1
    assert difference(theirs, ours) > 10 * TOLERANCE


@contextmanager
def products() -> Iterator[list[tuple[torch.Size, ...]]]:
    """The shapes of the factors of every matrix product that is computed meanwhile, convolutions not counted."""
    seen: list[tuple[torch.Size, ...]] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
                seen.append(tuple(arg.shape for arg in args if isinstance(arg, Tensor)))
            return func(*args, **(kwargs or {}))

    with Mode():
        yield seen


def check_hoisting(theirs: UNet2DConditionModel, ours: UNet2DCondition) -> int:
    """Run both, and hold it that ours computes nothing of text and time with an image; products that it saves."""
    given, conditions = make_inputs(ours, batch=2)  # no other size is that of a text's channels
    text = ours.config.cross_attention_dim
    with products() as of_theirs:
        run_theirs(theirs, given, conditions)
    with products() as of_conditions:
        prepared = ours.prepare(conditions)
    with products() as of_time:
        projections = ours.condition(ours.embed_time(given[1]), *given[2:] or (None,), *prepared)
    with products() as of_image:
        ours.predict(given[0], projections, *prepared)
    assert sum(text in shape for shapes in of_theirs for shape in shapes) > 0
    assert not any(text in shape for shapes in of_image for shape in shapes)
    assert len(of_image) + len(of_time) + len(of_conditions) == len(of_theirs)
    attentions = sum(name.endswith("attn2.to_q.weight") for name in ours.state_dict())
    assert len(of_conditions) == 2 * attentions + (2 if ours.add_embedding is not None else 0)
    return len(of_theirs) - len(of_image)


@pytest.mark.parametrize("name", ["stable diffusion 1", "stable diffusion 2", "sdxl"])
@torch.no_grad()
def test_nothing_of_text_and_time_is_computed_with_an_image(name: str) -> None:
    check_hoisting(*make_twins(name))


@torch.no_grad()
def test_keys_and_values_are_read_where_they_were_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention to a text gets columns of the one tensor, each column once, and no copies."""
    _, ours = make_twins("upscaler")
    given, conditions = make_inputs(ours)
    prepared = ours.prepare(conditions)
    columns: list[int] = []

    def note(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        for part in (k, v):
            if part.untyped_storage().data_ptr() == prepared[0].untyped_storage().data_ptr():
                columns.extend(range(part.storage_offset(), part.storage_offset() + part.shape[2]))
        return attend(q, k, v, heads)

    monkeypatch.setattr(transformer, "attend", note)
    ours.predict(given[0], ours.condition(ours.embed_time(given[1]), *given[2:], *prepared), *prepared)
    assert sorted(columns) == list(range(ours.keys_size))


@contextmanager
def on_meta() -> Iterator[None]:
    with torch.device("meta"), Unfilled(), torch.no_grad():
        yield


def test_stable_diffusion_computes_56_products_fewer_in_a_step() -> None:
    """32 of keys and values, 22 of the time with a residual block each, and 2 of the time."""
    with on_meta():
        theirs, ours = UNet2DConditionModel(**STABLE_DIFFUSION_1), UNet2DCondition.from_config(STABLE_DIFFUSION_1)
        assert check_hoisting(theirs, ours) == 56
    assert ours.keys_size == 24_960


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_the_keys_and_shapes_of_diffusers(name: str) -> None:
    config, count, others = PUBLISHED[name]
    with on_meta():
        theirs, ours = UNet2DConditionModel(**config), UNet2DCondition.from_config(config)
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert ours.config.parameter_count == sum(shape.numel() for shape in shapes[0].values()) == count
    text, *more = (spec.shape for spec in ours.conditions)
    assert text == (77, config["cross_attention_dim"])
    assert more == others
    assert ours.projects_conditions == bool(others or ours.num_classes)
    if name == "sdxl":  # what a step does without: keys and values, the time of residual blocks, and embeddings
        names = list(shapes[0])
        attentions = sum(key.endswith("attn2.to_q.weight") for key in names)
        assert 2 * attentions + sum(key.endswith("time_emb_proj.weight") for key in names) + 2 + 2 == 161


@torch.no_grad()
def test_what_is_concatenated_is_a_condition() -> None:
    _, ours = make_twins("inpainting")
    assert (ours.in_channels, ours.image_channels) == (9, 4)
    assert ours.conditions[-1].shape == (5, 8, 8)
    assert not ours.projects_conditions


@pytest.mark.parametrize("name", ["inpainting", "sdxl", "upscaler"])
@torch.no_grad()
def test_the_parts_make_the_whole(name: str) -> None:
    _, ours = make_twins(name)
    given, conditions = make_inputs(ours)
    prepared = ours.prepare(ours.checked(conditions, 3))
    projections = ours.condition(ours.embed_time(given[1]), *given[2:] or (None,), *prepared)
    assert projections.shape == (3, ours.projection_size)
    assert prepared[0].shape == (3, ours.sequence_length, ours.keys_size)
    assert torch.equal(ours.predict(given[0], projections, *prepared), ours(*given, **conditions))
    if not ours.projects_conditions:
        assert torch.equal(projections, ours.condition(ours.embed_time(given[1])))


@pytest.mark.parametrize("name", ["inpainting", "sdxl", "upscaler"])
@torch.no_grad()
def test_an_image_has_the_same_bits_beside_other_images(name: str) -> None:
    _, ours = make_twins(name)
    given, conditions = make_inputs(ours)
    others, other_conditions = make_inputs(ours)
    for mine, other in zip((given[0], *conditions.values()), (others[0], *other_conditions.values()), strict=True):
        other[1] = mine[1]
    others[1][[0, 2]] = 77
    first, second = ours(*given, **conditions), ours(*others, **other_conditions)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


@torch.no_grad()
def test_every_condition_matters() -> None:
    for name in ("sdxl", "inpainting"):
        _, ours = make_twins(name)
        given, conditions = make_inputs(ours)
        out = ours(*given, **conditions)
        for key in conditions:
            assert not torch.allclose(ours(*given, **{**conditions, key: 0.5 * conditions[key]}), out)


@pytest.mark.parametrize("name", ["sdxl", "upscaler"])
def test_trains_like_diffusers(name: str) -> None:
    """Same gradients; every parameter gets one."""
    theirs, ours = make_twins(name)
    given, conditions = make_inputs(ours)
    run_theirs(theirs, given, conditions).square().mean().backward()
    ours(*given, **conditions).square().mean().backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=TOLERANCE)


# As a GPU runs it


@pytest.fixture
def in_eager_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own; here their twins do, which are quick."""
    for name in NETWORK_OPS:
        monkeypatch.setattr(kernels, name, getattr(reference, name))


@pytest.mark.parametrize(
    "name", ["stable diffusion 1", "stable diffusion 2", "sdxl", "upscaler", "three levels", "no middle"]
)
@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_a_fused_network_gives_the_same_output(name: str) -> None:
    _, network = make_twins(name)
    plain = prepare_network(network, CPU, torch.float64, fused=False)
    fused = prepare_network(network, CPU, torch.float64, fused=True)
    assert fused.defers
    assert not plain.defers
    given, conditions = make_inputs(plain)
    wanted = plain(*given, **conditions)
    for _ in range(2):  # what is folded, and what was kept
        torch.testing.assert_close(fused(*given, **conditions), wanted, rtol=0, atol=1e-6)
    assert fused.state_dict().keys() == network.state_dict().keys()


@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_hooks_see_tensors() -> None:
    _, network = make_twins("sdxl")
    fused = prepare_network(network, CPU, torch.float32, fused=True)
    given, conditions = make_inputs(network)
    wanted = fused(*given, **conditions)
    names = [f"down_blocks.1.attentions.0.{name}" for name in ("proj_in", "transformer_blocks.0.attn2.to_k", "norm")]
    seen: list[str] = []
    handles = []
    for name in names:

        def hook(module: nn.Module, inputs: Any, out: Any, name: str = name) -> None:
            assert isinstance(out, Tensor)
            seen.append(name)

        handles.append(fused.get_submodule(name).register_forward_hook(hook))
    assert not fused.defers
    torch.testing.assert_close(fused(*given, **conditions), wanted, rtol=0, atol=TOLERANCE)
    assert sorted(seen) == sorted(names)
    for handle in handles:
        handle.remove()
    assert fused.defers


@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_fused_half_precision_is_as_near_to_float64_as_pytorchs_operators() -> None:
    network = make_twins("sdxl")[1].bfloat16()
    given, conditions = make_inputs(network)
    exact = prepare_network(network, CPU, torch.float64, fused=False)
    wanted = exact(given[0].double(), given[1], **{key: value.double() for key, value in conditions.items()})
    errors = []
    for fused in (False, True):
        out = prepare_network(network, CPU, torch.bfloat16, fused=fused)(*given, **conditions)
        errors.append(float((out.double() - wanted).square().mean().sqrt()))
    assert 0 < errors[1] <= 1.1 * errors[0]


@pytest.mark.usefixtures("in_eager_pytorch")
def test_gradients_of_a_fused_network_are_those_of_pytorchs_operators() -> None:
    network = make_twins("sdxl")[1].double()
    given, conditions = make_inputs(network)
    gradients = []
    for fused in (False, True):
        prepared = prepare_network(network, CPU, torch.float64, fused=fused, copied=True)
        with torch.no_grad():
            prepared(*given, **conditions)  # keeps what it joins
        prepared(*given, **conditions).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in prepared.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-5, atol=1e-6, msg=name)


class Predicting(nn.Module):
    """`predict` as the forward pass of a module."""

    def __init__(self, network: UNet2DCondition) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        return self.network.predict(x, projections, *prepared)


@torch.no_grad()
def test_what_depends_on_an_image_can_be_exported() -> None:
    _, ours = make_twins("inpainting")
    given, conditions = make_inputs(ours)
    prepared = ours.prepare(conditions)
    inputs = (given[0], ours.condition(ours.embed_time(given[1])), *prepared)
    program = torch.export.export(Predicting(ours), inputs)
    out = program.module()(*inputs)
    torch.testing.assert_close(out, ours(*given, **conditions), rtol=0, atol=TOLERANCE)


# What it refuses


def test_configs_come_back() -> None:
    for name in ("sdxl", "inpainting", "three levels"):
        theirs, ours = make_twins(name)
        again = UNet2DCondition.from_config(json.loads(json.dumps(ours.to_config())))
        assert again.config == ours.config
        assert [spec.shape for spec in again.conditions] == [spec.shape for spec in ours.conditions]
        read = dict(UNet2DConditionModel.from_config(ours.config.to_dict()).config)
        known = {key: value for key, value in dict(theirs.config).items() if not key.startswith("_")}
        assert {key: read[key] for key in known} == known


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name = 'UNet2DModel'; accepted is 'UNet2DConditionModel'"),
        ({"unheard": 1}, "the unknown key 'unheard'"),
        ({"dual_cross_attention": True}, r"dual_cross_attention = True; accepted is false \(nothing else"),
        ({"time_cond_proj_dim": 256}, r"time_cond_proj_dim = 256; accepted is null \(nothing else"),
        ({"class_embed_type": "projection"}, "class_embed_type = 'projection'; accepted is null or 'timestep'"),
        ({"addition_embed_type": "image"}, "addition_embed_type = 'image'; accepted is null or 'text_time'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift = 'scale_shift'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"cross_attention_dim": [24, 24]}, "cross_attention_dim"),
        ({"transformer_layers_per_block": [[1, 1], [1, 1]]}, "transformer_layers_per_block"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"conv_in_kernel": True}, "conv_in_kernel = True; accepted is 3"),
        ({"only_cross_attention": 1}, "only_cross_attention = 1"),
        ({"norm_num_groups": None}, "norm_num_groups = None"),
        ({"norm_num_groups": 5}, "norm_num_groups = 5; accepted is a divisor"),
        ({"attention_head_dim": 5}, "attention_head_dim = 5; accepted is a divisor"),
        ({"attention_head_dim": [4, 4, 4]}, "attention_head_dim = .*; accepted is a list of 2 entries"),
        ({"sample_size": 9}, "sample_size = 9; accepted is a multiple of 2"),
        ({**XL, "addition_time_embed_dim": None}, "addition_time_embed_dim = None"),
        ({**XL, "projection_class_embeddings_input_dim": 8}, "projection_class_embeddings_input_dim = 8"),
        (
            {"freq_shift": 1, "block_out_channels": [2, 64], "norm_num_groups": 1, "attention_head_dim": 2},
            "freq_shift",
        ),
        ({"block_out_channels": [16384, 16384], "cross_attention_dim": 65536}, "parameters; accepted are at most"),
        ({"concatenated_channels": 4}, "concatenated_channels"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"concatenated_channels": 1, "sample_size": None}, "sample_size"),
        ({"num_time_ids": 3}, "num_time_ids"),
        ({**XL, "num_time_ids": 9}, "num_time_ids is 9, which leaves nothing of 68"),
    ],
)
def test_a_bad_config_is_refused_in_a_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        UNet2DCondition.from_config({**SMALL, **changes})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def inpainting() -> UNet2DCondition:
    """A network that takes something beside a text."""
    return make_twins("inpainting")[1]


def test_what_is_not_implemented_may_be_said_to_be_off() -> None:
    off = {"dual_cross_attention": False, "encoder_hid_dim": None, "conv_in_kernel": 3, "attention_type": None}
    wanted = UNet2DConditionConfig.from_dict(SMALL)
    assert UNet2DConditionConfig.from_dict({**SMALL, **off, "_note": 1, "decay": 0.9}) == wanted
    with pytest.raises(CheckpointError, match="accepted is a JSON object"):
        UNet2DCondition.from_config([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="UNet2DConditionConfig"):
        UNet2DCondition(SMALL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.zeros(3, 9, 8, 8)}, ValueError, r"accepted is float32 \[B, 4, H, W\]"),
        ({"x": torch.zeros(3, 4, 8, 8).double()}, ValueError, "x is float64"),
        ({"x": torch.zeros(3, 4, 7, 8)}, ValueError, "multiples of 2"),
        ({"x": torch.zeros(3, 4, 16, 16)}, ValueError, "concatenated is float32 .*, as x has"),
        ({"timesteps": torch.zeros(3).half()}, ValueError, "timesteps is float16"),
        ({"timesteps": torch.zeros(2)}, ValueError, "timesteps is float32"),
        ({"class_labels": torch.zeros(3).long()}, ValueError, "this network takes none"),
        ({"encoder_hidden_states": None}, TypeError, "encoder_hidden_states is NoneType"),
        ({"encoder_hidden_states": torch.zeros(3, 76, 24)}, ValueError, r"accepted is floating point \[3, 77, 24\]"),
        ({"concatenated": torch.zeros(3, 5, 8, 8).long()}, ValueError, "concatenated is int64"),
        ({"text_embeds": torch.zeros(3, 5)}, TypeError, "takes no condition 'text_embeds'"),
    ],
)
@torch.no_grad()
def test_a_bad_input_is_refused_in_a_sentence(
    inpainting: UNet2DCondition, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    ours = inpainting
    (x, timesteps), conditions = make_inputs(ours)
    with pytest.raises(error, match=words) as caught:
        ours(**{"x": x, "timesteps": timesteps, **conditions, **changes})
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_bad_parts_are_refused_in_a_sentence() -> None:
    _, ours = make_twins("sdxl")
    (x, timesteps), conditions = make_inputs(ours)
    with pytest.raises(TypeError, match="needs the condition 'time_ids'"):
        ours(x, timesteps, **{key: value for key, value in conditions.items() if key != "time_ids"})
    prepared = ours.prepare(conditions)
    time = ours.embed_time(timesteps)
    with pytest.raises(ValueError, match="prepared are 0 tensors; accepted are the 2 that `prepare` returned"):
        ours.condition(time)
    projections = ours.condition(time, None, *prepared)
    with pytest.raises(ValueError, match="prepared are 1 tensors"):
        ours.predict(x, projections, prepared[0])
    with pytest.raises(ValueError, match=r"prepared keys and values are .*; accepted are \[3, L, "):
        ours.predict(x, projections, prepared[0][:2], prepared[1])
    with pytest.raises(ValueError, match="projections is"):
        ours.predict(x, projections[:, 1:], *prepared)
    _, labelled = make_twins("upscaler")
    (x, timesteps, _), conditions = make_inputs(labelled)
    with pytest.raises(ValueError, match="class_labels is None; this network is conditioned on a class"):
        labelled.condition(labelled.embed_time(timesteps), None, *labelled.prepare(conditions))
