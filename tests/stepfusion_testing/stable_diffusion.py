"""A directory of Stable Diffusion that is small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion_testing.latent_models import condition_unet, randomised, text_model, write_tokenizer


def autoencoder(kind: str = "AutoencoderKL", **options: Any) -> Any:
    """One whose latents are half as large as images."""
    import diffusers

    torch.manual_seed(1)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    return randomised(getattr(diffusers, kind)(**{**blocks, **options}), 0.05)


def scheduler(**options: Any) -> Any:
    """Stable Diffusion's."""
    import diffusers

    known = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    return diffusers.DDIMScheduler(**{**known, "set_alpha_to_one": False, "steps_offset": 1, **options})


def tokenizer(path: Path) -> Any:
    """A tokenizer whose files are written there."""
    import transformers

    return transformers.CLIPTokenizer.from_pretrained(str(write_tokenizer(path)), local_files_only=True)


def stable_diffusion(path: Path, **options: Any) -> Any:
    """A pipeline, whose tokenizer's files are written to ``path``; ``options`` are other parts."""
    import diffusers

    torch.manual_seed(0)
    parts = {
        "vae": autoencoder(),
        "text_encoder": text_model(),
        "tokenizer": tokenizer(path),
        "unet": condition_unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    kind = options.pop("kind", diffusers.StableDiffusionPipeline)
    return kind(**{**parts, **options}, requires_safety_checker=False)


def save_stable_diffusion(path: Path) -> Path:
    """Write such a directory, with images of 16 by 16 pixels and latents of 8 by 8."""
    tokens = path.with_name(f"{path.name}-tokenizer")
    stable_diffusion(tokens).save_pretrained(path)
    return path


def save_lora(path: Path, model: Path) -> Path:
    """Write random LoRA weights for one layer of such a directory's UNet."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = load_pretrained(model).network.state_dict()[f"{layer}.weight"]
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    save_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, path)
    return path
