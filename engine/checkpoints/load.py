"""What a user names a model by: a bundled name, a model directory, or a file of three kinds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stepfusion.checkpoints.diffusers_directory import load_pretrained
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.lora_files import Lora
from stepfusion.errors import CheckpointError
from stepfusion.networks import ADMUNet, ContextUNet, DhariwalUNet, DiT, SongUNet, UNet2D, UNet2DCondition

_PICKLES = (".ckpt", ".pkl")
_NO_LORA = "files of EDM and of guided-diffusion"


def load_model(source: str | os.PathLike[str] | LoadedModel, lora: Lora | None = None) -> LoadedModel:
    """Read a ``.pt`` file (:func:`stepfusion.load_guided_diffusion`), a ``.safetensors`` file, which the names in its
    header say to be one of Stable Diffusion (:func:`stepfusion.load_single_file`) or of EDM
    (:func:`stepfusion.load_edm`), a bundled model or a model directory (:func:`stepfusion.load_pretrained`).

    What was read already is returned as it is. ``lora`` is as for :func:`stepfusion.load_pretrained`.

    Raises:
        CheckpointError: what is missing or wrong.
        ValueError: nothing of a LoRA can be added to this model.
    """
    if isinstance(source, LoadedModel):
        _refuse(lora, "a model that was read already: give it to the function that reads the model")
        return source
    name = os.fspath(source)
    if name.endswith(".safetensors"):
        return _safetensors(source, lora)
    if name.endswith(_PICKLES) and os.path.isfile(name):
        raise CheckpointError(f"{name} is a pickle, which can run code and is not opened: docs/models.md says more")
    if not name.endswith(".pt"):
        return load_pretrained(source, lora=lora)
    _refuse(lora, _NO_LORA)
    from stepfusion.checkpoints.guided_diffusion import load_guided_diffusion  # who has no such file need not wait

    return load_guided_diffusion(source)


def _safetensors(source: str | os.PathLike[str], lora: Lora | None) -> LoadedModel:
    from stepfusion.checkpoints.edm import load_edm
    from stepfusion.checkpoints.single_file import holds_single_file, load_single_file

    if holds_single_file(source):
        return load_single_file(source, lora=lora)
    _refuse(lora, _NO_LORA)
    return load_edm(source)


def _refuse(lora: Lora | None, what: str) -> None:
    if lora is not None:
        raise ValueError(f"lora cannot be added to {what}")


def network_config(network: object) -> Mapping[str, Any]:
    """What one of our networks was built from; of any other, no more than the name of its class."""
    if isinstance(network, UNet2D):
        return network.config.to_dict()
    if isinstance(network, ContextUNet | UNet2DCondition | DiT):
        return network.to_config()
    if isinstance(network, ADMUNet | SongUNet | DhariwalUNet):
        return {"_class_name": type(network).__name__, **asdict(network.config)}
    return {"_class_name": type(network).__name__}
