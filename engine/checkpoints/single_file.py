"""Single files of Stable Diffusion, in which UNet, autoencoder and text encoders of a pipeline are together.

A file holds no config: what its networks are follows from its family, as published. What it does not hold either are
the tokenizers, which are read from folders beside it, and, of Stable Diffusion 2, what the network predicts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepfusion.checkpoints.json_file import read_model
from stepfusion.checkpoints.latent_parts import TOKENIZERS, LatentParts, coders, text_encoder
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.lora_files import Lora, LoraFiles
from stepfusion.checkpoints.weight_files import WeightFile, opened
from stepfusion.checkpoints.weights import Stored, check_state
from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel
from stepfusion.latents.single_file import SingleFile, is_single_file, split_single_file
from stepfusion.latents.single_file_configs import configs_of
from stepfusion.latents.tensor_file import TensorFile, read_tensors
from stepfusion.latents.text import TextPart
from stepfusion.model_spec import ModelSpec
from stepfusion.networks import UNet2DCondition
from stepfusion.networks.meta import Unfilled

Prediction = Literal["epsilon", "v_prediction"]

_FACTOR = 8  # of the autoencoders of all families
_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
#: Names without a point that files of SDXL have if their network predicts velocity, or noise by EDM's rules.
_VELOCITY, _ZERO_SNR, _EDM = "v_pred", "ztsnr", "edm_"
_RESOLUTION = re.compile(r"(\d{1,5})x(\d{1,5})")


class SingleFileDescription(StrictModel):
    """The object in the JSON file beside a single file: what the file does not say of its network."""

    prediction_type: Prediction | None = None
    sample_size: Annotated[int, Field(ge=1, le=1 << 13)] | None = None


@dataclass(frozen=True, repr=False)
class SingleFileModel(LoadedModel):
    """What a single file of Stable Diffusion holds.

    Attributes:
        network: in eval mode, float32, on the CPU.
        family: "sd1", "sd2", "sdxl" or "sdxl-refiner".
        prediction_type: "epsilon" or "v_prediction"; None if nothing says which, of Stable Diffusion 2 alone.
        zero_snr: whether it was trained with a schedule that ends in noise alone (Lin et al. 2024).
        path: the file.
        parts: what stands around the network.
        class_names, null_label: None: these networks have no classes.
    """

    network: UNet2DCondition
    family: str
    prediction_type: Prediction | None
    zero_snr: bool
    path: Path
    parts: LatentParts
    class_names: None = None
    null_label: None = None

    @property
    def scheduler_config(self) -> dict[str, Any]:  # type: ignore[override]
        """The schedule of all families, and DDIM's timesteps as Stable Diffusion takes them."""
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": self.prediction_type or "epsilon",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "trailing" if self.zero_snr else "leading",
            "rescale_betas_zero_snr": self.zero_snr,
        }

    def spec_with(self, **known: Any) -> ModelSpec:
        """The spec.

        Raises:
            CheckpointError: neither the file nor ``prediction`` says what the network predicts.
        """
        if self.prediction_type is None and known.get("prediction") is None:
            raise CheckpointError(
                f"{self.path} does not say what its network predicts, and models of Stable Diffusion 2 differ: give "
                "prediction='v_prediction' (those of 768 x 768 pixels) or prediction='epsilon' (512 x 512, "
                f'inpainting), or write {{"prediction_type": ...}} to {self.path.with_suffix(".json")}'
            )
        return super().spec_with(**known)

    def around(self, spec: ModelSpec) -> dict[str, Any]:
        """Text encoder, decoder and encoder, by the names of an engine's arguments."""
        return self.parts.arguments(spec)

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """What text encoder and autoencoder hold."""
        yield from self.parts.contents()


