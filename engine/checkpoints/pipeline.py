"""The layout of a model directory, and what ``model_index.json`` says of the parts of its pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from stepfusion.checkpoints.json_file import read_object
from stepfusion.errors import CheckpointError

INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler_config.json"

NETWORK_PARTS = ("unet", "transformer")
#: Parts that look at finished images, or prepare what a caller gives; the network's own images do not depend on them.
_HARMLESS_PARTS = ("safety_checker", "feature_extractor", "image_processor", "watermarker")
#: What stands around the network of a latent pipeline, and the classes of it that are read.
_AROUND = {
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "vqvae": ("VQModel",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_DECODERS = ("vae", "vqvae", "movq", "vqgan", "image_decoder", "decoder_vae")


@dataclass(frozen=True)
class Layout:
    """Where the files of a model directory are.

    Attributes:
        root: the directory of the whole pipeline, or of the network if there is nothing else.
        network: the folder of ``config.json`` and the weights.
        scheduler: ``scheduler_config.json``; None if the directory has none.
        scheduler_class: of diffusers, which the pipeline loads that file into; None if it does not say.
        around: the folders of autoencoder, text encoders and tokenizers, by their names in the pipeline.
        settings: what else the pipeline says, such as ``id2label``.
    """

    root: Path
    network: Path
    scheduler: Path | None
    scheduler_class: str | None
    around: Mapping[str, Path]
    settings: Mapping[str, Any]


def find_layout(path: Path) -> Layout:
    """The layout of a directory: a diffusers pipeline, a network's folder inside one, or everything in one folder.

    Raises:
        CheckpointError: the pipeline has a part without which the network's images are not the pipeline's; or the
            network's folder and the pipeline around it have different schedulers.
    """
    for name in NETWORK_PARTS:
        if (path / name).is_dir():
            return Layout(path, path / name, path / "scheduler" / SCHEDULER_FILE, *_check_parts(path))
    own, around = path / SCHEDULER_FILE, path.absolute().parent
    theirs = around / "scheduler" / SCHEDULER_FILE
    inside = path.absolute().name.startswith(NETWORK_PARTS) and (theirs.is_file() or (around / INDEX_FILE).is_file())
    if not inside:
        return Layout(path, path, own if own.exists() else None, *_check_parts(path))
    if own.exists() and theirs.is_file() and _settings(own) != _settings(theirs):
        raise CheckpointError(f"{own} and {theirs} say different things; remove the one that is not this network's")
    found = [file for file in (theirs, own) if file.is_file()]
    return Layout(around, path, found[0] if found else None, *_check_parts(around))


def read_scheduler(layout: Layout) -> dict[str, Any]:
    """The scheduler's config, under the class that the pipeline loads it into; empty if there is none.

    Raises:
        CheckpointError: the file is missing from a pipeline, or is no config.
    """
    if layout.scheduler is None:
        return {}
    config = _read(layout.scheduler)
    return config if layout.scheduler_class is None else {**config, "_class_name": layout.scheduler_class}


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, infinite=("lambda_min_clipped",))


def _settings(path: Path) -> dict[str, Any]:
    return {key: value for key, value in _read(path).items() if not key.startswith("_")}


def _check_parts(root: Path) -> tuple[str | None, dict[str, Path], dict[str, Any]]:
    """Refuse a pipeline with parts that are not implemented.

    Returns:
        the class of its scheduler, if it says one; the folders of what stands around its network; its settings.
    """
    index = root / INDEX_FILE
    if not index.is_file():
        for name in _DECODERS:
            if name not in _AROUND and (root / name / "config.json").is_file():
                raise CheckpointError(_missing_part(root / name, name, None))
        return None, {name: root / name for name in _AROUND if (root / name).is_dir()}, {}
    parts = _parts(index)
    for name, (_, kind) in parts.items():
        if kind in _AROUND.get(name, ()):
            if not (root / name).is_dir():
                raise CheckpointError(f"{index} has the part {name!r}, and the folder {root / name} is missing")
        elif name not in (*NETWORK_PARTS, "scheduler", *_HARMLESS_PARTS):
            raise CheckpointError(_missing_part(index, name, kind))
    library, kind = parts.get("scheduler", ("", ""))
    settings = {name: value for name, value in read_object(index).items() if not isinstance(value, list)}
    around = {name: root / name for name in _AROUND if name in parts}
    return kind if library == "diffusers" else None, around, settings


def _parts(index: Path) -> Mapping[str, tuple[str, str]]:
    """The parts of a pipeline that are there: the library and the class of each. Settings are no lists."""
    parts = {}
    for name, value in read_object(index).items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if value in ([None, None], []):
            continue
        if len(value) != 2 or not all(isinstance(entry, str) for entry in value):
            raise CheckpointError(f"{index}: {short(name)} must be a library and a class, got {short(value)}")
        parts[name] = (value[0], value[1])
    return parts


def _missing_part(where: Path, name: str, kind: str | None) -> str:
    shown = f"{short(name)} ({kind[:80]})" if kind else short(name)
    reason = (
        "its network makes latents, which that part decodes to images"
        if name in _DECODERS
        else "without that part its network does not make the pipeline's images"
    )
    return f"{where}: the pipeline's part {shown} is not implemented: {reason}"
