"""The state of a training run on disk: a folder ``state-00001000/`` of tensors (safetensors) and metadata (JSON).

A state is there whole or not at all. The last two are kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from stepfusion.files.atomic import atomic_directory, write_synced

KEPT_STATES = 2

_PREFIX = "state-"
_TENSORS = "state.safetensors"
_METADATA = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Tensors by name, and metadata that JSON can hold; ``metadata["step"]`` names the folder."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def save_state(directory: Path, state: TrainState) -> Path:
    """Write `state` into `directory` and drop all but the last two; returns its folder.

    When writing fails, nothing of it is left behind and the states before it stay.
    """
    folder = directory / f"{_PREFIX}{state.metadata['step']:08d}"
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.tensors.items()}
    with atomic_directory(folder, overwrite=True) as temporary:
        write_synced(temporary / _TENSORS, save(tensors))
        write_synced(temporary / _METADATA, (json.dumps(state.metadata, indent=1) + "\n").encode())
    for old in _states(directory)[:-KEPT_STATES]:
        shutil.rmtree(old)
    return folder


def latest_state(directory: Path) -> Path | None:
    """Return the folder of the newest state in `directory`, or None."""
    states = _states(directory)
    return states[-1] if states else None


def load_state(folder: Path) -> TrainState:
    """Read the state in `folder`.

    Raises:
        ValueError: a file is missing or damaged; the sentence names it.
    """
    try:
        metadata = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a sound training state: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{folder / _METADATA} holds no JSON object")
    return TrainState(tensors, metadata)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process was writing."""
    for path in directory.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(path)


def _states(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if path.is_dir())
