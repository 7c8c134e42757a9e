"""Model directories: reading networks in the layout of a diffusers pipeline.

Everything that a directory says is checked before it is used: config values, then every weight's name, shape and
dtype against the network that the config describes (built without memory), then every number. No pickle is executed.
The context UNet, which diffusers does not have, is kept in the same layout under the class name "ContextUNet".
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfusion.checkpoints.bundled import model_directory
from stepfusion.checkpoints.json_file import read_object
from stepfusion.checkpoints.labels import LABELS_FILE, LabelMetadata, check_labels, read_labels
from stepfusion.checkpoints.latent_parts import LatentParts, read_parts
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.lora_files import Lora, LoraFiles
from stepfusion.checkpoints.pipeline import INDEX_FILE, Layout, find_layout, read_scheduler
from stepfusion.checkpoints.weight_files import find_weights, read_weights
from stepfusion.errors import CheckpointError
from stepfusion.model_spec import ModelSpec
from stepfusion.networks import ContextUNet, DiT, UNet2D, UNet2DCondition, UNet2DConfig
from stepfusion.networks.meta import Unfilled

_UNCOUNTED = {
    "timestep": "class_embed_type is 'timestep', and num_class_embeds does not say how many labels there are",
    "identity": "class_embed_type is 'identity', which takes a vector in place of a label, and is not implemented",
}


@dataclass(frozen=True, repr=False)
class Pretrained(LoadedModel):
    """What a model directory holds.

    Attributes:
        network: in eval mode, float32, on the CPU.
        scheduler_config: the scheduler's config as it stands in the directory, under the class that the pipeline
            loads it into; empty if there is none.
        class_names: the name of each label, or None; the null label, if any, has no name.
        null_label: the label that means "no label" for classifier-free guidance (Ho & Salimans 2022), or None.
        path: the directory.
        parts: what stands around the network, if its images are latents.
    """

    network: UNet2D | ContextUNet | UNet2DCondition | DiT
    scheduler_config: dict[str, Any]
    class_names: tuple[str, ...] | None
    null_label: int | None
    path: Path
    parts: LatentParts = field(default_factory=LatentParts)

    def around(self, spec: ModelSpec) -> dict[str, Any]:
        """Text encoder, decoder and encoder of a latent pipeline, by the names of an engine's arguments."""
        return self.parts.arguments(spec)

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """What text encoder and autoencoder hold."""
        yield from self.parts.contents()


def load_pretrained(
    source: str | os.PathLike[str], *, variant: str | None = None, lora: Lora | None = None
) -> Pretrained:
    """Read a bundled model or a model directory. Nothing is downloaded.

    Args:
        source: a bundled model's name, or the path of a directory: a diffusers pipeline (``unet/config.json``,
            ``unet/diffusion_pytorch_model.safetensors``, ``scheduler/scheduler_config.json``, and of a latent one
            ``vae``, ``text_encoder``, ``tokenizer``, or ``transformer`` in place of ``unet``), the network's folder
            of one, whose scheduler is the pipeline's, or everything in one folder, in which the scheduler may be
            missing. A bundled name goes before a directory of that name: write ``./name`` for the directory.
        variant: which weights, if there are several: the part of their file's name, such as "fp16" or "ema". By
            default those without one; then safetensors files, then ``.bin`` files, which are read without executing
            anything. Shards are read by their ``.index.json`` file.
        lora: safetensors files of LoRA weights, which are added to those of network and text encoders in their
            order: one path, several, or each with how strongly it is added, ``[("style.safetensors", 0.7), ...]``
            or ``{"style.safetensors": 0.7, ...}``.

    Raises:
        CheckpointError: a file, key, shape or value is missing or wrong, or the pipeline has a part that is not
            implemented; the sentence names it.
    """
    layout = find_layout(model_directory(source))
    loras = LoraFiles(lora)
    parts = read_parts(layout.around, layout.settings, loras)
    network = _read_network(layout.network / "config.json", parts)
    parts.check(network, layout.root)
    scheduler = read_scheduler(layout)
    labels = _read_labels(layout, network)
    weights = loras.merged_network(read_weights(find_weights(layout.network, variant), network))
    network.load_state_dict(weights, strict=True, assign=True)
    return Pretrained(network.eval(), scheduler, labels.class_names, labels.null_label, layout.root, parts)


def _read_network(path: Path, parts: LatentParts) -> UNet2D | ContextUNet | UNet2DCondition | DiT:
    """The network that a config describes, on the meta device."""
    config = read_object(path)
    kind = config.get("_class_name")
    try:
        with torch.device("meta"), Unfilled():
            if kind == "ContextUNet":
                return ContextUNet.from_config(config)
            if kind == "DiTTransformer2DModel":
                return DiT.from_config(config)
            if kind == "UNet2DConditionModel":
                return UNet2DCondition.from_config(config, **parts.network_arguments(config))
            network = UNet2D(UNet2DConfig.from_dict(config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if network.class_embedding is not None and network.num_classes is None:
        raise CheckpointError(f"{path}: {_UNCOUNTED[str(network.config.class_embed_type)]}")
    return network


def _read_labels(layout: Layout, network: UNet2D | ContextUNet | UNet2DCondition | DiT) -> LabelMetadata:
    """The labels in our own file, or those that a pipeline of DiT names by ``id2label``."""
    file = layout.root / LABELS_FILE
    if file.exists():
        return read_labels(file, network.num_classes)
    names = layout.settings.get("id2label")
    null_label = network.null_label if isinstance(network, DiT) else None
    if names is None or null_label is None:
        return LabelMetadata(None, null_label)
    where = str(layout.root / INDEX_FILE)
    if not isinstance(names, dict) or set(names) != {str(label) for label in range(null_label)}:
        raise CheckpointError(f"{where}: id2label must name each of the labels 0 to {null_label - 1}")
    ordered = [names[str(label)] for label in range(null_label)]
    return check_labels({"class_names": ordered, "null_label": null_label}, network.num_classes, where)
