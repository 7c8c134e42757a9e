"""Autoencoders decode and encode as diffusers' own, and refuse what does not fit."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfusion.errors import CheckpointError
from stepfusion.execution.decoder import decode_batches, decoder_on
from stepfusion.latents import autoencoder
from stepfusion.latents.autoencoder import LatentDecoder, LatentEncoder, autoencoder_from
from stepfusion_testing.latent_models import randomised

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
TINY = {"encoder_block_out_channels": [16, 16], "decoder_block_out_channels": [16, 16]}
TINY |= {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
CONFIGS: dict[str, dict[str, Any]] = {
    "kl": {"_class_name": "AutoencoderKL", **SMALL, "scaling_factor": 0.3},
    "shifted": {"_class_name": "AutoencoderKL", **SMALL, "shift_factor": 0.2, "use_quant_conv": False},
    "standardised": {
        "_class_name": "AutoencoderKL",
        **SMALL,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.0, 2.0, 0.5, 1.5],
    },
    "vq": {"_class_name": "VQModel", **SMALL, "num_vq_embeddings": 32, "vq_embed_dim": 4},
    "tiny": {"_class_name": "AutoencoderTiny", **TINY},
}


def theirs(config: dict[str, Any]) -> Any:
    kind = getattr(diffusers, config["_class_name"])
    return randomised(kind(**{key: value for key, value in config.items() if key[0] != "_"}))


def scale_back(config: dict[str, Any], network: Any, latents: Tensor) -> Tensor:
    z = latents / network.config.scaling_factor
    if "latents_std" in config:
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        return latents * std / network.config.scaling_factor + mean
    return z + (config.get("shift_factor") or 0)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """Equal within rounding of the largest number."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_is_that_of_diffusers_and_of_one_latent(name: str) -> None:
    config = CONFIGS[name]
    network = theirs(config)
    decoder = LatentDecoder.from_config(config, network.state_dict())
    latents = torch.randn(3, decoder.space.channels, 8, 6)
    images = decoder(latents)
    assert images.dtype == torch.float32
    assert images.shape == (3, 3, 8 * decoder.space.factor, 6 * decoder.space.factor)
    assert_near(images, network.decode(scale_back(config, network, latents)).sample)
    assert_near(images[1:2], decoder(latents[1:2]))


@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_is_that_of_diffusers(name: str) -> None:
    config = CONFIGS[name]
    network = theirs(config)
    encoder = LatentEncoder.from_config(config, network.state_dict())
    images = torch.rand(2, 3, 16, 8) * 2 - 1
    encoded = network.encode(images)
    z = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    torch.testing.assert_close(scale_back(config, network, encoder(images)), z)
    with pytest.raises(ValueError, match="multiples of 2"):
        encoder(images[..., :7])


def test_a_decoder_is_small_frozen_and_its_own() -> None:
    network = theirs(CONFIGS["kl"])
    decoder = LatentDecoder.from_config(CONFIGS["kl"], network.state_dict())
    assert not any("encoder" in name for name, _ in decoder.named_parameters())
    assert not decoder.training
    assert not any(p.requires_grad for p in decoder.parameters())
    assert not any(tensor.is_meta for tensor in (*decoder.parameters(), *decoder.buffers()))


def test_a_codebook_is_searched_in_float32_whatever_the_dtype_is() -> None:
    state = theirs(CONFIGS["vq"]).state_dict()
    latents = torch.randn(2, 4, 4, 4)
    wanted = LatentDecoder.from_config(CONFIGS["vq"], state)(latents)
    given = LatentDecoder.from_config(CONFIGS["vq"], state, dtype=torch.bfloat16)(latents)
    torch.testing.assert_close(given, wanted, rtol=0, atol=0.1 * float(wanted.abs().max()))


@pytest.mark.parametrize("tile", [None, 8])
def test_few_images_are_coded_at_a_time(monkeypatch: pytest.MonkeyPatch, tile: int | None) -> None:
    config = CONFIGS["kl"]
    tensors = theirs(config).state_dict()
    coders = LatentDecoder.from_config(config, tensors, tile=tile), LatentEncoder.from_config(config, tensors)
    latents = torch.randn(5, 4, 12, 8)
    images = coders[0](latents)
    both = images, coders[1](images)
    sizes: dict[str, list[int]] = {"decoder": [], "encoder": []}
    for coder, name in zip(coders, sizes, strict=True):
        part = getattr(coder, name)
        part.register_forward_pre_hook(lambda module, given, name=name: sizes[name].append(len(given[0])))
    pixels = images.shape[-1] ** 2 if tile else images.shape[-1] * images.shape[-2]
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 2 * pixels + 1)
    assert_near(coders[0](latents), both[0])
    assert sizes["decoder"] == ([2, 2, 2, 2, 1, 1] if tile else [2, 2, 1])
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 1)
    assert_near(coders[1](images), both[1])
    assert sizes["encoder"] == [1] * 5


def test_a_decoder_is_what_an_engine_decodes_with() -> None:
    decoder = LatentDecoder.from_config(CONFIGS["vq"], theirs(CONFIGS["vq"]).state_dict())
    latents = torch.randn(3, 4, 4, 4)
    ours = decoder_on(decoder, torch.device("cpu"))
    assert ours is decoder
    assert_near(decode_batches(ours, latents, 2), decoder(latents))
    assert_near(decode_batches(copy.deepcopy(decoder), latents, 1), decoder(latents))


def test_weights_with_the_names_of_2022_are_read() -> None:
    network = theirs(CONFIGS["kl"])
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state = {}
    for name, tensor in network.state_dict().items():
        for today, before in old.items():
            name = name.replace(today, before) if "attentions" in name else name
        state[name] = tensor
    assert any("proj_attn" in name for name in state)
    for name, parameter in autoencoder_from(CONFIGS["kl"], state).named_parameters():
        assert torch.equal(parameter, network.get_parameter(name))


