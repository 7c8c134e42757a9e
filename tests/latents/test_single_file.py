"""Single files have the names that diffusers' converters and its networks have for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfusion.errors import CheckpointError
from stepfusion.latents.autoencoder import autoencoder_from
from stepfusion.latents.clip import TextModel, checked_text_config
from stepfusion.latents.single_file import convert_open_clip, family_of, split_single_file
from stepfusion.latents.single_file_configs import configs_of
from stepfusion.networks.meta import Unfilled
from stepfusion_testing.latent_models import condition_unet, randomised, text_model
from stepfusion_testing.ldm_files import ldm_unet, ldm_vae, open_clip

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

VAE: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_same(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert given.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(given[name], wanted[name]), name


def full(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text model's state with the prefix that files have, whatever this version of transformers has."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return {name if name.startswith("text_projection") else "text_model." + name: t for name, t in plain.items()}


def single_file(family: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A single file, and the networks that it was made of."""
    large = family.startswith("sdxl")
    networks = {"unet": condition_unet(large=large), "vae": randomised(diffusers.AutoencoderKL(**VAE))}
    tensors = prefixed("model.diffusion_model.", ldm_unet(networks["unet"].state_dict(), 2))
    tensors |= prefixed("first_stage_model.", ldm_vae(networks["vae"].state_dict(), 3))
    tensors |= {
        "betas": torch.zeros(10),
        "model_ema.decay": torch.zeros(()),
        "first_stage_model.loss.x": torch.zeros(1),
    }
    if family in ("sd1", "sdxl"):
        networks["text_encoder"] = text_model()
        prefix = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        tensors |= prefixed(f"{prefix}.transformer.", full(networks["text_encoder"].state_dict()))
    if family == "sd2":
        networks["text_encoder"] = text_model(projection=8, layers=4)
        tensors |= prefixed("cond_stage_model.model.", open_clip(networks["text_encoder"].state_dict()))
    if large:
        networks["text_encoder_2"] = text_model(projection=24)
        prefix = f"conditioner.embedders.{int(family == 'sdxl')}.model."
        tensors |= prefixed(prefix, open_clip(networks["text_encoder_2"].state_dict()))
    return tensors, networks


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_a_single_file_becomes_the_networks_that_it_was_made_of(family: str) -> None:
    tensors, networks = single_file(family)
    found = split_single_file(tensors)
    assert found.family == family
    assert_same(found.unet, networks["unet"].state_dict())
    assert_same(found.vae, networks["vae"].state_dict())
    for name in ("text_encoder", "text_encoder_2"):
        wanted = full(networks[name].state_dict()) if name in networks else {}
        if family == "sd2" and wanted:  # without the last layer and the projection
            left_out = ("text_model.encoder.layers.3.", "text_projection")
            wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(left_out)}
        assert_same(getattr(found, name), wanted)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_names_are_those_of_the_converters_of_diffusers(family: str) -> None:
    from diffusers.loaders import single_file_utils as theirs

    tensors, networks = single_file(family)
    found = split_single_file(tensors)
    assert_same(found.unet, theirs.convert_ldm_unet_checkpoint(tensors, networks["unet"].config))
    assert_same(found.vae, theirs.convert_ldm_vae_checkpoint(tensors, networks["vae"].config))
    if family == "sdxl":
        prefix = "conditioner.embedders.1.model."
        converted = theirs.convert_open_clip_checkpoint(networks["text_encoder_2"], tensors, prefix=prefix)
        assert_same(found.text_encoder_2, converted)


def test_what_is_converted_fills_networks() -> None:
    tensors, networks = single_file("sd2")
    found = split_single_file(tensors)
    autoencoder_from({"_class_name": "AutoencoderKL", **VAE}, found.vae)
    config = {**networks["text_encoder"].config.to_dict(), "architectures": ["CLIPTextModel"], "num_hidden_layers": 3}
    model = TextModel(config, found.text_encoder)
    tokens = torch.tensor([5, 6, 7])
    wanted = networks["text_encoder"](tokens[None], output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model(tokens).layers[-1], wanted[0])


@pytest.mark.parametrize(
    ("length", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (1280, "sdxl-refiner"), (100, None)]
)
def test_a_file_without_text_encoders_is_known_by_the_length_of_their_states(length: int, family: str | None) -> None:
    name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    if family is not None:
        assert family_of({name: (320, length)}) == family
        return
    with pytest.raises(CheckpointError, match=r"of none of the families .* have 100 entries"):
        family_of({name: (320, length)})


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("control_model.input_hint_block.0.weight", "has the tensor 'control_model.input_hint_block.0.weight'"),
        ("model.diffusion_model.double_blocks.0.weight", "the UNet has the tensor 'double_blocks.0.weight'"),
        ("model.diffusion_model.input_blocks.1.0.in_layers.5.weight", "the UNet has the tensor"),
        ("first_stage_model.encoder.unknown.weight", "the autoencoder has the tensor 'encoder.unknown.weight'"),
    ],
)
def test_tensors_that_are_not_known_are_named(name: str, sentence: str) -> None:
    tensors, _ = single_file("sd1")
    with pytest.raises(CheckpointError, match=sentence):
        split_single_file({**tensors, name: torch.zeros(1)})


def test_other_files_are_refused() -> None:
    with pytest.raises(CheckpointError, match="the file has no UNet"):
        split_single_file({"net.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"text encoder has the tensor 'visual.proj'"):
        convert_open_clip({"visual.proj": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"text encoder has the tensor 'transformer.resblocks.0.attn.x'"):
        convert_open_clip({"transformer.resblocks.0.attn.x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="family must be one of"):
        configs_of("sd3")


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        ("sdxl", {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_the_networks_of_a_family_have_as_many_weights_as_the_published_ones(
    family: str, sizes: dict[str, int]
) -> None:
    for name, size in sizes.items():
        config = configs_of(family)[name]
        given = {key: value for key, value in config.items() if key not in ("_class_name", "architectures")}
        with torch.device("meta"), Unfilled():
            if name in ("unet", "vae"):
                network = getattr(diffusers, config["_class_name"])(**given)
            else:
                network = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**given))
        assert sum(parameter.numel() for parameter in network.parameters()) == size


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_the_configs_of_a_family_are_configs(family: str) -> None:
    configs = configs_of(family)
    for name in configs.keys() - {"unet", "vae"}:
        kind, config = checked_text_config(configs[name])
        assert kind == ("CLIPTextModelWithProjection" if name == "text_encoder_2" else "CLIPTextModel")
        assert configs["unet"]["cross_attention_dim"] >= config.hidden_size
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        autoencoder_from(configs["vae"], {})
    known = set(inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters)
    assert {key for key in configs["unet"] if key[0] != "_"} <= known
