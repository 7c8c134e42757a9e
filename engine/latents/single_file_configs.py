"""The configs of the networks in single files, which hold none: those of the families' published models."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from stepfusion.errors import CheckpointError

_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
    "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP],
}
_TEXT_TIME: dict[str, Any] = {
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {
        **_UNET,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        **_UNET,
        **_TEXT_TIME,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN],
        "up_block_types": [_CROSS_UP, _CROSS_UP, _UP],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": {
        **_UNET,
        **_TEXT_TIME,
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": [_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN],
        "up_block_types": [_UP, _CROSS_UP, _CROSS_UP, _UP],
        "transformer_layers_per_block": 4,
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_LARGE_VAE: dict[str, Any] = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
_VAES = {"sd1": _VAE, "sd2": _VAE, "sdxl": _LARGE_VAE, "sdxl-refiner": _LARGE_VAE}

_CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}
_OPEN_CLIP_H: dict[str, Any] = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
_OPEN_CLIP_G: dict[str, Any] = {
    **_CLIP_L,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_TEXTS: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"text_encoder": _CLIP_L},
    "sd2": {"text_encoder": _OPEN_CLIP_H},
    "sdxl": {"text_encoder": _CLIP_L, "text_encoder_2": _OPEN_CLIP_G},
    "sdxl-refiner": {"text_encoder_2": _OPEN_CLIP_G},
}


def configs_of(family: str) -> Mapping[str, dict[str, Any]]:
    """The configs of a family's networks: "unet", "vae", and "text_encoder", "text_encoder_2" or both.

    What a network predicts, noise or velocity, follows from none of its weights: Stable Diffusion 2 has models of
    both kinds, and this says nothing of it. Tokenizers are in no file either.

    Raises:
        CheckpointError: there is no such family.
    """
    if family not in _UNETS:
        raise CheckpointError(f"family must be one of {', '.join(_UNETS)}, got {family!r:.100}")
    return deepcopy({"unet": _UNETS[family], "vae": _VAES[family], **_TEXTS[family]})
