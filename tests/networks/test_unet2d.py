"""`UNet2D` against diffusers' ``UNet2DModel``: same weights, same output; and what it refuses."""

import copy
import reprlib
import warnings

import pytest
import torch

from stepfusion.errors import CheckpointError
from stepfusion.networks import UNet2D, UNet2DConfig, blocks
from stepfusion.networks.blocks import double_size

pytest.importorskip("diffusers")

from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

TOLERANCE = 1e-5  # float32, max abs; outputs are of order 1

CIFAR = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
CELEBAHQ = {
    **CIFAR,
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
SMALL = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
VARIANTS = {
    "defaults": {},
    "class table": {"num_class_embeds": 11},
    "class timestep": {"class_embed_type": "timestep"},
    "class identity": {"class_embed_type": "identity"},
    "class type wins over table": {"class_embed_type": "timestep", "num_class_embeds": 11},
    "scale shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale shift, mid norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "asymmetric padding": {"downsample_padding": 0},
    "one head": {"attention_head_dim": None},
    "head size that does not divide": {"attention_head_dim": 12},
    "resnet resampling": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "resnet blocks": {
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "resnet blocks, scale shift": {
        "resnet_time_scale_shift": "scale_shift",
        "layers_per_block": 2,
        "down_block_types": ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "consistency models": {  # the config of openai/diffusers-cd_imagenet64_l2, narrower
        "block_out_channels": [16, 32, 64, 64],
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
        "layers_per_block": 3,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 16,
        "attn_norm_num_groups": 8,
        "num_class_embeds": 11,
    },
    "names of old": {
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        "up_block_types": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
    },
    "no middle attention": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "middle scale": {"mid_block_scale_factor": 1.5},
    "centred input": {"center_input_sample": True},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "time width, odd channels": {
        "time_embedding_dim": 24,
        "block_out_channels": [15, 30],
        "norm_num_groups": 5,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
    "channels": {"in_channels": 1, "out_channels": 6, "layers_per_block": 3},
    "mish": {"act_fn": "mish", "norm_eps": 1e-3},
    "one level": {
        "block_out_channels": [16],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    },
}


def make_twins(config: dict, seed: int = 0) -> tuple[UNet2DModel, UNet2D]:
    """Build both networks with the same random weights, loaded strictly."""
    torch.manual_seed(seed)
    theirs = UNet2DModel(**config).eval()
    ours = UNet2D(UNet2DConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_inputs(network: UNet2D, batch: int = 2, size: int = 8) -> tuple[torch.Tensor, ...]:
    """Draw x, timesteps and, where the network takes them, labels."""
    x = torch.randn(batch, network.in_channels, size, size)
    timesteps = torch.tensor([999, 0, 417, 80])[:batch]
    labels = torch.tensor([10, 0, 3, 7])[:batch]
    if network.config.class_embed_type == "identity":
        labels = torch.randn(batch, network.config.time_embed_dim)
    takes_labels = network.config.class_embed_type is not None or network.num_classes is not None
    return (x, timesteps, labels) if takes_labels else (x, timesteps)


@torch.no_grad()
def difference(theirs: UNet2DModel, ours: UNet2D, inputs: tuple[torch.Tensor, ...]) -> float:
    """Return the largest absolute difference, after checking that there is something to compare."""
    expected, out = theirs(*inputs).sample, ours(*inputs)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert expected.std() > 0.05
    return float((out - expected).abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name: str) -> None:
    theirs, ours = make_twins({**SMALL, **VARIANTS[name]})
    assert difference(theirs, ours, make_inputs(ours)) <= TOLERANCE
    assert sum(p.numel() for p in ours.parameters()) == ours.config.parameter_count


@pytest.mark.parametrize(("config", "count", "size"), [(CIFAR, 35_746_307, 32), (CELEBAHQ, 113_673_219, 64)])
def test_equals_diffusers_on_the_published_configs(config: dict, count: int, size: int) -> None:
    theirs, ours = make_twins(config)
    assert sum(p.numel() for p in ours.parameters()) == count
    assert ours.config.parameter_count == count
    batch = 2 if config is CIFAR else 1
    assert difference(theirs, ours, make_inputs(ours, batch, size)) <= TOLERANCE


def test_equals_diffusers_in_channels_last() -> None:
    theirs, ours = make_twins(SMALL)
    ours = ours.to(memory_format=torch.channels_last)
    x, timesteps = make_inputs(ours)
    x = x.to(memory_format=torch.channels_last)
    assert difference(theirs, ours, (x, timesteps)) <= TOLERANCE
    assert ours(x, timesteps).is_contiguous(memory_format=torch.channels_last)


def test_upsampling_beyond_32_bits_leaves_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the limit, here lowered, the values stay and the memory format does not (pytorch#141831)."""
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    expected = double_size(x)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(blocks, "_INT32_MAX", 4 * x.numel() - 1)
    assert torch.equal(double_size(x), expected)
    assert double_size(x).is_contiguous()


@pytest.mark.parametrize("change", ["weight", "flip_sin_to_cos", "freq_shift", "downsample_padding", "head"])
def test_the_comparison_sees_a_wrong_network(change: str) -> None:
    theirs, ours = make_twins(SMALL)
    if change == "weight":
        with torch.no_grad():
            ours.up_blocks[0].resnets[0].conv1.weight[0, 0, 0, 0] += 0.1
    else:
        wrong = {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "head": None}[change]
        key = "attention_head_dim" if change == "head" else change
        changed = UNet2D(UNet2DConfig.from_dict({**SMALL, key: wrong})).eval()
        changed.load_state_dict(ours.state_dict(), strict=True)
        ours = changed
    assert difference(theirs, ours, make_inputs(ours)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"num_class_embeds": 11, "resnet_time_scale_shift": "scale_shift"},
        # masks are drawn in memory order, and attention changes diffusers' memory format: so none here
        {
            "dropout": 0.3,
            "add_attention": False,
            "down_block_types": ["DownBlock2D"] * 2,
            "up_block_types": ["UpBlock2D"] * 2,
        },
    ],
    ids=["classes", "dropout"],
)
def test_trains_like_diffusers(config: dict) -> None:
    """Same dropout masks, same loss, same gradients; every parameter gets one."""
    theirs, ours = make_twins({**SMALL, **config})
    inputs = make_inputs(ours)
    outputs = []
    for network in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        out = network(*inputs)
        out = out if isinstance(out, torch.Tensor) else out.sample
        out.square().mean().backward()
        outputs.append(out)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=TOLERANCE)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=TOLERANCE, msg=name)
        if not name.endswith("to_k.bias"):  # softmax does not see a shift that all keys share
            assert parameter.grad.abs().max() > 0, name


def test_dropout_is_off_in_eval_mode() -> None:
    _, ours = make_twins({**SMALL, "dropout": 0.5})
    inputs = make_inputs(ours)
    torch.testing.assert_close(ours(*inputs), ours(*inputs), rtol=0, atol=0)
    assert not torch.equal(ours.train()(*inputs), ours(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float64(dtype: torch.dtype) -> None:
    _, ours = make_twins(SMALL)
    x, timesteps = make_inputs(ours)
    half = copy.deepcopy(ours).to(dtype)
    out = half(x.to(dtype), timesteps)
    truth = copy.deepcopy(half).double()(x.to(dtype).double(), timesteps)
    assert out.dtype == dtype
    error = (out.double() - truth).abs().max() / truth.abs().max()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["defaults", "consistency models", "class timestep"])
@torch.no_grad()
def test_timesteps_between_the_integers(name: str) -> None:
    """c_noise of a consistency model, 250 log(sigma), or 1000 t of a flow; a table's rows too."""
    theirs, ours = make_twins({**SMALL, **VARIANTS[name]})
    x, _, *labels = make_inputs(ours)
    for told in (torch.tensor([-1552.98, 1095.61]), torch.tensor([0.25, 999.5], dtype=torch.float64)):
        assert difference(theirs, ours, (x, told, *labels)) <= TOLERANCE
        rows = ours.condition(ours.embed_time(told), *labels)
        assert torch.equal(ours.predict(x, rows), ours(x, told, *labels))
        assert float((ours(x, told, *labels) - ours(x, told.long(), *labels)).abs().max()) > 10 * TOLERANCE


def test_a_learned_embedding_has_no_row_between_the_integers() -> None:
    network = UNet2D(UNet2DConfig.from_dict({**SMALL, **VARIANTS["learned time"]}))
    with pytest.raises(ValueError, match=r"^timesteps is float32 \[2\]; accepted is int64 \[B\], for this network's"):
        network(X, T.float())


@torch.no_grad()
def test_timesteps_do_not_pass_through_a_half_dtype() -> None:
    """bfloat16 has no 999: a network that rounds timesteps gives 999 and 1000 the same embedding."""
    _, ours = make_twins(SMALL)
    late, later = ours.bfloat16().embed_time(torch.tensor([999, 1000]))
    assert not torch.equal(late, later)


@pytest.mark.parametrize("name", ["class table", "scale shift"])
@torch.no_grad()
def test_the_time_path_can_be_hoisted(name: str) -> None:
    """Projections computed once for a table of timesteps and gathered by row give the same image."""
    _, ours = make_twins({**SMALL, **VARIANTS[name]})
    x, timesteps, *labels = make_inputs(ours, batch=4)
    rows = ours.condition(ours.embed_time(timesteps), *labels)
    assert rows.shape == (4, ours.projection_size)
    order = torch.tensor([2, 0, 3, 1])
    hoisted = ours.predict(x[order], rows[order])
    torch.testing.assert_close(hoisted, ours(x, timesteps, *labels)[order], rtol=0, atol=TOLERANCE)
    with pytest.raises(
        ValueError, match=rf"^projections is float32 \[3, {ours.projection_size}\]; accepted is \[4, "
    ):
        ours.predict(x, rows[:3])


@torch.no_grad()
def test_an_empty_batch_is_an_empty_batch() -> None:
    _, ours = make_twins(SMALL)
    out = ours(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "backend"),
    [  # "eager" runs the graph as it was captured; "aot_eager" takes it apart into operators as well, which is slow
        ("class table", "aot_eager"),
        ("scale shift", "eager"),
        ("resnet resampling", "eager"),
        pytest.param("scale shift", "aot_eager", marks=pytest.mark.soak),
        pytest.param("resnet resampling", "aot_eager", marks=pytest.mark.soak),
    ],
)
@torch.no_grad()
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    _, ours = make_twins({**SMALL, **VARIANTS[name]})
    inputs = make_inputs(ours)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs), ours(*inputs), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_exports_with_a_dynamic_batch() -> None:
    _, ours = make_twins({**SMALL, "num_class_embeds": 11})
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here depends on its version
        program = torch.export.export(ours, make_inputs(ours), dynamic_shapes=({0: batch},) * 3)
    inputs = make_inputs(ours, batch=4)
    torch.testing.assert_close(program.module()(*inputs), ours(*inputs), rtol=0, atol=TOLERANCE)


def test_a_copy_is_independent() -> None:
    """The list of residual blocks that `project` walks follows a deep copy."""
    _, ours = make_twins(SMALL)
    twin = copy.deepcopy(ours)
    inputs = make_inputs(ours)
    before = ours(*inputs)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(ours(*inputs), before, rtol=0, atol=0)
    assert twin(*inputs).abs().max() == 0


X, T = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        ({}, (X[0], T), "x is float32 [3, 8, 8]; accepted is float32 [B, 3, H, W]"),
        ({}, (X[:, :2], T), "x is float32 [2, 2, 8, 8]; accepted is float32 [B, 3, H, W]"),
        ({}, (X.double(), T), "x is float64 [2, 3, 8, 8]; accepted is float32 [B, 3, H, W]"),
        ({}, (X[..., :7], T), "x is float32 [2, 3, 8, 7]; accepted are height and width that are multiples of 2"),
        ({}, (X, T.half()), "timesteps is float16 [2]; accepted is int64, float32 or float64 [B]"),
        ({}, (X, T[:, None]), "timesteps is int64 [2, 1]; accepted is int64, float32 or float64 [B]"),
        ({}, (X, T[:1]), "timesteps is int64 [1]; accepted is int64 [2], as x has"),
        ({}, (X, T, T), "class_labels is given; this network takes none (its config has no class embedding)"),
        (
            {"num_class_embeds": 3},
            (X, T),
            "class_labels is None; this network is conditioned on a class and needs them",
        ),
        ({"num_class_embeds": 3}, (X, T, T[:1]), "class_labels is int64 [1]; accepted is int64 [2]"),
        ({"num_class_embeds": 3}, (X, T, T.float()), "class_labels is float32 [2]; accepted is int64 [2]"),
        ({"class_embed_type": "identity"}, (X, T, T), "class_labels is int64 [2]; accepted is float32 [2, 64]"),
    ],
)
def test_refuses_inputs_that_do_not_fit(config: dict, inputs: tuple, message: str) -> None:
    network = UNet2D(UNet2DConfig.from_dict({**SMALL, **config}))
    with pytest.raises(ValueError) as caught:
        network(*inputs)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trip(name: str) -> None:
    config = UNet2DConfig.from_dict({**SMALL, **VARIANTS[name]})
    assert UNet2DConfig.from_dict(config.to_dict()) == config
    assert UNet2DConfig.from_dict(dict(UNet2DModel.from_config(config.to_dict()).config)) == config


