"""Tiny single files of Stable Diffusion, and the pipelines of diffusers with the same networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stepfusion.checkpoints import single_file
from stepfusion_testing.latent_models import condition_unet, randomised, text_model, write_tokenizer
from stepfusion_testing.ldm_files import ldm_unet, ldm_vae, open_clip

VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def _settings(network: Any) -> dict[str, Any]:
    return {"_class_name": type(network).__name__, **{k: v for k, v in network.config.items() if k[0] != "_"}}


def _full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return {name if name.startswith("text_projection") else "text_model." + name: t for name, t in plain.items()}


class TinyFile:
    """A tiny single file of a family, and the networks that it was made of."""

    def __init__(self, folder: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import diffusers
        import transformers

        torch.manual_seed(0)
        self.path, self.large = folder / "model.safetensors", family.startswith("sdxl")
        self.unet = condition_unet(large=self.large)
        self.vae = randomised(diffusers.AutoencoderKL(**VAE), 0.05)
        size = 16 if self.large else 32
        self.texts = {"text_encoder": text_model(size=size)}
        texts = {"cond_stage_model.transformer.": _full(self.texts["text_encoder"].state_dict())}
        if family == "sdxl":
            self.texts["text_encoder_2"] = text_model(projection=16, size=16)
            second = open_clip(self.texts["text_encoder_2"].state_dict())
            first = _full(self.texts["text_encoder"].state_dict())
            texts = {"conditioner.embedders.0.transformer.": first, "conditioner.embedders.1.model.": second}
        if family == "sdxl-refiner":
            self.texts = {"text_encoder_2": text_model(projection=20)}
            texts = {"conditioner.embedders.0.model.": open_clip(self.texts["text_encoder_2"].state_dict())}
        if family == "sd2":
            whole = text_model(projection=16, layers=4)
            texts = {"cond_stage_model.model.": open_clip(whole.state_dict())}
            config = transformers.CLIPTextConfig(**{**whole.config.to_dict(), "num_hidden_layers": 3})
            self.texts["text_encoder"] = transformers.CLIPTextModel(config).eval()
            kept = {k: v for k, v in _full(whole.state_dict()).items() if not k.startswith("text_projection")}
            names = self.texts["text_encoder"].state_dict()
            self.texts["text_encoder"].load_state_dict(
                {k: kept["text_model." + k.removeprefix("text_model.")] for k in names}
            )
            self.texts["text_encoder"].config.architectures = ["CLIPTextModel"]
        self.tensors = {
            **self._prefixed("model.diffusion_model.", ldm_unet(self.unet.state_dict(), 2)),
            **self._prefixed("first_stage_model.", ldm_vae(self.vae.state_dict(), 2)),
            **{prefix + name: tensor for prefix, state in texts.items() for name, tensor in state.items()},
        }
        configs = {name: _settings(network) for name, network in (("unet", self.unet), ("vae", self.vae))}
        if family == "sdxl-refiner":
            configs["unet"]["num_time_ids"] = 5
        configs |= {name: model.config.to_dict() for name, model in self.texts.items()}
        monkeypatch.setattr(single_file, "configs_of", lambda given: {family: configs}[given])

    def _prefixed(self, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in state.items()}

    def write(self, *, metadata: dict[str, str] | None = None, **others: Tensor) -> Path:
        tensors = {name: tensor.contiguous().clone() for name, tensor in {**self.tensors, **others}.items()}
        save_file(tensors, self.path, metadata)
        return self.path

    def tokenizers(self) -> None:
        for name in self.texts:
            write_tokenizer(self.path.parent / name.replace("text_encoder", "tokenizer"))

    def pipeline(self, prediction: str) -> Any:
        """The pipeline of diffusers with the same networks."""
        import diffusers
        import transformers

        self.tokenizers()
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
        )  # fmt: skip
        parts = {"vae": self.vae, "unet": self.unet, "scheduler": scheduler, **self.texts}
        for name in self.texts:
            folder = name.replace("text_encoder", "tokenizer")
            parts[folder] = transformers.CLIPTokenizer.from_pretrained(str(self.path.parent / folder))
        if self.large:
            without = {"text_encoder": None, "tokenizer": None} if len(self.texts) == 1 else {}
            options = {"add_watermarker": False, "force_zeros_for_empty_prompt": not without}
            return diffusers.StableDiffusionXLPipeline(**parts, **without, **options)
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