def holds_single_file(source: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file is one of Stable Diffusion, by the names in its header.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(source)
    if not path.is_file():
        return False
    with opened(WeightFile(path, path.stem, "safetensors", None, False)) as stored:
        return is_single_file({name: one.shape for name, one in stored.items()})


def load_single_file(source: str | os.PathLike[str], *, lora: Lora | None = None) -> SingleFileModel:
    """Read a single file of Stable Diffusion 1, 2, XL or XL's refiner. Nothing is downloaded, and no pickle is read.

    Tokenizers are read from the folders ``tokenizer`` and ``tokenizer_2`` beside the file, in the layout of a
    diffusers pipeline; without them the model is read without its text encoders. A JSON object beside it
    (``name.json`` for ``name.safetensors``) may say ``prediction_type``, and ``sample_size``, the side of a latent,
    in place of the file's ``modelspec`` metadata and its family.

    Args:
        source: a ``.safetensors`` file.
        lora: as for :func:`stepfusion.load_pretrained`.

    Raises:
        CheckpointError: the file is damaged, of no known family, or does not fit its family's networks; or a library
            of the extra ``[latent]`` is missing.
    """
    path = Path(source)
    file, loras = read_tensors(path), LoraFiles(lora)
    beside = path.with_suffix(".json")
    said = read_model(beside, SingleFileDescription) if beside.exists() else SingleFileDescription()
    try:
        _refuse_edm(file)
        found = split_single_file(file.tensors)
        prediction, size = _prediction(found.family, file, said), said.sample_size or _sample_size(file)
        configs = dict(configs_of(found.family))
        parts = _parts(found, configs, path.parent, loras)
        network = _network(found, configs["unet"], parts, size)
        parts.check(network, path)
    except CheckpointError as error:
        raise error if str(error).startswith(str(path)) else CheckpointError(f"{path}: {error}") from None
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    weights = check_state(_stored(found.unet), shapes, path, f"family {found.family}")
    network.load_state_dict(loras.merged_network(weights), strict=True, assign=True)
    return SingleFileModel(network.eval(), found.family, prediction, _ZERO_SNR in file.tensors, path, parts)


def _refuse_edm(file: TensorFile) -> None:
    for name in file.tensors:
        if name.startswith(_EDM):
            raise CheckpointError(
                f"the file has the tensor {name!r:.100}: its network is preconditioned as EDM has it, which is not "
                "implemented for files of Stable Diffusion"
            )


def _prediction(family: str, file: TensorFile, said: SingleFileDescription) -> Prediction | None:
    """What the network predicts: as the object beside the file says, its metadata, a mark in it, or its family."""
    if said.prediction_type is not None:
        return said.prediction_type
    noted = file.metadata.get("modelspec.prediction_type")
    if noted is not None:
        if noted not in _PREDICTIONS:
            raise CheckpointError(f"modelspec.prediction_type must be epsilon or v, got {noted!r:.100}")
        return _PREDICTIONS[noted]
    if _VELOCITY in file.tensors:
        return "v_prediction"
    return None if family == "sd2" else "epsilon"


def _sample_size(file: TensorFile) -> list[int] | None:
    """Height and width of a latent, as the metadata says of images (width x height); None if it does not."""
    match = _RESOLUTION.fullmatch(file.metadata.get("modelspec.resolution", ""))
    if match is None:
        return None
    width, height = int(match[1]), int(match[2])
    fits = width > 0 and height > 0 and width % (8 * _FACTOR) == height % (8 * _FACTOR) == 0
    return [height // _FACTOR, width // _FACTOR] if fits else None


def _parts(found: SingleFile, configs: Mapping[str, Any], beside: Path, loras: LoraFiles) -> LatentParts:
    """Autoencoder and text encoders, those that the file and the folders beside it have."""
    decoder, encoder = coders(configs["vae"], found.vae) if found.vae else (None, None)
    wanted = [name for name in TOKENIZERS if name in configs]
    states = {name: getattr(found, name) for name in wanted if getattr(found, name)}
    folders = {name: beside / TOKENIZERS[name] for name in wanted}
    missing = None
    if len(states) < len(wanted):
        missing = (
            f"the file has no {' and no '.join(n for n in wanted if n not in states)}: give conditions, as tensors"
        )
    elif absent := [str(folder) for folder in folders.values() if not folder.is_dir()]:
        missing = (
            f"a single file holds no tokenizer, and its folder is missing: {' and '.join(absent)}; copy it from the "
            "model's diffusers directory, or give conditions, as tensors"
        )
    if missing is not None:
        loras.merged_texts(states)  # for its errors: what is not used is checked all the same
        return LatentParts(decoder, encoder, None, missing)
    texts = {name: TextPart(folders[name], configs[name], states[name]) for name in wanted}
    return LatentParts(decoder, encoder, text_encoder(texts, loras, zeros=found.family == "sdxl"))


def _network(
    found: SingleFile, config: Mapping[str, Any], parts: LatentParts, size: int | list[int] | None
) -> UNet2DCondition:
    """The network on the meta device; how many channels it is shown stands in the file alone."""
    first = found.unet.get("conv_in.weight")
    shown = {"in_channels": first.shape[1]} if first is not None and first.ndim == 4 else {}
    config = {**config, **shown, **({} if size is None else {"sample_size": size})}
    with torch.device("meta"), Unfilled():
        return UNet2DCondition.from_config(config, **parts.network_arguments(config))


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors as what a file says of them, by which they are checked."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        name: Stored(tuple(one.shape), names.get(one.dtype, str(one.dtype)), partial(_given, one))
        for name, one in tensors.items()
    }


def _given(tensor: Tensor) -> Tensor:
    return tensor
