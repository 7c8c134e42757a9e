"""What a user names a model by: a bundled name, a model directory, or a checkpoint of guided-diffusion."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stepfusion.checkpoints.diffusers_directory import Pretrained, load_pretrained
from stepfusion.checkpoints.guided_diffusion import GuidedDiffusionModel, load_guided_diffusion
from stepfusion.networks import ADMUNet, ContextUNet, DhariwalUNet, SongUNet, UNet2D


def load_model(source: str | os.PathLike[str]) -> Pretrained | GuidedDiffusionModel:
    """Read a ``.pt`` file (:func:`stepfusion.load_guided_diffusion`), a bundled model or a model directory
    (:func:`stepfusion.load_pretrained`): its ``network``, and its ``spec``, what is known of the model beside it.

    Raises:
        CheckpointError: what is missing or wrong.
    """
    return load_guided_diffusion(source) if os.fspath(source).endswith(".pt") else load_pretrained(source)


def network_config(network: object) -> Mapping[str, Any]:
    """What one of our networks was built from; of any other, no more than the name of its class."""
    if isinstance(network, UNet2D):
        return network.config.to_dict()
    if isinstance(network, ContextUNet):
        return network.to_config()
    if isinstance(network, ADMUNet | SongUNet | DhariwalUNet):
        return {"_class_name": type(network).__name__, **asdict(network.config)}
    return {"_class_name": type(network).__name__}