@pytest.mark.parametrize("tile", [8, 10])
def test_tiles_are_close_to_a_whole_decode(tile: int) -> None:
    decoder = LatentDecoder.from_config(CONFIGS["kl"], theirs(CONFIGS["kl"]).state_dict())
    latents = torch.randn(2, 4, 8, 19)
    whole = decoder(latents)
    small = decoder(latents[..., :8])
    decoder.tile = tile
    tiled = decoder(latents)
    assert tiled.shape == whole.shape
    assert (tiled - whole).square().mean() < 0.3 * whole.var()
    assert torch.equal(decoder(latents[..., :8]), small)


def test_tiles_of_a_local_decoder_are_its_whole_image() -> None:
    from stepfusion.latents.tiles import decode_tiles

    def double(z: Tensor) -> Tensor:
        return z.repeat_interleave(2, -1).repeat_interleave(2, -2)

    z = torch.randn(2, 3, 13, 29)
    for tile in (4, 8, 11, 13, 28, 29, 64):
        torch.testing.assert_close(decode_tiles(double, z, tile), double(z))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["kl", "vq"])
def test_fused_norms_decode_and_encode_the_same(name: str) -> None:
    config = {**CONFIGS[name], "block_out_channels": [16, 32]}
    state = theirs(config).state_dict()
    decoder, encoder = LatentDecoder.from_config(config, state), LatentEncoder.from_config(config, state)
    latents, images = torch.randn(1, 4, 3, 2), torch.rand(1, 3, 4, 4)
    for module, given in ((decoder, latents), (encoder, images)):
        plain = module(given)
        module.fuse(True)
        fused = module(given)
        assert not torch.equal(plain, fused), "the control: the kernels ran"
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
        module.fuse(None)
        assert torch.equal(module(given), plain)


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_half_precision_is_refused_by_force_upcast(upcast: bool, dtype: torch.dtype) -> None:
    config = {**CONFIGS["kl"], "force_upcast": upcast}
    state = theirs(config).state_dict()
    assert next(autoencoder_from(config, state, dtype=torch.float16).parameters()).dtype == dtype
    decoder = LatentDecoder.from_config(config, state, dtype=torch.bfloat16)
    assert next(decoder.parameters()).dtype == torch.bfloat16
    latents = torch.randn(1, 4, 4, 4)
    assert decoder(latents).dtype == torch.float32
    reference = LatentDecoder.from_config(config, state)(latents)
    torch.testing.assert_close(decoder(latents), reference, rtol=0.1, atol=0.1 * float(reference.abs().max()))


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "decoder.conv_in.weight"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without, "the autoencoder .* lacks the tensor 'decoder.conv_in.weight'"),
        (lambda s: {**s, "decoder.extra": torch.zeros(1)}, "has no place for the tensor 'decoder.extra'"),
        (lambda s: {**s, "decoder.conv_in.bias": torch.zeros(3)}, r"decoder.conv_in.bias is float32 \[3\]; accepted"),
        (lambda s: {**s, "decoder.conv_in.bias": torch.zeros(64).int()}, "accepted is floating point"),
        (lambda s: {**s, "decoder.conv_in.bias": torch.full((64,), torch.nan)}, "not finite"),
        (lambda s: {**s, "decoder.conv_in.bias": torch.zeros(64, device="meta")}, "on the meta device"),
        (lambda s: {**s, "decoder.conv_in.bias": [0.0] * 64}, "is list; accepted is a tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[..., Any], sentence: str) -> None:
    state = theirs(CONFIGS["kl"]).state_dict()
    with pytest.raises(CheckpointError, match=sentence):
        autoencoder_from(CONFIGS["kl"], change(dict(state)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"_class_name": "AutoencoderOobleck"}, "_class_name of an autoencoder must be one of"),
        ({"_class_name": None}, "_class_name"),
        ({"block_out_channels": [30, 60]}, "multiples of norm_num_groups"),
        ({"block_out_channels": [32]}, "the same length"),
        ({"block_out_channels": [32, 1 << 20]}, "at most"),
        ({"up_block_types": ["UpBlock", "UpDecoderBlock2D"]}, "up_block_types"),
        ({"scaling_factor": 0.0}, "above 0"),
        ({"scaling_factor": float("nan")}, "finite"),
        ({"layers_per_block": "2"}, "an integer"),
        ({"act_fn": "eval"}, "act_fn must be one of"),
        ({"unheard_of": 1}, "unheard_of is unknown"),
        ({"latents_mean": [1.0]}, "latents_mean must have latent_channels"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        autoencoder_from({**CONFIGS["kl"], **change}, {})


@pytest.mark.parametrize(
    ("latents", "error", "sentence"),
    [
        (torch.zeros(1, 3, 4, 4), ValueError, r"latents must be floating point \[n, 4, height, width\]"),
        (torch.zeros(4, 4, 4), ValueError, "latents"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), ValueError, "int64"),
        ([[0.0]], TypeError, "latents must be a tensor"),
    ],
)
def test_latents_that_do_not_fit_are_refused(latents: Any, error: type[Exception], sentence: str) -> None:
    decoder = LatentDecoder.from_config(CONFIGS["kl"], theirs(CONFIGS["kl"]).state_dict())
    with pytest.raises(error, match=sentence):
        decoder(latents)


def test_without_diffusers_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"needs the package 'diffusers': pip install stepfusion\[latent\]"):
        autoencoder_from(CONFIGS["kl"], {})
