"""`ADMUNet` and the checkpoints of guided-diffusion: every stage against an independent forward in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.checkpoints.guided_diffusion import our_weights, their_shapes
from stepfusion.checkpoints.guided_flags import PUBLISHED
from stepfusion.commands import main as cli
from stepfusion.export import export_program
from stepfusion.networks import ADMUNet, ADMUNetConfig
from stepfusion_testing.adm_forward import Architecture, forward, random_state, shapes

TOLERANCE = 1e-4  # float32 against float64, max abs; stages reach 15, the output 3

ADM_64 = Architecture(
    width=64,
    mults=(1, 2, 3, 4),
    blocks=3,
    attention=frozenset({1, 2, 3}),
    heads=-64,
    updown=True,
    classes=True,
    new_order=True,
)
ADM_256 = Architecture(
    width=32, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=frozenset({3, 4, 5}), heads=-64, updown=True
)
FLAGS_64 = {**PUBLISHED["64x64_diffusion"], "num_channels": 64}
FLAGS_256 = {**PUBLISHED["256x256_diffusion_uncond"], "num_channels": 32}
IMPROVED = {"image_size": 32, "num_channels": 32, "learn_sigma": True, "num_heads": 4}
SMALL = Architecture(width=32, mults=(1, 2, 2, 2), blocks=2, attention=frozenset({1, 2}), heads=4, updown=False)
TINY = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_heads": 2}
TINY |= {"attention_resolutions": "8", "learn_sigma": True, "class_cond": True}
CASES: dict[str, tuple[Architecture, dict[str, Any], int]] = {
    "ADM-64, class-conditional, new order": (ADM_64, FLAGS_64, 16),
    "ADM-64 in the legacy order": (
        Architecture(**{**vars(ADM_64), "new_order": False}),
        {**FLAGS_64, "use_new_attention_order": False},
        8,
    ),
    "ADM-256, unconditional": (ADM_256, FLAGS_256, 64),
    "ADM-256, class-conditional": (
        Architecture(**{**vars(ADM_256), "classes": True}),
        {**FLAGS_256, "class_cond": True},
        32,
    ),
    "improved-diffusion, convolutions resample": (SMALL, IMPROVED, 16),
    "time added, fixed variance": (
        Architecture(**{**vars(SMALL), "scale_shift": False, "learn_sigma": False, "blocks": 1}),
        {**IMPROVED, "use_scale_shift_norm": False, "learn_sigma": False, "num_res_blocks": 1},
        8,
    ),
}


def save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_every_stage_equals_an_independent_forward(case: str, tmp_path: Path) -> None:
    """From the file on: names, orders and shapes of the checkpoint, then each stage's output."""
    architecture, flags, size = CASES[case]
    state = random_state(architecture)
    network = sf.load_guided_diffusion(save(tmp_path / "model.pt", state), **flags).network
    seen: dict[str, torch.Tensor] = {}
    for name, stage in network.named_modules():
        if (name.startswith(("input_blocks.", "output_blocks.")) and name.count(".") == 1) or name == "middle_block":
            stage.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    x, t = torch.randn(2, 3, size, size), torch.tensor([999, 17])
    labels = torch.tensor([3, 999]) if architecture.classes else None
    with torch.no_grad():
        seen["out"] = network(x, t, labels)
    expected = forward(state, architecture, x, t, labels)
    assert seen.keys() == expected.keys()
    for stage, value in expected.items():
        assert float((seen[stage].double() - value).abs().max()) <= TOLERANCE, stage
    assert float(expected["out"].std()) > 0.1


