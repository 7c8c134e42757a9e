"""Directories of whole pipelines: their parts, their scheduler, and the conditions of their network."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.engine import Engine
from stepfusion.errors import CheckpointError
from stepfusion_testing.tiny_model import SCHEDULER, save_tiny_model, tiny_network

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMPipeline,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)

UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def change(path: Path, **changes: Any) -> None:
    """Write other entries into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Parts


def test_a_decoder_for_other_latents_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_tiny_model(tmp_path / "model")
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=8, latent_channels=3)
    vqvae.save_pretrained(tmp_path / "model/vqvae")
    change(tmp_path / "model/model_index.json", vqvae=["diffusers", "VQModel"])
    assert (
        refusal(tmp_path / "model") == f"{tmp_path}/model: the autoencoder's latents have 3 channels, the network's 1"
    )


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("vae", ["diffusers", "AutoencoderKLWan"], "latents"),
        ("movq", ["diffusers", "VQModel"], "latents"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "does not make the pipeline's images"),
        ("bert", ["latent_diffusion", "LDMBertModel"], "does not make the pipeline's images"),
        ("unet_2", ["diffusers", "UNet2DModel"], "does not make the pipeline's images"),
    ],
)
def test_other_parts_are_refused_by_name(tmp_path: Path, part: str, value: list[str], reason: str) -> None:
    model = save_tiny_model(tmp_path / "model")
    change(model / "model_index.json", **{part: value})
    message = refusal(model)
    assert f"the pipeline's part '{part}' ({value[1]}) is not implemented" in message
    assert reason in message