def test_block_names_of_old_are_those_of_today() -> None:
    old = UNet2DConfig.from_dict({**SMALL, **VARIANTS["names of old"]})
    assert old == UNet2DConfig.from_dict(SMALL)
    with pytest.raises(CheckpointError, match="down_block_types"):
        UNet2DConfig.from_dict({**SMALL, "down_block_types": ["UNetResSkipDownBlock2D", "DownBlock2D"]})


def test_what_an_average_says_of_itself_is_skipped() -> None:
    average = EMAModel(UNet2DModel(**SMALL).parameters(), model_cls=UNet2DModel, model_config=SMALL)
    noted = {key: value for key, value in average.state_dict().items() if key != "shadow_params"}
    assert UNet2DConfig.from_dict({**SMALL, **noted}) == UNet2DConfig.from_dict(SMALL)
    with pytest.raises(CheckpointError, match="unknown key 'momentum'"):
        UNet2DConfig.from_dict({**SMALL, **noted, "momentum": 0.9})


@pytest.mark.parametrize("kind", [{"num_class_embeds": 3}, {"class_embed_type": "timestep"}])
def test_a_condition_is_never_left_out(kind: dict) -> None:
    """Also in the parts that an engine calls: an image of no class was the answer."""
    network = UNet2D(UNet2DConfig.from_dict({**SMALL, **kind}))
    time = network.embed_time(T)
    with pytest.raises(ValueError, match="class_labels is None; this network is conditioned on a class"):
        network.condition(time)
    assert network.condition(time, T).shape == (2, network.projection_size)


