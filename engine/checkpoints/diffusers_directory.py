"""Model directories: reading networks in the layout of a diffusers pipeline.

Everything that a directory says is checked before it is used: config values, then every weight's name, shape and
dtype against the network that the config describes (built without memory), then every number. No pickle is executed.
The context UNet, which diffusers does not have, is kept in the same layout under the class name "ContextUNet".
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepfusion.checkpoints.bundled import model_directory
from stepfusion.checkpoints.json_file import read_object
from stepfusion.checkpoints.labels import LABELS_FILE, LabelMetadata, read_labels
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.weight_files import find_weights, read_weights
from stepfusion.errors import CheckpointError
from stepfusion.networks import ContextUNet, UNet2D, UNet2DConfig


@dataclass(frozen=True)
class Pretrained(LoadedModel):
    """What a model directory holds.

    Attributes:
        network: in eval mode, float32, on the CPU.
        scheduler_config: the scheduler's config as it stands in the directory; empty if a flat directory has none.
        class_names: the name of each label, or None; the null label, if any, has no name.
        null_label: the label that means "no label" for classifier-free guidance (Ho & Salimans 2022), or None.
        path: the directory.
    """

    network: UNet2D | ContextUNet
    scheduler_config: dict[str, Any]
    class_names: tuple[str, ...] | None
    null_label: int | None
    path: Path


def load_pretrained(source: str | os.PathLike[str]) -> Pretrained:
    """Read a bundled model or a model directory. Nothing is downloaded.

    Args:
        source: a bundled model's name, or the path of a directory in one of two layouts: a diffusers pipeline
            (``unet/config.json``, ``unet/diffusion_pytorch_model.safetensors``, ``scheduler/scheduler_config.json``),
            or flat (the same files in one folder; the scheduler's is optional). Half-precision variants (``.fp16``)
            and ``.bin`` files are read where there is no plain safetensors file, the latter without executing
            anything. A bundled name goes before a directory of that name: write ``./name`` for the directory.

    Raises:
        CheckpointError: a file, key, shape or value is missing or wrong; the sentence names it.
    """
    path = model_directory(source)
    nested = (path / "unet").is_dir()
    folder = path / "unet" if nested else path
    network = _read_network(folder / "config.json")
    scheduler_file = path / "scheduler" / "scheduler_config.json" if nested else path / "scheduler_config.json"
    scheduler = read_object(scheduler_file) if nested or scheduler_file.exists() else {}
    labels_file = path / LABELS_FILE
    labels = read_labels(labels_file, network.num_classes) if labels_file.exists() else LabelMetadata(None, None)
    network.load_state_dict(read_weights(find_weights(folder), network), strict=True, assign=True)
    return Pretrained(network.eval(), scheduler, labels.class_names, labels.null_label, path)


def _read_network(path: Path) -> UNet2D | ContextUNet:
    """The network that a config describes, on the meta device."""
    config = read_object(path)
    try:
        with torch.device("meta"):
            if config.get("_class_name") == "ContextUNet":
                return ContextUNet.from_config(config)
            return UNet2D(UNet2DConfig.from_dict(config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