def test_what_changes_no_image_is_accepted(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    change(
        model / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=[None, None],
        vae=[None, None],
        requires_safety_checker=False,
        _diffusers_version="0.4.0",
    )
    (model / "vae").mkdir()
    assert load_pretrained(model).class_names is not None


@pytest.mark.parametrize("value", [["diffusers"], [1, 2], ["diffusers", None], ["a", "b", "c"]])
def test_parts_of_another_form_are_refused(tmp_path: Path, value: Any) -> None:
    model = save_tiny_model(tmp_path / "model")
    change(model / "model_index.json", unet=value)
    assert "'unet' must be a library and a class, got" in refusal(model)


# The scheduler


def test_a_networks_folder_has_the_pipelines_scheduler(tmp_path: Path) -> None:
    """Its default was taken, epsilon, whatever ``../scheduler`` said."""
    model = save_tiny_model(tmp_path / "model")
    change(model / "scheduler/scheduler_config.json", prediction_type="v_prediction", timestep_spacing="trailing")
    whole, part = load_pretrained(model), load_pretrained(model / "unet")
    assert part.scheduler_config == whole.scheduler_config
    assert (part.path, part.class_names, part.null_label) == (whole.path, whole.class_names, whole.null_label)
    assert part.spec == whole.spec
    assert part.spec.prediction == "v_prediction"
    shutil.copytree(model / "unet", model / "unet_ema")
    assert load_pretrained(model / "unet_ema").spec == whole.spec
    alone = shutil.copytree(model / "unet", tmp_path / "unet")
    assert load_pretrained(alone).scheduler_config == {}


def test_a_relative_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    change(model / "scheduler/scheduler_config.json", prediction_type="sample")
    for folder, source in ((model / "unet", "."), (model, "unet"), (tmp_path, "model/unet/")):
        monkeypatch.chdir(folder)
        assert load_pretrained(Path(source)).spec.prediction == "sample"


def test_two_schedulers_that_disagree_are_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    own = model / "unet/scheduler_config.json"
    shutil.copy(model / "scheduler/scheduler_config.json", own)
    change(own, _diffusers_version="0.1")
    assert load_pretrained(model / "unet").scheduler_config["num_train_timesteps"] == 100
    change(own, prediction_type="sample")
    assert refusal(model / "unet").startswith(
        f"{own} and {model}/scheduler/scheduler_config.json say different things"
    )
    assert load_pretrained(model).spec.prediction == "epsilon"


def test_the_pipeline_says_which_scheduler_its_config_is_loaded_into(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    change(model / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    loaded = load_pretrained(model)
    assert loaded.scheduler_config["_class_name"] == "PNDMScheduler"
    with pytest.warns(UserWarning, match="this model's scheduler is PNDMScheduler: it is sampled by DDIM"):
        assert loaded.spec.options["final_alpha_cumprod"] == pytest.approx(loaded.spec.schedule.alphas_cumprod[0])
    change(model / "model_index.json", scheduler=["mine", "MyScheduler"])
    assert load_pretrained(model).scheduler_config["_class_name"] == "DDPMScheduler"


def test_a_pndm_pipeline_is_sampled_with_a_word(tmp_path: Path) -> None:
    torch.manual_seed(0)
    PNDMPipeline(UNet2DModel(**UNET), PNDMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.warns(
        UserWarning,
        match="PNDMScheduler: it is sampled by DDIM unless another .*; its own images come with sampler='plms'",
    ):
        engine = Engine.from_pretrained(tmp_path / "model", device="cpu")
    assert engine.sample(1, steps=2).shape == (1, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, with NumPy 2
def test_ddim_made_from_dpm_solver(tmp_path: Path) -> None:
    """``lambda_min_clipped: -Infinity`` was not JSON, ``variance_type: null`` no variance."""
    torch.manual_seed(0)
    solver = DPMSolverMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    saved = json.loads(solver.to_json_string())
    for name, made in {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}.items():
        DDPMPipeline(UNet2DModel(**UNET), made.from_config(saved)).save_pretrained(tmp_path / name)
        text = (tmp_path / name / "scheduler/scheduler_config.json").read_text()
        assert '"lambda_min_clipped": -Infinity' in text
        assert load_pretrained(tmp_path / name).spec.options["clip"] is None
    PNDMPipeline(UNet2DModel(**UNET), PNDMScheduler()).save_pretrained(tmp_path / "solver")
    solver.save_pretrained(tmp_path / "solver/scheduler")
    change(tmp_path / "solver/model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    with pytest.warns(UserWarning, match="its own images come with sampler='dpmpp_2m'"):
        assert load_pretrained(tmp_path / "solver").spec.table("dpmpp_2m", 10).history


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scheduler/scheduler_config.json", '{"beta_end": -Infinity}'),
        ("scheduler/scheduler_config.json", '{"lambda_min_clipped": NaN}'),
        ("scheduler/scheduler_config.json", '{"trained_betas": [0.1, Infinity]}'),
        ("scheduler/scheduler_config.json", '{"lambda_min_clipped": [-Infinity]}'),
        ("model_index.json", '{"lambda_min_clipped": -Infinity}'),
        ("unet/config.json", '{"lambda_min_clipped": -Infinity}'),
        ("stepfusion.json", '{"null_label": Infinity}'),
        ("stepfusion.json", '{"class_names": ' + "[" * 70 + "]" * 70 + "}"),
    ],
)
def test_no_other_number_is_infinite(tmp_path: Path, name: str, text: str) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / name).write_text(text)
    assert refusal(model).startswith(f"{model / name} is not JSON: ")


def test_plus_infinity_bounds_nothing(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    change(model / "scheduler/scheduler_config.json", lambda_min_clipped=math.inf)
    with pytest.raises(CheckpointError, match="lambda_min_clipped must be a number or -Infinity"):
        _ = load_pretrained(model).spec


# Conditions of the network


def test_labels_embedded_as_timesteps_are_honoured(tmp_path: Path) -> None:
    """They were dropped: images of no class, and giving labels was refused."""
    torch.manual_seed(0)
    theirs = UNet2DModel(**UNET, class_embed_type="timestep", num_class_embeds=5).eval()
    DDPMPipeline(theirs, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model", device="cpu", dtype="float32", network="eager")
    assert engine.num_classes == 5
    start, labels = torch.randn(3, 3, 8, 8), [0, 3, 4]
    table = engine.table("ddim", 2, compat="diffusers")
    ours = engine.sample(table=table, start=start, labels=labels)
    scheduler, x = DDIMScheduler(clip_sample=False), start
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(theirs(x, t, torch.tensor(labels)).sample, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-3 * float(x.abs().max()))
    others = engine.sample(table=table, start=start, labels=[1, 1, 1])
    assert (others - ours).abs().max() > 0.01 * ours.abs().max()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\], got 5"):
        engine.sample(1, table, labels=5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"class_embed_type": "timestep"},
            "class_embed_type is 'timestep', and num_class_embeds does not say how many",
        ),
        (
            {"class_embed_type": "identity"},
            "class_embed_type is 'identity', which takes a vector in place of a label",
        ),
        ({"class_embed_type": "identity", "num_class_embeds": 3}, "class_embed_type is 'identity', which takes"),
        ({"class_embed_type": "projection"}, "the UNet config has class_embed_type = 'projection'"),
        ({"class_embed_type": "simple_projection"}, "the UNet config has class_embed_type = 'simple_projection'"),
    ],
)
def test_other_conditions_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    model = save_tiny_model(tmp_path / "model", num_class_embeds=None)
    change(model / "unet/config.json", **config)
    assert refusal(model).startswith(f"{model}/unet/config.json: {message}")


def test_an_engine_of_a_network_whose_labels_have_no_number_makes_no_images() -> None:
    network = tiny_network(num_class_embeds=None, class_embed_type="timestep")
    engine = Engine(network, Engine.from_pretrained("fashion-mnist", device="cpu").schedule, device="cpu")
    with pytest.raises(ValueError, match="class_labels is None; this network is conditioned on a class"):
        engine.sample(1, steps=2)


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    network = tiny_network(
        class_embed_type="timestep", num_class_embeds=4, down_block_types=("ResnetDownsampleBlock2D",)
    )
    save_pretrained(tmp_path / "model", network, SCHEDULER, class_names=("a", "b", "c"), null_label=3)
    read = load_pretrained(tmp_path / "model")
    assert read.network.config == network.config
    assert read.spec.num_classes == 4