def test_the_wrong_attention_order_is_seen(tmp_path: Path) -> None:
    """The negative control: the same file read in the other order gives other images."""
    state = random_state(ADM_64)
    x, t, labels = torch.randn(1, 3, 8, 8), torch.tensor([500]), torch.tensor([3])
    wrong = {**FLAGS_64, "use_new_attention_order": False}
    network = sf.load_guided_diffusion(save(tmp_path / "model.pt", state), **wrong).network
    with torch.no_grad():
        out = network(x, t, labels)
    assert float((out.double() - forward(state, ADM_64, x, t, labels)["out"]).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("64x64_diffusion", 295_904_454),
        ("256x256_diffusion", 553_838_086),
        ("256x256_diffusion_uncond", 552_814_086),  # 1000 x 1024 of the class embedding fewer
    ],
)
def test_published_models_have_the_published_parameters(model: str, parameters: int) -> None:
    """Every name and shape too, against those that follow from the architecture."""
    network = published(model)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    flags = PUBLISHED[model]
    architecture = Architecture(
        width=flags["num_channels"],
        mults=(1, 2, 3, 4) if model.startswith("64") else (1, 1, 2, 2, 4, 4),
        blocks=flags["num_res_blocks"],
        attention=frozenset({1, 2, 3} if model.startswith("64") else {3, 4, 5}),
        heads=-64,
        updown=True,
        classes=flags["class_cond"],
    )
    assert their_shapes(network) == shapes(architecture)


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_published_model_can_be_built(model: str) -> None:
    network = published(model)
    assert network.sample_size == PUBLISHED[model]["image_size"]
    assert network.out_channels == 6
    assert (network.num_classes == 1000) == PUBLISHED[model]["class_cond"]


def published(model: str) -> ADMUNet:
    """A published architecture without memory."""
    flags = PUBLISHED[model]
    heads = {"num_heads": flags["num_heads"]} if flags["num_head_channels"] == -1 else {"num_head_channels": 64}
    same = ("image_size", "num_channels", "num_res_blocks", "class_cond", "learn_sigma", "resblock_updown")
    with torch.device("meta"):
        return ADMUNet(
            ADMUNetConfig(attention_resolutions=(32, 16, 8), **heads, **{name: flags[name] for name in same})
        )


def tiny(tmp_path: Path, name: str = "tiny.pt") -> Path:
    """A checkpoint of a small class-conditional model, with its flags beside it."""
    architecture = Architecture(32, (1, 2), 1, frozenset({1}), 2, False, classes=True)
    path = save(tmp_path / name, random_state(architecture))
    path.with_suffix(".json").write_text(json.dumps(TINY))
    return path


