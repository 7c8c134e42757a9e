"""The flags of guided-diffusion and improved-diffusion, and files of other libraries of the same kind."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion.checkpoints.guided_diffusion import their_shapes
from stepfusion.networks import ADMUNet, ADMUNetConfig

SMALL: dict[str, Any] = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "num_heads": 2}
MULT = {"channel_mult": "1,2"}
FLAGS = {**SMALL, **MULT, "attention_resolutions": "8"}

#: ``model_and_diffusion_defaults()`` of the two libraries.
GUIDED: dict[str, Any] = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0,
    "class_cond": False, "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": False,
    "use_fp16": False, "use_new_attention_order": False, "learn_sigma": False, "diffusion_steps": 1000,
    "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False, "predict_xstart": False,
    "rescale_timesteps": False, "rescale_learned_sigmas": False,
}  # fmt: skip
IMPROVED: dict[str, Any] = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "attention_resolutions": "16,8", "dropout": 0.0, "learn_sigma": False, "sigma_small": False,
    "class_cond": False, "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "",
    "use_kl": False, "predict_xstart": False, "rescale_timesteps": True, "rescale_learned_sigmas": True,
    "use_checkpoint": False, "use_scale_shift_norm": True,
}  # fmt: skip


def checkpoint(path: Path, **config: Any) -> Path:
    """Random weights of a small network, as their files have them."""
    given = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "num_heads": 2, "channel_mult": (1, 2),
             "attention_resolutions": (8,), **config}  # fmt: skip
    with torch.device("meta"):
        shapes = their_shapes(ADMUNet(ADMUNetConfig(**given)))
    generator = torch.Generator().manual_seed(0)
    torch.save({name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}, path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("flags", [GUIDED, IMPROVED], ids=["guided", "improved"])
def test_the_whole_default_dictionary_beside_the_file(path: Path, flags: dict[str, Any]) -> None:
    path.with_suffix(".json").write_text(json.dumps({**flags, **FLAGS}))
    loaded = sf.load_guided_diffusion(path)
    assert loaded.network.sample_size == 16
    assert loaded.spec.options["variance"] == "fixed_large"
    assert loaded.network.config.timestep_scale == 1


def test_arguments_of_their_scripts_change_nothing(path: Path) -> None:
    plain = sf.load_guided_diffusion(path, **FLAGS)
    scripts = {"data_dir": "", "schedule_sampler": "uniform", "lr": 1e-4, "batch_size": 1, "microbatch": -1,
               "ema_rate": "0.9999", "log_interval": 10, "use_fp16": True, "use_kl": False}  # fmt: skip
    assert sf.load_guided_diffusion(path, **FLAGS, **scripts).spec == plain.spec
    unclipped = sf.load_guided_diffusion(path, **FLAGS, clip_denoised=False)
    assert (plain.spec.options["clip"], unclipped.spec.options["clip"]) == (1.0, None)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_of_the_images(tmp_path: Path, channels: int) -> None:
    path = checkpoint(tmp_path / "grey.pt", in_channels=channels, learn_sigma=True)
    loaded = sf.load_guided_diffusion(path, **FLAGS, in_channels=channels, learn_sigma=True)
    assert loaded.spec.shape == (channels, 16, 16)
    with pytest.raises(sf.CheckpointError, match=r"misshapen \(input_blocks\.0\.0\.weight"):
        sf.load_guided_diffusion(path, **FLAGS, learn_sigma=True)


def test_the_number_of_classes(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "ten.pt", class_cond=True, num_classes=10)
    loaded = sf.load_guided_diffusion(path, **FLAGS, class_cond=True, num_classes=10)
    assert loaded.spec.num_classes == 10
    assert sf.Engine.from_pretrained(loaded, device="cpu").sample(2, steps=2, labels=[0, 9]).shape == (2, 3, 16, 16)
    with pytest.raises(sf.CheckpointError, match=r"misshapen \(label_emb\.weight \[10, 128\] instead of"):
        sf.load_guided_diffusion(path, **FLAGS, class_cond=True)


@pytest.mark.parametrize(
    ("sizes", "levels"),
    [
        ("8", {1}),
        ("7", {1}),
        ("6", {1}),
        ("5", set()),
        ("20", set()),
        ("16", {0}),
        ("9", {0}),
        ("16,7", {0, 1}),
        ("", set()),
    ],
)
def test_attention_resolutions_are_floored_to_levels(tmp_path: Path, sizes: str, levels: set[int]) -> None:
    """``image_size // size`` in their code: 16 // 7 is level 1, 16 // 5 none, and 16 // 20 is 0."""
    heights = tuple(16 >> level for level in levels)
    path = checkpoint(tmp_path / "model.pt", attention_resolutions=heights)
    network = sf.load_guided_diffusion(path, **SMALL, **MULT, attention_resolutions=sizes).network
    assert {level for level in (0, 1) if network.config.attends(level)} == levels
    exact = sf.load_guided_diffusion(path, **SMALL, **MULT, attention_resolutions=list(heights)).network
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    with torch.no_grad():
        assert torch.equal(network(x, t), exact(x, t))


# rescale_timesteps


@pytest.mark.parametrize(
    ("flags", "scale"),
    [
        ({"rescale_timesteps": True}, 0.25),
        ({"rescale_timesteps": False}, 1.0),
        ({**MULT}, 1.0),
        ({"use_new_attention_order": False}, 1.0),
        ({"sigma_small": True}, 0.25),
        ({**IMPROVED, **SMALL}, 0.25),
        ({**GUIDED, **SMALL, **MULT}, 1.0),
        ({k: v for k, v in {**IMPROVED, **SMALL}.items() if k != "rescale_timesteps"}, 0.25),
    ],
)
def test_rescaling_is_theirs_by_default(tmp_path: Path, flags: dict[str, Any], scale: float) -> None:
    """With T = 4000 the two libraries' defaults differ by a factor of 4 in what the network is told."""
    path = checkpoint(tmp_path / "m.pt", image_size=32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16, 8))
    given = {**SMALL, **flags, "image_size": 32, "diffusion_steps": 4000}
    given |= {"channel_mult": "1,2,2,2"} if "channel_mult" in flags else {}
    assert sf.load_guided_diffusion(path, **given).network.config.timestep_scale == scale


