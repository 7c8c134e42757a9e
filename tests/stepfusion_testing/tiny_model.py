"""A class-conditional UNet of ten thousand parameters for 8x8 images, and its model directory."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.networks import UNet2D, UNet2DConfig

CLASS_NAMES = ("Cat", "Dog", "T-shirt/top")
NULL_LABEL = 3
SIZE = 8
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "prediction_type": "epsilon"}


def tiny_network(**changes: Any) -> UNet2D:
    """Fresh weights, always the same; ``changes`` are entries of its config."""
    config = {
        "sample_size": SIZE,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": False,
        "num_class_embeds": NULL_LABEL + 1,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2D(UNet2DConfig(**config)).eval()


def save_tiny_model(path: Path, **changes: Any) -> Path:
    """Write the model directory, with class names and a null label where the network has classes."""
    for name, data in _saved(tuple(sorted(changes.items()))).items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


@functools.cache
def _saved(changes: tuple[tuple[str, Any], ...]) -> dict[str, bytes]:
    """The files of the model directory: hundreds of tests want them, and to save waits for the disk."""
    network = tiny_network(**dict(changes))
    named = {"class_names": CLASS_NAMES, "null_label": NULL_LABEL} if network.num_classes is not None else {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_pretrained(model, network, SCHEDULER, **named)
        return {str(file.relative_to(model)): file.read_bytes() for file in model.rglob("*") if file.is_file()}