def test_labels_that_are_embedded_as_timesteps_are_counted() -> None:
    assert UNet2DConfig.from_dict({**SMALL, "class_embed_type": "timestep"}).num_classes is None
    counted = UNet2DConfig.from_dict({**SMALL, "class_embed_type": "timestep", "num_class_embeds": 7})
    assert (counted.num_classes, counted.class_embedding_rows) == (7, None)
    identity = UNet2DConfig.from_dict({**SMALL, "class_embed_type": "identity", "num_class_embeds": 7})
    assert identity.num_classes is None


def test_config_defaults_are_those_of_diffusers() -> None:
    """A missing attention_head_dim means 8, a null one head; underscored notes are skipped."""
    theirs = dict(UNet2DModel(**SMALL).config)
    assert UNet2DConfig.from_dict(SMALL) == UNet2DConfig.from_dict(theirs)
    assert UNet2DConfig.from_dict({"_diffusers_version": "0.0.4", **SMALL}).attention_head_dim == 8
    assert UNet2DConfig.from_dict({**SMALL, "attention_head_dim": None}).head_dim(32) == 32


HUGE = 10**9
CHANNELS = "an integer from 1 to 16384"
LEVELS = f"a list of 1 to 16 entries, each {CHANNELS}"
PER_LEVEL = "a list of 2 entries, one for each of block_out_channels"
EPS = "a number above 0, up to 1"
ONLY = "(nothing else is implemented)"


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("in_channels", HUGE, CHANNELS),
        ("in_channels", True, CHANNELS),
        ("in_channels", 3.0, CHANNELS),
        ("layers_per_block", "2", "an integer from 1 to 32"),
        ("layers_per_block", 33, "an integer from 1 to 32"),
        ("layers_per_block", [1, 2], "an integer from 1 to 32"),
        ("norm_eps", float("nan"), EPS),
        ("norm_eps", float("inf"), EPS),
        ("norm_eps", "1e-6", EPS),
        ("norm_eps", True, EPS),
        ("dropout", 1.0, "a number from 0 to below 1"),
        ("dropout", 10**400, "a number from 0 to below 1"),
        ("flip_sin_to_cos", 1, "true or false"),
        ("freq_shift", 8, "a number from 0 to 1"),
        ("time_embedding_type", "fourier", f"'positional' or 'learned' {ONLY}"),
        ("resnet_time_scale_shift", "spatial", f"'default' or 'scale_shift' {ONLY}"),
        ("class_embed_type", "projection", f"null or 'timestep' or 'identity' {ONLY}"),
        ("mid_block_type", "Other", f"null or 'UNetMidBlock2D' {ONLY}"),
        (
            "down_block_types",
            ["DownBlock2D", "SkipDownBlock2D"],
            f"a list of 1 to 16 entries, each 'DownBlock2D' or 'AttnDownBlock2D' or 'ResnetDownsampleBlock2D' {ONLY}",
        ),
        ("down_block_types", ["DownBlock2D"], PER_LEVEL),
        ("up_block_types", ["UpBlock2D"] * 3, PER_LEVEL),
        ("block_out_channels", [], LEVELS),
        ("block_out_channels", [8] * 17, LEVELS),
        ("block_out_channels", [16, HUGE], LEVELS),
        ("block_out_channels", "16", LEVELS),
        ("norm_num_groups", 5, "a divisor of every block_out_channels [16, 32]"),
        ("attn_norm_num_groups", 5, "null or a divisor of 32"),
        ("attention_head_dim", 0, f"null or {CHANNELS}"),
        ("attention_head_dim", 33, "null or at most 32"),
        ("sample_size", 9, "a multiple of 2, with 2 levels"),
        ("sample_size", [8, 9], "a multiple of 2, with 2 levels"),
        ("sample_size", [8, 8, 8], "null or an integer from 1 to 65536, or a pair of them"),
        ("downsample_padding", 2, "an integer from 0 to 1"),
        ("_class_name", "UNet2DConditionModel", "'UNet2DModel'"),
    ],
)
def test_config_names_what_is_wrong(key: str, value: object, accepted: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        UNet2DConfig.from_dict({**SMALL, key: value})
    assert str(caught.value) == f"the UNet config has {key} = {reprlib.repr(value)}; accepted is {accepted}"


def test_config_names_a_contradiction() -> None:
    message = r"^the UNet config has num_train_timesteps = None; accepted is an integer, since time_embedding_type is"
    with pytest.raises(CheckpointError, match=message):
        UNet2DConfig.from_dict({**SMALL, "time_embedding_type": "learned"})
    message = r"^the UNet config has freq_shift = 1; accepted is below half of the first of block_out_channels$"
    with pytest.raises(CheckpointError, match=message):
        UNet2DConfig(block_out_channels=(2,) * 4, norm_num_groups=1, attention_head_dim=None, freq_shift=1)


def test_config_names_an_unknown_key() -> None:
    message = r"^the UNet config has the unknown key 'cross_attention_dim'; accepted are act_fn, "
    with pytest.raises(CheckpointError, match=message):
        UNet2DConfig.from_dict({**SMALL, "cross_attention_dim": 768})


def test_config_refuses_what_no_memory_holds() -> None:
    """Every field is in its range, their product is not; this is arithmetic, so it is quick."""
    levels = {"block_out_channels": [16384] * 16, "layers_per_block": 32, "norm_num_groups": 32, "sample_size": None}
    types = {"down_block_types": ["DownBlock2D"] * 16, "up_block_types": ["UpBlock2D"] * 16}
    message = r"^the UNet config describes 7,\d+,\d+,\d+,\d+ parameters; accepted are at most 10,000,000,000$"
    with pytest.raises(CheckpointError, match=message):
        UNet2DConfig.from_dict({**levels, **types})


def test_config_refuses_what_is_not_an_object() -> None:
    with pytest.raises(CheckpointError, match=r"^a UNet config is \[1\]; accepted is a JSON object$"):
        UNet2DConfig.from_dict([1])
