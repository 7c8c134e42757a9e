"""`SongUNet` and `DhariwalUNet`: every stage against an independent forward in float64; and what they refuse."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion import kernels
from stepfusion.checkpoints.load import network_config
from stepfusion.execution.evaluator import Evaluator
from stepfusion.kernels import reference
from stepfusion.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig, prepare_network
from stepfusion_testing.edm_forward import Architecture, forward, random_state, shapes

TOLERANCE = 1e-4  # float32 against float64, max abs; stages reach 10
CPU = torch.device("cpu")

DDPMPP = Architecture(16, 16, (1, 2, 2), 2, frozenset({8}), classes=10, augment=9)
NCSNPP = Architecture(
    16, 16, (1, 2, 2), 1, frozenset({8}), noise=2, fourier=True, encoder="residual", taps=(1, 3, 3, 1), augment=9
)
ADM = Architecture(16, 64, (1, 2), 2, frozenset({16, 8}), adm=True, classes=10, augment=9)
CASES: dict[str, tuple[Architecture, tuple[int, int]]] = {
    "DDPM++, labels": (DDPMPP, (16, 16)),
    "DDPM++, 5 channels, not square": (Architecture(8, 20, (1, 3), 1, frozenset({4}), channels=5), (8, 12)),
    "NCSN++": (NCSNPP, (16, 16)),
    "NCSN++, labels, 7 channels, not square": (
        Architecture(
            12, 12, (2, 1, 1), 2, frozenset({6}), channels=7, classes=3, noise=2, fourier=True, encoder="residual",
            taps=(1, 3, 3, 1),
        ),
        (12, 20),
    ),
    "skips of images, 6 taps": (
        Architecture(8, 8, (1, 2, 3), 1, frozenset(), encoder="skip", decoder="skip", taps=(1, 4, 5, 5, 4, 1)),
        (8, 16),
    ),
    "residual by means": (Architecture(8, 8, (1, 2), 1, frozenset(), encoder="residual"), (8, 8)),
    "a concatenation without a shortcut": (Architecture(8, 16, (1, 1, 2), 1, frozenset()), (8, 8)),
    "ADM, labels": (ADM, (16, 16)),
    "ADM, heads of 80, 7 channels, not square": (
        Architecture(8, 160, (1, 1), 1, frozenset({8, 4}), adm=True, channels=7), (8, 12),
    ),
    "ADM too narrow to attend": (Architecture(8, 32, (1, 2), 1, frozenset({8, 4}), adm=True, classes=2), (8, 8)),
    "one level": (Architecture(8, 16, (1,), 1, frozenset({8})), (8, 8)),
}  # fmt: skip


def config_of(a: Architecture, **others: Any) -> SongUNetConfig | DhariwalUNetConfig:
    """The config of an architecture."""
    fields: dict[str, Any] = {
        "img_resolution": a.height, "in_channels": a.channels, "out_channels": a.channels, "label_dim": a.classes,
        "augment_dim": a.augment, "model_channels": a.width, "channel_mult": a.mults, "num_blocks": a.blocks,
        "attn_resolutions": sorted(a.attention),
    }  # fmt: skip
    if a.adm:
        return DhariwalUNetConfig(**{**fields, **others})
    song = {"embedding_type": "fourier" if a.fourier else "positional", "channel_mult_noise": a.noise}
    song |= {"encoder_type": a.encoder, "decoder_type": a.decoder, "resample_filter": a.taps}
    return SongUNetConfig(**{**fields, **song, **others})


def make(a: Architecture, **others: Any) -> SongUNet | DhariwalUNet:
    """The network with random weights, which are loaded strictly."""
    config = config_of(a, **others)
    network = SongUNet(config) if isinstance(config, SongUNetConfig) else DhariwalUNet(config)
    network.load_state_dict(random_state(a), strict=True)
    return network.eval()


def inputs(a: Architecture, size: tuple[int, int], batch: int = 3) -> tuple[torch.Tensor, ...]:
    """x, c_noise, and labels if there are any: the last is the null label."""
    torch.manual_seed(1)
    x, t = torch.randn(batch, a.channels, *size), torch.tensor([-1.55, 0.013, 1.09])[:batch]
    labels = (torch.tensor([0, a.classes - 1, a.classes])[:batch],) if a.classes else ()
    return (x, t, *labels)


def classes_of(a: Architecture, *labels: torch.Tensor) -> torch.Tensor | None:
    """Labels as one-hot vectors, the null label as zeros."""
    return torch.eye(a.classes + 1)[labels[0]][:, : a.classes] if a.classes else None


@torch.no_grad()
def errors(network: SongUNet | DhariwalUNet, a: Architecture, size: tuple[int, int]) -> dict[str, float]:
    """The largest difference of every stage from the independent forward."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in (*network.enc.items(), *network.dec.items()):
        side = "enc" if name in network.enc and network.enc[name] is module else "dec"
        if not name.endswith("aux_norm"):
            module.register_forward_hook(lambda _, __, out, key=f"{side}.{name}": seen.__setitem__(key, out))
    x, t, *labels = inputs(a, size)
    seen["out"] = network(x, t, *labels)
    expected = forward(network.state_dict(), a, x, t, classes_of(a, *labels))
    assert seen.keys() == expected.keys()
    assert float(expected["out"].std()) > 0.1
    return {stage: float((seen[stage].double() - value).abs().max()) for stage, value in expected.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_stage_equals_an_independent_forward(case: str) -> None:
    a, size = CASES[case]
    found = errors(make(a), a, size)
    assert {stage: error for stage, error in found.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_architecture(case: str) -> None:
    a, _ = CASES[case]
    assert {key: tuple(value.shape) for key, value in make(a).state_dict().items()} == shapes(a)


@pytest.mark.parametrize(
    ("a", "wrong"),
    [
        (DDPMPP, "skip_scale"),
        (DDPMPP, "norm_eps"),
        (DDPMPP, "label"),
        (DDPMPP, "heads"),
        (NCSNPP, "taps"),
        (NCSNPP, "phase"),
        (ADM, "skip_scale"),
        (ADM, "label"),
        (ADM, "heads"),
    ],
)
def test_the_comparison_sees_a_wrong_network(a: Architecture, wrong: str) -> None:
    """The negative control, for constants that no weight holds."""
    network = make(a)
    for part in network.modules():
        if wrong == "norm_eps" and isinstance(part, torch.nn.GroupNorm):
            part.eps = 1e-3
        elif wrong == "skip_scale" and hasattr(part, "skip_scale"):
            part.skip_scale = 0.5**0.5 if a.adm else 1.0
        elif wrong == "heads" and getattr(part, "heads", 0):
            part.heads = 4
        elif wrong == "taps" and hasattr(part, "resample_filter"):
            part.plain = True
            part.padding = 0
    with torch.no_grad():
        if wrong == "phase":
            network.map_noise.freqs *= 1.01
        x, t, *labels = inputs(a, (16, 16))
        shifted = [(labels[0] + 1) % a.classes] if wrong == "label" else labels
        out = network(x, t, *shifted)
        expected = forward(random_state(a), a, x, t, classes_of(a, *labels))["out"]
    assert float((out.double() - expected).abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize("case", ["DDPM++, labels", "NCSN++", "ADM, labels"])
@torch.no_grad()
def test_the_time_path_can_be_hoisted(case: str) -> None:
    """Rows computed once for a table of noise levels and gathered give the same output, as an engine does it."""
    a, size = CASES[case]
    network = make(a)
    x, t, *labels = inputs(a, size)
    whole = network(x, t, *labels)
    rows = network.condition(network.embed_time(t), *labels)
    assert rows.shape == (3, network.projection_size)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(network.predict(x[order], rows[order]), whole[order], rtol=0, atol=1e-5)
    evaluator = Evaluator(network, bool(labels))
    assert evaluator.hoisted
    features = evaluator.features(t)
    given = labels[0] if labels else torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(evaluator.network(x, features, given), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_fused_norms_give_the_same_output(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The concatenation, and what time adds, go into the norm; its kernel has tests of its own, here is its twin."""
    called: list[bool] = []

    def twin(*args: Any, **options: Any) -> torch.Tensor:
        called.append(options["skip"] is not None)
        return reference.group_norm_silu(*args, **options)

    monkeypatch.setattr(kernels, "group_norm_silu", twin)
    a, size = CASES[case]
    network = make(a)
    fused = prepare_network(network, CPU, torch.float64, fused=True)
    x, *others = inputs(a, size)
    wanted = prepare_network(network, CPU, torch.float64, fused=False)(x.double(), *others)
    assert not called
    for _ in range(2):  # what is folded, and what was kept
        torch.testing.assert_close(fused(x.double(), *others), wanted, rtol=0, atol=1e-6)
    assert True in called
    assert fused.state_dict().keys() == network.state_dict().keys()


@pytest.mark.interpreter
@torch.no_grad()
def test_the_norms_of_the_kernels_give_the_same_output() -> None:
    a = Architecture(8, 8, (1, 1), 1, frozenset({8}), fourier=True, encoder="residual", taps=(1, 3, 3, 1))
    network = make(a)
    fused = prepare_network(network, CPU, torch.float32, fused=True)
    given = inputs(a, (8, 8), 1)
    torch.testing.assert_close(fused(*given), network(*given), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["DDPM++, labels", "NCSN++", "ADM, labels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float64(case: str, dtype: torch.dtype) -> None:
    a, size = CASES[case]
    network = make(a)
    x, t, *labels = inputs(a, size)
    half = prepare_network(network, CPU, dtype, fused=False)
    out = half(x.to(dtype), t, *labels)
    truth = prepare_network(half, CPU, torch.float64, fused=False)(x.to(dtype).double(), t, *labels)
    assert out.dtype == dtype
    error = (out.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 8 * torch.finfo(dtype).eps


@torch.no_grad()
def test_frequencies_keep_their_precision() -> None:
    """Rounded to bfloat16, waves of 16 cycles would be out of phase."""
    network = make(NCSNPP)
    assert network.map_noise is not None
    exact = network.map_noise.freqs.clone()
    t = torch.tensor([-1.55, 1.09])
    waves = network.embed_time(t)
    half = copy.deepcopy(network).bfloat16()
    assert half.embed_time(t).dtype == torch.bfloat16
    torch.testing.assert_close(half.embed_time(t).float(), waves, rtol=0, atol=2**-8)
    assert torch.equal(half.map_noise.freqs, exact)
    assert torch.equal(half.float().map_noise.freqs, exact)
    assert copy.deepcopy(network).double().map_noise.freqs.dtype == torch.float64
    assert copy.deepcopy(network).half().to("meta").map_noise.freqs.dtype == torch.float32


@pytest.mark.parametrize("case", ["DDPM++, labels", "NCSN++", "ADM, labels"])
@torch.no_grad()
def test_integers_are_noise_levels_too(case: str) -> None:
    a, size = CASES[case]
    network = make(a)
    x, _, *labels = inputs(a, size)
    t = torch.tensor([3, 0, -2])
    assert torch.equal(network(x, t, *labels), network(x, t.float(), *labels))
    torch.testing.assert_close(network(x, t.double(), *labels), network(x, t.float(), *labels), rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_of_augmentation_change_nothing() -> None:
    network = make(DDPMPP)
    given = inputs(DDPMPP, (16, 16))
    before = network(*given)
    network.map_augment.weight.fill_(1e3)
    assert torch.equal(network(*given), before)


@torch.no_grad()
def test_attention_follows_weights_that_change() -> None:
    """Its rows are put in order in every call, unless the network is fused."""
    network = prepare_network(make(ADM), CPU, torch.float64, fused=False)
    x, *others = inputs(ADM, (16, 16))
    network(x.double(), *others)
    state = random_state(ADM, seed=5)
    network.load_state_dict(state)
    expected = forward(state, ADM, x, others[0], classes_of(ADM, others[1]))["out"]
    torch.testing.assert_close(network(x.double(), *others), expected, rtol=0, atol=1e-5)


def test_gradients_reach_every_weight() -> None:
    for a in (DDPMPP, NCSNPP, ADM):
        network = make(a).train()
        network(*inputs(a, (16, 16))).square().mean().backward()
        for name, parameter in network.named_parameters():
            assert (parameter.grad is None) == name.startswith("map_augment"), name
            assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_dropout_is_off_in_eval_mode() -> None:
    network = make(DDPMPP, dropout=0.5)
    given = inputs(DDPMPP, (16, 16))
    assert torch.equal(network(*given), network(*given))
    assert not torch.equal(network.train()(*given), network.eval()(*given))


@pytest.mark.parametrize("case", ["NCSN++, labels, 7 channels, not square", "ADM, labels"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.soak)])
@torch.no_grad()
def test_compiles_as_one_graph(case: str, backend: str) -> None:
    """As it was captured; in the soak tests it is taken apart into operators as well."""
    a, size = CASES[case]
    network = make(a)
    given = inputs(a, size)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*given), network(*given), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_empty_batch_and_channels_last() -> None:
    network = make(NCSNPP)
    assert network(torch.empty(0, 3, 16, 16), torch.empty(0)).shape == (0, 3, 16, 16)
    x, t = inputs(NCSNPP, (16, 16))
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    out = other(x.to(memory_format=torch.channels_last), t)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, network(x, t), rtol=0, atol=1e-5)


class TestEngine:
    def test_what_a_spec_reads(self) -> None:
        network = make(CASES["NCSN++, labels, 7 channels, not square"][0], img_resolution=(12, 20))
        schedule = sf.NoiseSchedule.linear(1000)
        engine = sf.Engine(network, schedule, null_label=3, device="cpu", dtype="float32", network="eager")
        assert engine.shape == (7, 12, 20)
        assert engine.num_classes == 4
        images = engine.sample(2, steps=2, labels=[0, 3], progress=False)
        assert images.shape == (2, 7, 12, 20)
        alone = engine.sample(1, steps=2, labels=0, progress=False)
        torch.testing.assert_close(images[:1], alone, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("a", [DDPMPP, ADM], ids=["DDPM++", "ADM"])
    def test_kernels_of_the_cpu_give_the_same_images(self, a: Architecture) -> None:
        schedule = sf.NoiseSchedule.linear(1000)
        images = []
        for how in ("auto", "eager"):
            engine = sf.Engine(make(a), schedule, device="cpu", dtype="float32", network=how)
            images.append(engine.sample(2, steps=2, labels=[1, 9], progress=False))
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)

    def test_what_it_was_built_from(self) -> None:
        noted = network_config(make(ADM))
        assert noted["_class_name"] == "DhariwalUNet"
        assert noted["channel_mult"] == (1, 2)


SONG: dict[str, Any] = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8}
SONG |= {"channel_mult": (1, 2), "num_blocks": 1}


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"img_resolution": 9}, "img_resolution must be a multiple of 2, for there are 2 levels, got 9"),
            ({"img_resolution": (8, 9)}, "img_resolution must be a multiple of 2, for there are 2 levels, got 9"),
            ({"img_resolution": (8, 8, 8)}, "img_resolution must be a size or (height, width), got (8, 8, 8)"),
            ({"img_resolution": "8"}, "img_resolution must be an integer, got '8'"),
            ({"in_channels": 0}, "in_channels must be in [1, 16384], got 0"),
            ({"label_dim": -1}, "label_dim must be in [0, 1048576], got -1"),
            ({"model_channels": 7}, "model_channels must be an even number from 4 on, got 7"),
            ({"model_channels": 2}, "model_channels must be an even number from 4 on, got 2"),
            (
                {"model_channels": 200},
                "model_channels times channel_mult must give norms of at least 4 channels that are a multiple of "
                "their 32 groups, got a norm of 200 channels",
            ),
            ({"channel_mult": 2}, "channel_mult must be a sequence of integers, got 2"),
            ({"channel_mult": ()}, "channel_mult must have 1 to 16 entries, got 0"),
            ({"channel_mult": (1, 9999)}, "model_channels times channel_mult must be at most 16384, got 79992"),
            ({"dropout": 1.5}, "dropout must be a finite number in [0, 1], got 1.5"),
            ({"embedding_type": "zero"}, "embedding_type must be one of 'positional', 'fourier', got 'zero'"),
            ({"encoder_type": "x"}, "encoder_type must be one of 'standard', 'skip', 'residual', got 'x'"),
            ({"decoder_type": "residual"}, "decoder_type must be one of 'standard', 'skip', got 'residual'"),
            ({"resample_filter": (1, 2, 1)}, "resample_filter must have an even number of taps from 2 to 16, got 3"),
        ],
    )
    def test_configs_of_song(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            SongUNetConfig(**{**SONG, **fields})
        assert str(error.value) == message

    def test_heads_that_do_not_divide(self) -> None:
        message = r"^model_channels times channel_mult must be a multiple of the 3 heads of an attention, got 224$"
        with pytest.raises(ValueError, match=message):
            DhariwalUNetConfig(8, 3, 3, model_channels=224, channel_mult=(1,))

    def test_other_configs(self) -> None:
        with pytest.raises(TypeError, match=r"^config must be a SongUNetConfig, got dict$"):
            SongUNet({})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^config must be a DhariwalUNetConfig, got SongUNetConfig$"):
            DhariwalUNet(SongUNetConfig(**SONG))  # type: ignore[arg-type]

    @pytest.mark.parametrize("labels", [0, 3])
    def test_inputs(self, labels: int) -> None:
        network = SongUNet(SongUNetConfig(**SONG, label_dim=labels))
        x, t, k = torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        right = k if labels else None
        cases: dict[tuple[Any, ...], str] = {
            (x[:, :1], t, right): "x is float32 [2, 1, 8, 8]; accepted is float32 [B, 3, H, W]",
            (x[:, :, :7], t, right): "x is float32 [2, 3, 7, 8]; accepted are height and width "
            "that are multiples of 2",
            (x, t[:1], right): "timesteps is float32 [1]; accepted is float32 [2], as x has",
            (x, t.half(), right): "timesteps is float16 [2]; accepted is int64, float32 or float64 [B]",
            (x, t[:, None], right): "timesteps is float32 [2, 1]; accepted is int64, float32 or float64 [B]",
        }
        if labels:
            missing = "class_labels is None; this network is conditioned on a class and needs them"
            cases[x, t, None] = missing
            cases[x, t, t] = "class_labels is float32 [2]; accepted is int64 [2], as timesteps has"
            with pytest.raises(ValueError) as error:
                network.condition(network.embed_time(t))
            assert str(error.value) == missing
        else:
            cases[x, t, k] = "class_labels is given; this network takes none"
        for arguments, message in cases.items():
            with pytest.raises(ValueError) as error:
                network(*arguments)
            assert str(error.value) == message


def test_published_architectures_have_their_parameters() -> None:
    """CIFAR-10 and ImageNet-64 of the paper (table 7), without memory: 55.7 million, and 295.9 million."""
    cifar = SongUNetConfig(32, 3, 3, augment_dim=9, channel_mult=(2, 2, 2))
    imagenet = DhariwalUNetConfig(64, 3, 3, label_dim=1000)
    with torch.device("meta"):
        counts = [
            sum(math.prod(p.shape) for p in network.parameters()) / 1e6
            for network in (SongUNet(cifar), DhariwalUNet(imagenet))
        ]
    assert [round(count, 1) for count in counts] == [55.7, 295.9]
