"""The networks that benchmarks run: published UNets with random weights, small ones for rehearsals, and any model
directory. What is measured is time, which weights do not change.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from stepfusion.bench.optional import need
from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.errors import CheckpointError
from stepfusion.networks import ADMUNet, ADMUNetConfig, DiT, UNet2D, UNet2DCondition, UNet2DConfig
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.scheduler_config import read_config
from stepfusion.samplers.table import StepTable

#: google/ddpm-cifar10-32 and google/ddpm-celebahq-256, whose weights are not here.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "celebahq-256": {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    },
    # Stable Diffusion 1.5's widths, layers and latents, and its heads at the first level; without cross-attention
    "sd-class": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["AttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["AttnUpBlock2D"] * 3),
        "attention_head_dim": 40,
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    },
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
}
_COMMON = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "variance_type": "fixed_large",
}
#: guided-diffusion's class-conditional models of these sizes.
_ADM: dict[str, dict[str, Any]] = {
    "adm-64": {
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "attention_resolutions": (32, 16, 8),
        "dropout": 0.1,
    },
    "adm-256": {"image_size": 256, "num_channels": 256, "attention_resolutions": (32, 16, 8)},
    "adm-tiny": {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "num_classes": 4},
}
_ADM_COMMON = {
    "learn_sigma": True,
    "class_cond": True,
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
PUBLISHED = (*_PUBLISHED, *_ADM)
#: Denoisers of latent images, whose tick is counted: Stable Diffusion 1.5's, and facebook/DiT-XL-2-256's.
_LATENT: dict[str, dict[str, Any]] = {
    "sd-1.5": {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768},
    "dit-xl-2": {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": 32,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_layers": 28,
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    },
}
LATENT = tuple(_LATENT)
#: Small ones of the same kinds.
_TINY_LATENT: dict[str, dict[str, Any]] = {
    "tiny-text": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
    "tiny-dit": {
        **_LATENT["dit-xl-2"],
        "sample_size": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_embeds_ada_norm": 10,
    },
}
TINY_LATENT = tuple(_TINY_LATENT)


#: What a benchmark can count or time.
Denoiser = UNet2D | ADMUNet | UNet2DCondition | DiT


def image_shape(network: Denoiser) -> tuple[int, int, int]:
    """Of one image, (C, H, W); ValueError if the network does not say how large it is."""
    size = network.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    if height is None or width is None:
        raise ValueError("model must say its sample_size")
    return network.in_channels, height, width


@dataclass(frozen=True)
class BenchModel:
    """A network in float32 on the CPU, and the scheduler config of its checkpoint."""

    name: str
    network: UNet2D | ADMUNet
    scheduler_config: Mapping[str, Any]
    null_label: int | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image, (C, H, W)."""
        try:
            return image_shape(self.network)
        except ValueError as error:
            raise ValueError(f"{error}, and the config of {self.name} does not") from None

    @property
    def is_diffusers(self) -> bool:
        """Whether diffusers' UNet2DModel is the same network."""
        return isinstance(self.network, UNet2D)

    @property
    def schedule(self) -> NoiseSchedule:
        """Of the scheduler config."""
        return NoiseSchedule.from_config(self.scheduler_config)

    def labels(self, batch: int) -> torch.Tensor | None:
        """One label an image, all classes in turn, int64 [B]; None for a model without classes."""
        classes = self.network.num_classes
        if classes is None:
            return None
        return torch.arange(batch) % (classes if self.null_label is None else classes - 1)

    def diffusers_network(self) -> Any:
        """The same weights in diffusers' UNet2DModel, float32, on the CPU. ImportError without diffusers."""
        assert isinstance(self.network, UNet2D)
        return diffusers_twin(self.network, "UNet2DModel")

    def flops(self, batch: int) -> int:
        """Of one evaluation, matrix products and convolutions, as PyTorch counts them; nothing is computed."""
        network = copy.deepcopy(self.network).to("meta")
        x = torch.empty(batch, *self.image_shape, device="meta")
        timesteps = torch.empty(batch, dtype=torch.int64, device="meta")
        labels = None if self.network.num_classes is None else torch.empty_like(timesteps)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(x, timesteps, labels)
        return int(counter.get_total_flops())

    def evaluation_table(self, timestep: int, rows: int) -> StepTable:
        """A sampler whose state becomes what the network returned: so one evaluation is a table, too."""
        columns = {"clip": np.full(rows, np.inf), "next_out": np.ones(rows)}
        prediction = read_config(self.scheduler_config)[1]
        timesteps = np.full(rows, timestep, dtype=np.int64)
        return StepTable.from_columns("evaluation", prediction, self.schedule, timesteps, columns)


def diffusers_twin(network: UNet2D | UNet2DCondition | DiT, kind: str) -> Any:
    """diffusers' class ``kind`` with the config of a network of ours, and its weights, which both share.

    Raises:
        ImportError: diffusers is not installed.
    """
    config = {k: v for k, v in network.config.to_dict().items() if not k.startswith("_")}
    twin = getattr(need("diffusers"), kind)(**config).eval()
    twin.load_state_dict(network.state_dict(), assign=True)
    return twin


def fill_zeros(network: Denoiser) -> None:
    """Draw the parameters that are zero at first: what they multiply, and so the output, would be zero as well."""
    for parameter in network.parameters():
        if not parameter.is_meta and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


def latent_network(name: str, size: int | None = None) -> UNet2DCondition | DiT:
    """One of :data:`LATENT` or :data:`TINY_LATENT`, its weights as PyTorch's layers make them, on the default device.

    ``size``: height and width of its latents, in place of the config's.
    """
    config = {**_LATENT, **_TINY_LATENT}[name]
    kind = DiT if config["_class_name"] == "DiTTransformer2DModel" else UNet2DCondition
    return kind.from_config(config if size is None else {**config, "sample_size": size})


def load_model(source: str | os.PathLike[str]) -> BenchModel:
    """One of :data:`PUBLISHED` with random weights, always the same; or a bundled model, or a model directory.

    Raises:
        CheckpointError: what is wrong with the directory.
    """
    if source in _PUBLISHED:
        config = UNet2DConfig(**{**_COMMON, **_PUBLISHED[str(source)]})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BenchModel(str(source), UNet2D(config).eval(), _SCHEDULER)
    if source in _ADM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = ADMUNet(ADMUNetConfig(**{**_ADM_COMMON, **_ADM[str(source)]}))
            fill_zeros(network)
            return BenchModel(str(source), network.eval(), _SCHEDULER)
    loaded = load_pretrained(source)
    if not isinstance(loaded.network, UNet2D):
        raise CheckpointError(f"{loaded.path} is a {type(loaded.network).__name__}; peers can run a UNet2D only")
    return BenchModel(loaded.path.name, loaded.network, loaded.scheduler_config, loaded.null_label)