class TestEngine:
    def test_one_line(self, tmp_path: Path) -> None:
        path = tiny(tmp_path)
        engine = sf.Engine.from_pretrained(path, device="cpu")
        assert engine.shape == (3, 16, 16)
        assert engine.num_classes == 1000
        assert engine.options["variance"] == "learned_range"
        images = engine.sample(2, steps=2, labels=[0, 999])
        assert images.shape == (2, 3, 16, 16)
        loaded = sf.load_guided_diffusion(path)
        again = sf.Engine.from_pretrained(loaded, device="cpu").sample(2, steps=2, labels=[0, 999])
        assert torch.equal(images, again)
        assert not torch.equal(images[:1], engine.sample(1, steps=2, labels=[1]))

    def test_ancestral_sampling_heeds_the_learned_variance(self, tmp_path: Path) -> None:
        engine = sf.Engine.from_pretrained(tiny(tmp_path), device="cpu")
        table = engine.table("ddpm", 3)
        assert table.learned_variance
        fixed = engine.table("ddpm", 3, variance="fixed_small")
        assert not torch.equal(engine.sample(1, table, labels=0), engine.sample(1, fixed, labels=0))

    @pytest.mark.parametrize(
        ("flags", "schedule", "prediction", "variance"),
        [
            ({}, sf.NoiseSchedule.linear(1000), "epsilon", "learned_range"),
            ({"noise_schedule": "cosine"}, sf.NoiseSchedule.cosine(1000), "epsilon", "learned_range"),
            ({"diffusion_steps": 4000}, sf.NoiseSchedule.linear(4000), "epsilon", "learned_range"),
            ({"predict_xstart": True}, sf.NoiseSchedule.linear(1000), "sample", "learned_range"),
        ],
    )
    def test_flags_of_the_diffusion(
        self, tmp_path: Path, flags: dict[str, Any], schedule: sf.NoiseSchedule, prediction: str, variance: str
    ) -> None:
        engine = sf.Engine.from_pretrained(sf.load_guided_diffusion(tiny(tmp_path), **flags), device="cpu")
        torch.testing.assert_close(
            torch.tensor(engine.schedule.betas), torch.tensor(schedule.betas), rtol=1e-12, atol=0
        )
        assert engine.prediction == prediction
        assert engine.options["variance"] == variance

    def test_rescaled_timesteps(self, tmp_path: Path) -> None:
        """With T = 4000, the network is told a quarter of the timestep."""
        path = tiny(tmp_path)
        plain = sf.load_guided_diffusion(path).network
        rescaled = sf.load_guided_diffusion(path, diffusion_steps=4000, rescale_timesteps=True).network
        t = torch.tensor([0, 400, 3996])
        with torch.no_grad():
            torch.testing.assert_close(rescaled.embed_time(t), plain.embed_time(t // 4))
            assert not torch.allclose(rescaled.embed_time(t), plain.embed_time(t))

    def test_a_published_name_needs_no_flags(self, tmp_path: Path) -> None:
        """The file is found wanting, not the flags: an empty file of that name lacks every key."""
        torch.save({}, tmp_path / "64x64_diffusion.pt")
        missing = rf"does not fit its flags: {len(shapes(ADM_64))} missing \(input_blocks\.0\.0\.bias,"
        with pytest.raises(sf.CheckpointError, match=missing):
            sf.Engine.from_pretrained(tmp_path / "64x64_diffusion.pt")

    def test_the_command_line(self, tmp_path: Path) -> None:
        out = tmp_path / "images"
        arguments = [
            "sample",
            str(tiny(tmp_path)),
            "--device",
            "cpu",
            "-n",
            "1",
            "--labels",
            "7",
            "--single",
            "--quiet",
        ]
        assert cli.main([*arguments, "--timesteps", "ddim2", "--out", str(out)]) == 0
        assert [path.name for path in out.iterdir()] == ["0-0.png"]

    def test_export(self, tmp_path: Path) -> None:
        engine = sf.Engine.from_pretrained(tiny(tmp_path), device="cpu")
        program = export_program(engine)
        x, t, labels = torch.randn(3, 3, 16, 16), torch.tensor([5, 0, 999]), torch.tensor([1, 2, 3])
        with torch.no_grad():
            expected = engine.network(x, t, labels)
        torch.testing.assert_close(program.module()(x, t, labels), expected, rtol=0, atol=1e-4)

    @pytest.mark.slow
    def test_compiled(self, tmp_path: Path) -> None:
        architecture = Architecture(32, (1,), 1, frozenset({0}), 2, False)
        path = save(tmp_path / "one_level.pt", random_state(architecture))
        flags = {**TINY, "channel_mult": "1", "attention_resolutions": "16", "class_cond": False}
        model = sf.load_guided_diffusion(path, **flags)
        eager = sf.Engine.from_pretrained(model, device="cpu", dtype="float32").sample(1, steps=2)
        compiled = sf.Engine.from_pretrained(model, device="cpu", dtype="float32", network="compile")
        torch.testing.assert_close(compiled.sample(1, steps=2), eager, rtol=0, atol=1e-3)


@pytest.mark.interpreter
@pytest.mark.parametrize("shift", [True, False])
def test_fused_norms_give_the_same_network(shift: bool) -> None:
    """The concatenation, the time and its scale and shift go through the fused norm."""
    torch.manual_seed(0)
    config = ADMUNetConfig(
        image_size=8,
        num_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 1),
        attention_resolutions=(),
        num_heads=1,
        use_scale_shift_norm=shift,
        resblock_updown=True,
    )
    network = ADMUNet(config).eval()
    fused = sf.networks.prepare_network(network, torch.device("cpu"), torch.float32, fused=True)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([9])
    with torch.no_grad():
        torch.testing.assert_close(fused(x, t), network(x, t), rtol=0, atol=1e-4)


class TestRefused:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"image_sise": 64}, r"flags of .*: image_sise is unknown; accepted are image_size, .*"),
            (
                {"image_size": 48},
                r"flags of .*: channel_mult is needed for image_size 48: only 32, 64, 128, 256, 512 .*",
            ),
            (
                {"num_channels": 33},
                r".*: num_channels times channel_mult must be multiples of 32 up to 16384, got 33",
            ),
            ({"num_heads": 3}, r".*: num_heads must divide the 64 channels of an attention, got 3"),
            ({"num_head_channels": 48}, r".*: num_head_channels must divide the 64 channels of an attention, got 48"),
            ({"attention_resolutions": "0"}, r".*: attention_resolutions must be in \[1, 65536\], got 0"),
            ({"attention_resolutions": "a"}, r".*: attention_resolutions must be numbers with commas .*, got 'a'"),
            (
                {"channel_mult": "1,2,2,2,2,2"},
                r".*: image_size must be a multiple of 32, for there are 6 levels, got 16",
            ),
            ({"class_cond": 1}, r".*: class_cond must be True or False, got 1"),
            ({"noise_schedule": "sigmoid"}, r".*: noise_schedule must be one of 'linear', 'cosine', got 'sigmoid'"),
            ({"diffusion_steps": 0}, r".*: diffusion_steps must be at least 1, got 0"),
            ({"class_cond": False}, r".* does not fit its flags: 1 unexpected \(label_emb\.weight\)"),
            (
                {"learn_sigma": False},
                r".*: 2 misshapen \(out\.2\.weight \[6, 32, 3, 3\] instead of \[3, 32, 3, 3\], .*\)",
            ),
        ],
    )
    def test_flags(self, tmp_path: Path, flags: dict[str, Any], message: str) -> None:
        path = tiny(tmp_path)
        if "image_size" in flags:
            path.with_suffix(".json").unlink()
        with pytest.raises(sf.CheckpointError, match=f"^{message}$"):
            sf.load_guided_diffusion(path, **flags)

    def test_a_file_without_flags(self, tmp_path: Path) -> None:
        path = save(tmp_path / "mine.pt", {})
        with pytest.raises(sf.CheckpointError, match=r"^.*mine\.pt does not say its architecture: give the flags .*"):
            sf.load_guided_diffusion(path)
        with pytest.raises(ValueError, match=r"^model must be one of '64x64_diffusion', .*, got 'adm'$"):
            sf.load_guided_diffusion(path, model="adm")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(sf.CheckpointError, match=r"^.*nowhere\.pt is missing$"):
            sf.Engine.from_pretrained(tmp_path / "nowhere.pt")

    def test_values_that_are_not_finite(self, tmp_path: Path) -> None:
        path = tiny(tmp_path)
        state = torch.load(path, weights_only=True)
        state["out.2.bias"][0] = math.nan
        torch.save(state, path)
        with pytest.raises(sf.CheckpointError, match=r"^.*tiny\.pt: out\.2\.bias has values that are not finite$"):
            sf.load_guided_diffusion(path)

    def test_inputs(self) -> None:
        sizes: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1)}
        network = ADMUNet(ADMUNetConfig(attention_resolutions=(), **sizes))
        x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
        for arguments, message in {
            (x[:, :1], t, None): "x is float32 [2, 1, 8, 8]; accepted is float32 [B, 3, H, W]",
            (
                x[:, :, :7],
                t,
                None,
            ): "x is float32 [2, 3, 7, 8]; accepted are height and width that are multiples of 2",
            (x, t[:1], None): "timesteps is int64 [1]; accepted is int64 [2], as x has",
            (x, t.int(), None): "timesteps is int32 [2]; accepted is int64, float32 or float64 [B]",
            (x, t, t): "class_labels is given; this network takes none",
        }.items():
            with pytest.raises(ValueError) as error:
                network(*arguments)
            assert str(error.value) == message
        with pytest.raises(TypeError, match=r"^config must be an ADMUNetConfig, got dict$"):
            ADMUNet({})  # type: ignore[arg-type]


def test_conversion_is_a_permutation() -> None:
    """Every number of a checkpoint arrives, once."""
    architecture = Architecture(32, (1, 2), 1, frozenset({1}), 2, False)
    network = ADMUNet(
        ADMUNetConfig(
            image_size=16,
            num_channels=32,
            num_res_blocks=1,
            channel_mult=(1, 2),
            attention_resolutions=(8,),
            num_heads=2,
            learn_sigma=True,
        )
    )
    state = random_state(architecture)
    for legacy in (True, False):
        ours = our_weights(state, network, legacy=legacy)
        theirs, found = (torch.cat([v.flatten() for v in s.values()]).sort().values for s in (state, ours))
        assert torch.equal(theirs, found)
