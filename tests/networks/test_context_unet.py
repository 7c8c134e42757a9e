"""`ContextUNet` against the equations in float64 on its state dict; its names, dtypes and graphs; what it refuses."""

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch

import stepfusion as sf
from stepfusion.kernels.tolerance import tolerance
from stepfusion.networks import ContextUNet
from stepfusion_testing.walking import walk

SMALL = {"features": 16, "sample_size": 8}
VARIANTS = {
    "defaults": {},
    "small": SMALL,
    "as many channels in as features": {**SMALL, "in_channels": 16},
    "lowest level of 3x3, one channel": {**SMALL, "in_channels": 1, "sample_size": 12, "context_size": 2},
    "lowest level of one pixel": {**SMALL, "sample_size": 4, "num_timesteps": 1000},
}
State = dict[str, torch.Tensor]


def make_network(seed: int = 0, **config: int) -> ContextUNet:
    """Random weights that heed time and context, and statistics and scales that are not PyTorch's zeros and ones."""
    torch.manual_seed(seed)
    network = ContextUNet(**config).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, 0, 2 / math.sqrt(module.in_features))
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.1, 0.6)
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return network


def make_inputs(network: ContextUNet, batch: int = 3) -> tuple[torch.Tensor, ...]:
    """Draw x, and choose timesteps and labels; the second has the null label."""
    x = torch.randn(batch, network.in_channels, network.sample_size, network.sample_size)
    timesteps = torch.tensor([network.num_timesteps - 1, 0, 417, 80])[:batch]
    labels = torch.tensor([1, network.context_size, 0, 1])[:batch]
    return x, timesteps, labels


