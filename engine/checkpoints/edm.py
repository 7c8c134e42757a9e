"""Weights of EDM's networks (Karras et al. 2022), in safetensors files with the names that its pickles have.

The architecture follows from names and shapes. What does not, above all the standard deviation of the training data,
stands in a JSON file beside the weights, or is given. The authors publish pickles, which are never opened here:
docs/edm.md has a script that their owner runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepfusion.checkpoints.edm_architecture import read_architecture, without_prefix
from stepfusion.checkpoints.json_file import read_object
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.weight_files import WeightFile, opened
from stepfusion.checkpoints.weights import Stored, check_state
from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel
from stepfusion.model_spec import ModelSpec
from stepfusion.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from stepfusion.networks.edm.resampling import filter_of
from stepfusion.networks.meta import Unfilled

_SIGMA_MIN, _SIGMA_MAX = 0.002, 80.0  # between which EDM samples (Karras et al. 2022, table 1)


class EDMDescription(StrictModel):
    """The object in the JSON file beside the weights; fields of the network are needed only if weights do not say."""

    preconditioning: Literal["edm"] = "edm"
    sigma_data: Annotated[float, Field(gt=0)]
    sigma_min: Annotated[float, Field(ge=0)] = 0.0
    sigma_max: Annotated[float, Field(gt=0)] | None = None
    model_type: Literal["SongUNet", "DhariwalUNet"] | None = None
    img_resolution: Any = None
    in_channels: int | None = None
    out_channels: int | None = None
    label_dim: int | None = None
    augment_dim: int | None = None
    model_channels: int | None = None
    channel_mult: Any = None
    channel_mult_emb: int | None = None
    num_blocks: int | None = None
    attn_resolutions: Any = None
    dropout: float | None = None
    embedding_type: str | None = None
    channel_mult_noise: int | None = None
    encoder_type: str | None = None
    decoder_type: str | None = None
    resample_filter: Any = None

    def network_fields(self) -> dict[str, Any]:
        """The fields of the network's config that are given."""
        others = {"preconditioning", "sigma_data", "sigma_min", "sigma_max", "model_type"}
        return self.model_dump(exclude=others, exclude_none=True)


@dataclass(frozen=True, repr=False)
class EDMModel(LoadedModel):
    """What a file of EDM's weights holds.

    Attributes:
        network: F of the paper's equation 7, in eval mode, float32, on the CPU.
        sigma_data: standard deviation of the training data, which the scales around F follow from.
        sigma_min, sigma_max: noise levels that the network may be asked for; 0 and infinity if nothing bounds them.
        null_label: the label that means "no label"; None for a network without labels.
        path: the file.
        class_names: None: these files name no classes.
    """

    network: SongUNet | DhariwalUNet
    sigma_data: float
    sigma_min: float
    sigma_max: float
    null_label: int | None
    path: Path
    class_names: None = None

    @property
    def scheduler_config(self) -> dict[str, Any]:  # type: ignore[override]
        """EDM's own schedule within the levels that the network may be asked for."""
        return {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": max(self.sigma_min, _SIGMA_MIN),
            "sigma_max": min(self.sigma_max, _SIGMA_MAX),
            "sigma_data": self.sigma_data,
            "prediction_type": "epsilon",
        }

    def spec_with(self, **known: Any) -> ModelSpec:
        """The spec: sampled by Heun's method unless a caller has other options, as the authors do."""
        return super().spec_with(**{"options": {"sampler": "heun"}, **known})


def load_edm(source: str | os.PathLike[str], **known: Any) -> EDMModel:
    """Read the weights of one of EDM's networks, with ``EDMPrecond``'s ``model.`` before their names or without.

    Args:
        source: a safetensors file.
        known: fields of :class:`EDMDescription`, which go before those in the JSON object beside the file
            (``name.json`` for ``name.safetensors``): `sigma_data`, the only one that is needed, `sigma_min`,
            `sigma_max`, and fields of the network.

    Raises:
        CheckpointError: the file is damaged, or does not fit the fields; or `sigma_data` is not said; what is wrong
            is named.
    """
    path = Path(source)
    if path.suffix == ".pkl":
        raise CheckpointError(f"{path} is a pickle, which is never opened; docs/edm.md has a script to convert it")
    if not path.is_file():
        raise CheckpointError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    description = _describe(path, known)
    with opened(WeightFile(path, path.stem, "safetensors", None, False)) as stored:
        weights = without_prefix(stored, path)
        network = _build(weights, description, path)
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        state = check_state(weights, shapes, path)
    _check_filters(state, network, path)
    network.load_state_dict(state, strict=True, assign=True)
    highest = math.inf if description.sigma_max is None else description.sigma_max
    null_label = network.config.label_dim or None
    sigmas = description.sigma_data, description.sigma_min, highest
    return EDMModel(network.eval(), *sigmas, null_label, path)


def _describe(path: Path, known: Mapping[str, Any]) -> EDMDescription:
    """What is said of a file."""
    beside = path.with_suffix(".json")
    read = read_object(beside) if beside.exists() else {}
    said = {**{key: value for key, value in read.items() if not key.startswith("_")}, **known}
    if "sigma_data" not in said:
        raise CheckpointError(
            f"{path} does not say sigma_data, the standard deviation of the training data: give it, or write it to "
            f"{beside}; the models that NVlabs published have 0.5"
        )
    try:
        description = EDMDescription.of(said)
        if description.sigma_max is not None and description.sigma_max <= description.sigma_min:
            raise ValueError(f"sigma_max must be above sigma_min, got {description.sigma_max:g}")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config of {path}: {error}") from None
    return description


def _build(weights: Mapping[str, Stored], description: EDMDescription, path: Path) -> SongUNet | DhariwalUNet:
    """The network that the weights and the description describe, on the meta device."""
    kind, fields = read_architecture(weights, path)
    if description.model_type not in (None, kind):
        raise CheckpointError(
            f"config of {path}: model_type is {description.model_type!r}, the weights are of {kind}"
        )
    fields |= description.network_fields()
    try:
        with torch.device("meta"), Unfilled():
            network: SongUNet | DhariwalUNet
            network = SongUNet(SongUNetConfig(**fields)) if kind == "SongUNet" else _dhariwal(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config of {path}: {error}") from None
    if network.out_channels != network.in_channels:
        raise CheckpointError(
            f"{path} returns {network.out_channels} channels for {network.in_channels}; a network in EDM's "
            "preconditioning returns as many as it takes"
        )
    return network


def _dhariwal(fields: Mapping[str, Any]) -> DhariwalUNet:
    of_song = [key for key in fields if key not in DhariwalUNetConfig.__dataclass_fields__]
    if of_song:
        raise ValueError(f"{of_song[0]} is a field of SongUNet, and the weights are a DhariwalUNet's")
    return DhariwalUNet(DhariwalUNetConfig(**fields))


def _check_filters(state: Mapping[str, Tensor], network: SongUNet | DhariwalUNet, path: Path) -> None:
    """CheckpointError unless every filter of a file is the config's, which its convolutions are run with."""
    taps = network.config.resample_filter
    for key, value in state.items():
        if key.endswith("resample_filter") and not torch.allclose(value, filter_of(taps), rtol=0, atol=1e-6):
            raise CheckpointError(f"{path}: {key} is not the filter of resample_filter {list(taps)}")