@pytest.mark.parametrize("steps", [4000, 999, 100])
def test_rescaling_that_nobody_knows_is_asked_for(tmp_path: Path, steps: int) -> None:
    path = checkpoint(tmp_path / "m.pt", image_size=32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16, 8))
    given = {**SMALL, "image_size": 32}
    message = rf"rescale_timesteps is not given, and with diffusion_steps = {steps} it changes every image"
    with pytest.raises(sf.CheckpointError, match=message):
        sf.load_guided_diffusion(path, **given, diffusion_steps=steps)
    assert sf.load_guided_diffusion(path, **given).network.config.timestep_scale == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"timestep_respacing": "250"}, "timestep_respacing is '250': leave it out here, and give it as timesteps="),
        ({"large_size": 256}, "large_size is a flag of the super-resolution model, which is not implemented"),
        ({"small_size": 64}, "small_size is a flag of the super-resolution model"),
        ({"classifier_scale": 1.0}, "classifier_scale is unknown; accepted are image_size, in_channels,"),
        ({"image_size": "16"}, "image_size must be an integer, got '16'"),
        ({"learn_sigma": "True"}, "learn_sigma must be True or False, got 'True'"),
        ({"in_channels": 0}, "in_channels must be in"),
        ({"num_classes": None}, "num_classes must be an integer, got None"),
        ({"dropout": "0.1"}, "dropout must be a number, got '0.1'"),
        ({"attention_resolutions": 16}, "attention_resolutions must be a sequence of numbers, got 16"),
        ({"attention_resolutions": [8.5]}, "attention_resolutions must be an integer, got 8.5"),
        ({"channel_mult": {"a": 1}}, "channel_mult must be a sequence of numbers"),
    ],
)
def test_flags_of_another_kind_are_refused(path: Path, flags: dict[str, Any], message: str) -> None:
    for write in (False, True):
        if write:
            path.with_suffix(".json").write_text(json.dumps({**FLAGS, **flags}))
        with pytest.raises(sf.CheckpointError) as caught:
            sf.load_guided_diffusion(path, **({} if write else {**FLAGS, **flags}))
        assert str(caught.value).startswith(f"flags of {path}: {message}")


# Other files


def test_prefixes_of_wrappers(path: Path) -> None:
    plain = sf.load_guided_diffusion(path, **FLAGS).network.state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        state = torch.load(path, weights_only=True)
        torch.save({prefix + key: value for key, value in state.items()}, path.with_name("wrapped.pt"))
        again = sf.load_guided_diffusion(path.with_name("wrapped.pt"), **FLAGS).network.state_dict()
        assert all(torch.equal(plain[key], again[key]) for key in plain)


LUCIDRAINS = "denoising-diffusion-pytorch (lucidrains)"
NOT_READ = "whose networks are not implemented"


def lucidrains() -> dict[str, torch.Tensor]:
    """Some weights by the names of its UNet."""
    names = ("init_conv.weight", "time_mlp.1.weight", "downs.0.0.block1.proj.weight", "mid_block1.block1.proj.weight",
             "ups.0.3.1.weight", "final_res_block.block1.proj.weight", "final_conv.bias")  # fmt: skip
    return {name: torch.ones(2) for name in names}


def trainer_state() -> dict[str, Any]:
    """What its Trainer saves."""
    model = OrderedDict((f"model.{key}", value) for key, value in lucidrains().items())
    model["betas"] = torch.ones(3)
    ema = OrderedDict((f"online_model.{key}", value) for key, value in model.items())
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(10)}
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict()
    return {"step": 10, "model": model, "opt": optimizer, "ema": ema, "scaler": None, "version": "2.1.1"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lucidrains(), f"is a checkpoint of {LUCIDRAINS}, {NOT_READ}"),
        (
            trainer_state(),
            f"is a training state (step, model, opt, ema, scaler, version) of {LUCIDRAINS}, {NOT_READ}",
        ),
        (
            {"model": {f"module.model.{key}": value for key, value in lucidrains().items()}},
            f"is a training state (model) of {LUCIDRAINS}, {NOT_READ}",
        ),
        (
            {"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "epoch": 3},
            "is a training state (state_dict, epoch) of latent-diffusion (CompVis), which is read as a safetensors "
            "file (docs/models.md)",
        ),
        (
            {"all_modules.0.weight": torch.ones(1)},
            f"is a checkpoint of score_sde_pytorch, {NOT_READ}",
        ),
        ({"state": {}, "param_groups": []}, "is the state of an optimizer, and of no network"),
        (
            {"model": {"weight": torch.ones(1)}, "epoch": 3},
            "is a training state (model, epoch), and not a network's state dict: save that alone",
        ),
    ],
    ids=["lucidrains", "its trainer", "in a wrapper", "CompVis", "score_sde", "optimizer", "trainer"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_other_libraries_are_told_apart(tmp_path: Path, state: dict[str, Any], message: str, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    for flags in ({}, SMALL):
        with pytest.raises(sf.CheckpointError) as caught:
            sf.load_guided_diffusion(path, **flags)
        assert str(caught.value) == f"{path} {message}"


def test_their_own_files_are_not_taken_for_others(path: Path) -> None:
    assert sf.load_guided_diffusion(path, **FLAGS).network.sample_size == 16