def one_hot(network: ContextUNet, labels: torch.Tensor) -> torch.Tensor:
    """The contexts of labels, from rows of the identity and a row of zeros."""
    identity = torch.eye(network.context_size)
    return torch.cat((identity, torch.zeros(1, network.context_size)))[labels]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def norm(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return (x - mean) / (variance + 1e-5).sqrt()


def column(v: torch.Tensor) -> torch.Tensor:
    """A value for each channel, to go with [B, C, H, W]."""
    return v[..., None, None]


def plain(state: State, x: torch.Tensor, fraction: torch.Tensor, context: torch.Tensor, train: bool = False) -> State:
    """The course's equations on a state dict: {"out": eps [B, C, H, H]}, and the running statistics when training.

    x [B, C, H, H], fraction [B] of the time, context [B, context_size], all in the state's dtype.
    """
    seen: State = {}

    def linear(name: str, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oi->bo", v, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def mlp(name: str, v: torch.Tensor) -> torch.Tensor:
        return column(linear(f"{name}.model.2", gelu(linear(f"{name}.model.0", v))))

    def conv(name: str, h: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(h, state[f"{name}.weight"], padding=1) + column(state[f"{name}.bias"])

    def spread(name: str, h: torch.Tensor) -> torch.Tensor:
        """A transposed convolution whose stride is its size: every pixel becomes a square of its own."""
        squares = torch.einsum("bcij,couv->boiujv", h, state[f"{name}.weight"])
        return squares.flatten(4, 5).flatten(2, 3) + column(state[f"{name}.bias"])

    def affine(name: str, h: torch.Tensor) -> torch.Tensor:
        return h * column(state[f"{name}.weight"]) + column(state[f"{name}.bias"])

    def batch_norm(name: str, h: torch.Tensor) -> torch.Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if train:
            moments = h.mean(dim=(0, 2, 3)), h.var(dim=(0, 2, 3), correction=1)
            seen[f"{name}.running_mean"] = 0.9 * mean + 0.1 * moments[0]
            seen[f"{name}.running_var"] = 0.9 * variance + 0.1 * moments[1]
            mean, variance = moments[0], h.var(dim=(0, 2, 3), correction=0)
        return affine(name, norm(h, column(mean), column(variance)))

    def group_norm(name: str, h: torch.Tensor) -> torch.Tensor:
        groups = h.reshape(len(h), 8, -1)
        normed = norm(groups, groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True))
        return affine(name, normed.reshape(h.shape)).clamp(min=0)

    def conv_norm_gelu(name: str, h: torch.Tensor) -> torch.Tensor:
        return gelu(batch_norm(f"{name}.1", conv(f"{name}.0", h)))

    def block(name: str, h: torch.Tensor) -> torch.Tensor:
        return conv_norm_gelu(f"{name}.conv2", conv_norm_gelu(f"{name}.conv1", h))

    def down(name: str, h: torch.Tensor) -> torch.Tensor:
        h = block(f"{name}.model.1", block(f"{name}.model.0", h))
        batch, channels, height, width = h.shape
        return h.reshape(batch, channels, height // 2, 2, width // 2, 2).amax(dim=(3, 5))

    def up(name: str, h: torch.Tensor) -> torch.Tensor:
        return block(f"{name}.model.2", block(f"{name}.model.1", spread(f"{name}.model.0", h)))

    first = conv_norm_gelu("init_conv.conv1", x)
    shortcut = x if x.shape == first.shape else first
    full = (shortcut + conv_norm_gelu("init_conv.conv2", first)) / 1.414
    half = down("down1", full)
    quarter = down("down2", half)
    h = group_norm("up0.1", spread("up0.0", gelu(quarter.mean(dim=(2, 3), keepdim=True))))
    h = mlp("contextembed1", context) * h + mlp("timeembed1", fraction[:, None])
    h = up("up1", torch.cat((h, quarter), dim=1))
    h = mlp("contextembed2", context) * h + mlp("timeembed2", fraction[:, None])
    h = up("up2", torch.cat((h, half), dim=1))
    h = group_norm("out.1", conv("out.0", torch.cat((h, full), dim=1)))
    return {"out": conv("out.3", h), **seen}


def truth(network: ContextUNet, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The equations in float64 on the network's weights."""
    state = {name: value.double() for name, value in network.state_dict().items()}
    return plain(state, x.double(), timesteps.double() / network.num_timesteps, context.double())["out"]


def bound(network: ContextUNet, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """What rounding can do: sqrt(n) units for the n products of a sum in every layer, one layer after the other."""
    products = sum(parameter[0].numel() for parameter in network.parameters() if parameter.ndim > 1)
    return tolerance(dtype, largest(expected), round(math.sqrt(products)))


def largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_the_equations(name: str, dtype: torch.dtype) -> None:
    network = make_network(**VARIANTS[name]).to(dtype)
    x, timesteps, labels = make_inputs(network)
    out = network(x.to(dtype), timesteps, labels)
    expected = truth(network, x, timesteps, one_hot(network, labels))
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert expected.std() > 0.1
    assert largest(out.double() - expected) <= bound(network, expected, dtype)


@pytest.mark.parametrize("change", ["weight", "statistic", "timestep", "label", "shortcut"])
@torch.no_grad()
def test_the_comparison_sees_a_wrong_network(change: str) -> None:
    network = make_network(**SMALL).double()
    x, timesteps, labels = make_inputs(network)
    expected = truth(network, x, timesteps, one_hot(network, labels))
    if change == "weight":
        network.up1.model[1].conv2[0].weight[0, 0, 0, 0] += 0.1
    elif change == "statistic":
        network.down2.model[0].conv1[1].running_var[0] += 0.1
    elif change == "timestep":
        timesteps[0] -= 1
    elif change == "label":
        labels[0] += 1
    else:
        network.init_conv.residual = False
    assert largest(network(x.double(), timesteps, labels) - expected) > 1e3 * bound(network, expected, torch.float64)


def test_trains_as_the_equations_do() -> None:
    """Batch statistics, running statistics, and the gradient of every parameter, in float64."""
    network = make_network(**SMALL).double().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    weights = {name: state[name].requires_grad_() for name, _ in network.named_parameters()}
    x, timesteps, labels = make_inputs(network)
    context = one_hot(network, labels)
    expected = plain(state, x.double(), timesteps.double() / network.num_timesteps, context.double(), train=True)
    out = network(x.double(), timesteps, labels)
    close = bound(network, expected["out"], torch.float64)
    assert largest(out - expected["out"]) <= close
    assert len(expected) > 1
    after = network.state_dict()
    for name in expected.keys() - {"out"}:
        assert largest(after[name] - expected[name]) <= close, name
        assert not torch.equal(after[name], state[name]), name

    ours = torch.autograd.grad(out.square().mean(), list(network.parameters()))
    theirs = torch.autograd.grad(expected["out"].square().mean(), list(weights.values()))
    scale = max(largest(gradient) for gradient in theirs)
    for name, our, their in zip(weights, ours, theirs, strict=True):
        assert largest(our - their) <= 100 * scale * close, name
        if not name.endswith(("conv1.0.bias", "conv2.0.bias")):  # batch normalisation takes a shift out again
            assert largest(their) > 1e3 * scale * close, name


def test_training_mode_uses_the_batch_and_eval_mode_does_not() -> None:
    network = make_network(**SMALL)
    x, timesteps, labels = make_inputs(network)
    alone = network(x[:1], timesteps[:1], labels[:1])
    assert largest(network(x, timesteps, labels)[:1] - alone) <= bound(network, alone)
    assert largest(network.train()(x, timesteps, labels)[:1] - alone) > 0.01


def block_names(prefix: str) -> list[str]:
    layers = [(f"{prefix}.{conv}.0", f"{prefix}.{conv}.1") for conv in ("conv1", "conv2")]
    normed = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [
        name
        for conv, bn in layers
        for name in (f"{conv}.weight", f"{conv}.bias", *(f"{bn}.{entry}" for entry in normed))
    ]


def test_the_state_dict_has_the_names_of_the_courses_checkpoints() -> None:
    layers = ["up0.0", "up0.1", "up1.model.0", "up2.model.0", "out.0", "out.1", "out.3"]
    layers += [f"{kind}embed{i}.model.{j}" for kind in ("time", "context") for i in (1, 2) for j in (0, 2)]
    blocks = ["init_conv", *(f"down{i}.model.{j}" for i in (1, 2) for j in (0, 1))]
    blocks += [f"up{i}.model.{j}" for i in (1, 2) for j in (1, 2)]
    names = [f"{layer}.{entry}" for layer in layers for entry in ("weight", "bias")]
    names += [name for block in blocks for name in block_names(block)]
    state = ContextUNet().state_dict()
    assert sorted(state) == sorted(names)
    shapes = {
        "init_conv.conv1.0.weight": [64, 3, 3, 3],
        "down2.model.0.conv1.0.weight": [128, 64, 3, 3],
        "timeembed1.model.0.weight": [128, 1],
        "timeembed2.model.2.weight": [64, 64],
        "contextembed1.model.0.weight": [128, 5],
        "up0.0.weight": [128, 128, 4, 4],
        "up1.model.0.weight": [256, 64, 2, 2],
        "up2.model.0.weight": [128, 64, 2, 2],
        "out.0.weight": [64, 128, 3, 3],
        "out.3.weight": [3, 64, 3, 3],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes


def parameter_count(channels: int, width: int, context: int, lowest: int) -> int:
    """Parameters by the course's description, layer by layer."""

    def block(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 9 * outputs**2 + 6 * outputs

    def mlp(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs + (outputs + 1) * outputs

    down = block(width, width) * 2 + block(width, 2 * width) + block(2 * width, 2 * width)
    embeddings = sum(mlp(inputs, outputs) for inputs in (1, context) for outputs in (width, 2 * width))
    vector = (2 * width) ** 2 * lowest**2 + 2 * width + 4 * width
    up = 4 * (4 * width + 2 * width) * width + 2 * width + 4 * block(width, width)
    out = 9 * 2 * width * width + width + 2 * width + 9 * width * channels + channels
    return block(channels, width) + down + embeddings + vector + up + out


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count(name: str) -> None:
    network = ContextUNet(**VARIANTS[name])
    shape = network.in_channels, network.features, network.context_size, network.sample_size // 4
    assert sum(p.numel() for p in network.parameters()) == parameter_count(*shape)
    if name == "defaults":
        assert parameter_count(*shape) == 1_480_771  # of the notebooks' own network


@torch.no_grad()
def test_labels_are_one_hot_contexts_and_the_null_label_is_none() -> None:
    network = make_network(**SMALL)
    x, timesteps, _ = make_inputs(network, batch=1)
    x, timesteps = x.repeat(6, 1, 1, 1), timesteps.repeat(6)
    labels = torch.arange(6)
    out = network(x, timesteps, labels)
    assert torch.equal(network(x, timesteps, one_hot(network, labels)), out)
    assert torch.equal(network(x, timesteps, torch.zeros(6, 5))[5], out[5])
    assert torch.equal(network(x, timesteps)[5], out[5])
    distances = torch.cdist(out.flatten(1), out.flatten(1)) + torch.eye(6)
    assert distances.min() > 0.01


@torch.no_grad()
def test_contexts_may_be_mixed() -> None:
    network = make_network(**SMALL)
    x, timesteps, _ = make_inputs(network)
    mixed = torch.tensor([[0.3, 0.7, 0, 0, 0], [1, 0, 0, 1, 0], [-0.5, 0, 2, 0, 0.1]])
    out, expected = network(x, timesteps, mixed), truth(network, x, timesteps, mixed)
    assert largest(out - expected) <= bound(network, expected)


@torch.no_grad()
def test_the_time_path_can_be_hoisted() -> None:
    """Time features computed once for a table of timesteps, gathered by row and conditioned, give the same image."""
    network = make_network(**SMALL)
    x, timesteps, labels = make_inputs(network, batch=4)
    table = network.embed_time(torch.arange(0, 500, 20))
    rows = torch.tensor([24, 0, 3, 3])
    projections = network.condition(table[rows], labels)
    assert table.shape == (25, 3 * 16)
    assert projections.shape == (4, network.projection_size)
    out, expected = network.predict(x, projections), network(x, 20 * rows, labels)
    assert largest(out - expected) <= bound(network, expected)
    hoisted = network.predict(x, network.condition(network.embed_time(timesteps), labels))
    assert torch.equal(hoisted, network(x, timesteps, labels))


@torch.no_grad()
def test_time_features_depend_on_nothing_but_time() -> None:
    """Projections end in the time features; what stands before them moves with the label alone."""
    network = make_network(**SMALL)
    early, late = network.embed_time(torch.tensor([3, 450]))[:, None]
    one, other = (network.condition(time, torch.tensor([1])) for time in (early, late))
    assert torch.equal(one[:, 48:], early)
    assert torch.equal(one[:, :48], other[:, :48])
    assert largest(one[:, :48] - network.condition(early, torch.tensor([2]))[:, :48]) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float64(dtype: torch.dtype) -> None:
    network = make_network(**SMALL).to(dtype)
    x, timesteps, labels = make_inputs(network)
    out = network(x.to(dtype), timesteps, labels)
    expected = truth(network, x.to(dtype), timesteps, one_hot(network, labels))
    assert out.dtype == dtype
    assert largest(out.double() - expected) / largest(expected) < 4 * torch.finfo(dtype).eps


@torch.no_grad()
def test_timesteps_do_not_pass_through_a_half_dtype() -> None:
    """bfloat16 has too few numbers for the timesteps, whole or as fractions; the network tells all of them apart."""
    timesteps = torch.arange(500)
    assert len((timesteps / 500).bfloat16().unique()) < 500
    assert len(timesteps.bfloat16().unique()) < 500
    assert len(make_network().bfloat16().embed_time(timesteps).unique(dim=0)) == 500


@torch.no_grad()
def test_channels_last_stays_channels_last() -> None:
    network = make_network(**SMALL)
    x, timesteps, labels = make_inputs(network)
    expected = network(x, timesteps, labels)
    network = network.to(memory_format=torch.channels_last)
    out = network(x.to(memory_format=torch.channels_last), timesteps, labels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert largest(out - expected) <= bound(network, expected)


@torch.no_grad()
def test_an_empty_batch_is_an_empty_batch() -> None:
    network = make_network(**SMALL)
    assert network(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)).shape == (0, 3, 8, 8)


def test_a_copy_is_independent() -> None:
    network = make_network(**SMALL)
    inputs = make_inputs(network)
    before = network(*inputs)
    with torch.no_grad():
        for parameter in copy.deepcopy(network).parameters():
            parameter.zero_()
    assert torch.equal(network(*inputs), before)


@pytest.mark.parametrize("condition", ["labels", "contexts", "none"])
@torch.no_grad()
def test_compiles_as_one_graph(condition: str) -> None:
    """Without a guard on the values: other timesteps and labels run the same graph."""
    network = make_network(**SMALL)
    x, timesteps, labels = make_inputs(network)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager", dynamic=False)
    for shift in range(3):
        changed = (labels + shift) % network.num_classes
        given = {"labels": (changed,), "contexts": (one_hot(network, changed),), "none": ()}[condition]
        inputs = (x, (timesteps + shift) % 500, *given)
        with torch.compiler.set_stance("fail_on_recompile" if shift else "default"):
            assert torch.equal(compiled(*inputs), network(*inputs))


@torch.no_grad()
def test_exports_with_a_dynamic_batch() -> None:
    network = make_network(**SMALL)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here depends on its version
        program = torch.export.export(network, make_inputs(network), dynamic_shapes=({0: batch},) * 3)
    inputs = make_inputs(network, batch=4)
    expected = network(*inputs)
    assert largest(program.module()(*inputs) - expected) <= bound(network, expected)


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_engine_samples_from_it(sampler: str, guidance: float | None) -> None:
    """The engine's images are the sampler's table walked with the network called by hand."""
    network = make_network(**SMALL)
    engine = sf.Engine(network, sf.NoiseSchedule.linear(500), null_label=5, device="cpu", dtype="float32")
    assert (engine.shape, engine.num_classes) == ((3, 8, 8), 6)
    table, labels = engine.table(sampler, timesteps=[240, 150, 60, 0]), torch.tensor([2, 5, 0])
    start, noise = torch.randn(3, 3, 8, 8), torch.randn(4, 3, 3, 8, 8)

    @torch.no_grad()
    def eps(x: torch.Tensor, t: int) -> torch.Tensor:
        timesteps = torch.full((len(x),), t)
        out = network(x, timesteps, labels)
        return out if guidance is None else torch.lerp(network(x, timesteps), out, guidance)

    images = engine.sample(table=table, labels=labels.tolist(), start=start, noise=noise, guidance=guidance)
    row = dict(zip(sf.kernels.COLUMNS, table.coefficients.T, strict=True))
    reach = float(abs(row["next_x0"] * row["x0_out"] + row["next_out"]).sum())  # of eps into the image
    close = (1 if guidance is None else 2 * guidance - 1) * reach * bound(network, start)
    assert largest(images - walk(table, eps, start, noise)) <= close
    unconditional = engine.sample(table=table, start=start, noise=noise)
    assert [largest(image) > 100 * close for image in images - unconditional] == [True, False, True]


def test_an_engine_embeds_the_timesteps_of_a_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen = make_network(**SMALL), []
    embed_time = ContextUNet.embed_time

    def watching(self: ContextUNet, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(timesteps)
        return embed_time(self, timesteps)

    monkeypatch.setattr(ContextUNet, "embed_time", watching)
    engine = sf.Engine(network, sf.NoiseSchedule.linear(500), null_label=5, device="cpu", dtype="float32")
    engine.sample(2, steps=6, labels=1, guidance=2.0)
    assert len(seen) == 1


X, T = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
SHAPE_OF_X = "float32 [B, 3, 8, 8]"
SHAPE_OF_LABELS = "int64 [2] or float32 [2, 5]"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X[0], T), f"x is float32 [3, 8, 8]; accepted is {SHAPE_OF_X}"),
        ((X[:, :2], T), f"x is float32 [2, 2, 8, 8]; accepted is {SHAPE_OF_X}"),
        ((X[..., :4], T), f"x is float32 [2, 3, 8, 4]; accepted is {SHAPE_OF_X}"),
        ((X.double(), T), f"x is float64 [2, 3, 8, 8]; accepted is {SHAPE_OF_X}"),
        ((X, T.half()), "timesteps is float16 [2]; accepted is int64, float32 or float64 [B]"),
        ((X, T[:, None]), "timesteps is int64 [2, 1]; accepted is int64, float32 or float64 [B]"),
        ((X, T[:1]), "timesteps is int64 [1]; accepted is int64 [2], as x has"),
        ((X, T, T[:1]), f"labels is int64 [1]; accepted is {SHAPE_OF_LABELS}"),
        ((X, T, T.int()), f"labels is int32 [2]; accepted is {SHAPE_OF_LABELS}"),
        ((X, T, torch.zeros(2, 6)), f"labels is float32 [2, 6]; accepted is {SHAPE_OF_LABELS}"),
        ((X, T, torch.zeros(2, 5).half()), f"labels is float16 [2, 5]; accepted is {SHAPE_OF_LABELS}"),
    ],
)
def test_refuses_inputs_that_do_not_fit(inputs: tuple, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ContextUNet(**SMALL)(*inputs)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: n.predict(X, torch.zeros(2, 95)), "projections is float32 [2, 95]; accepted is [2, 96], as x has"),
        (lambda n: n.predict(X, torch.zeros(1, 96)), "projections is float32 [1, 96]; accepted is [2, 96], as x has"),
        (lambda n: n.condition(torch.zeros(2, 47)), "time_features is float32 [2, 47]; accepted is float32 [B, 48]"),
        (lambda n: n.condition(torch.zeros(48)), "time_features is float32 [48]; accepted is float32 [B, 48]"),
        (
            lambda n: n.condition(torch.zeros(2, 48).half()),
            "time_features is float16 [2, 48]; accepted is float32 [B, 48]",
        ),
    ],
)
def test_refuses_hoisted_inputs_that_do_not_fit(call: Callable[[ContextUNet], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(ContextUNet(**SMALL))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("in_channels", 0, ValueError, "in_channels must be in [1, 16384], got 0"),
        ("in_channels", 3.0, TypeError, "in_channels must be an integer, got 3.0"),
        ("features", 12, ValueError, "features must be a multiple of 8, got 12"),
        ("features", 0, ValueError, "features must be in [8, 16384], got 0"),
        ("context_size", 0, ValueError, "context_size must be in [1, 16384], got 0"),
        ("sample_size", 18, ValueError, "sample_size must be a multiple of 4, got 18"),
        ("sample_size", True, TypeError, "sample_size must be an integer, got True"),
        ("num_timesteps", 0, ValueError, "num_timesteps must be in [1, 2147483648], got 0"),
    ],
)
def test_refuses_arguments_that_do_not_fit(argument: str, value: object, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        ContextUNet(**{argument: value})
    assert str(caught.value) == message
