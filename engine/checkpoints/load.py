"""What a user names a model by: a bundled name, a model directory, or a file of guided-diffusion or EDM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.checkpoints.edm import load_edm
from stepfusion.checkpoints.guided_diffusion import load_guided_diffusion
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.networks import ADMUNet, ContextUNet, DhariwalUNet, DiT, SongUNet, UNet2D, UNet2DCondition


def load_model(source: str | os.PathLike[str]) -> LoadedModel:
    """Read a ``.pt`` file (:func:`stepfusion.load_guided_diffusion`), a ``.safetensors`` file
    (:func:`stepfusion.load_edm`), a bundled model or a model directory (:func:`stepfusion.load_pretrained`).

    Raises:
        CheckpointError: what is missing or wrong.
    """
    name = os.fspath(source)
    if name.endswith(".safetensors"):
        return load_edm(source)
    return load_guided_diffusion(source) if name.endswith(".pt") else load_pretrained(source)


def network_config(network: object) -> Mapping[str, Any]:
    """What one of our networks was built from; of any other, no more than the name of its class."""
    if isinstance(network, UNet2D):
        return network.config.to_dict()
    if isinstance(network, ContextUNet | UNet2DCondition):
        return network.to_config()
    if isinstance(network, ADMUNet | SongUNet | DhariwalUNet | DiT):
        return {"_class_name": type(network).__name__, **asdict(network.config)}
    return {"_class_name": type(network).__name__}
