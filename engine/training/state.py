"""The state of a training run on disk: a folder ``state-00001000/`` of tensors (safetensors) and metadata (JSON).

A state is there whole or not at all. The last two are kept.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stepfusion.files.atomic import atomic_directory, write_synced
from stepfusion.files.json_files import FileModel, read_typed
from stepfusion.files.regular import read_regular
from stepfusion.files.removal import named, remove_folder

KEPT_STATES = 2

_TENSORS = "state.safetensors"
_METADATA = "state.json"
_STATE = re.compile(r"state-(?P<step>[0-9]{8,10})")
_LEFTOVER = re.compile(r"\.state-[0-9]{8,10}\.[0-9a-f]+\.tmp")
_OURS = named((_TENSORS, _METADATA))
_MAX_JSON_BYTES = 1 << 20
_MAX_TENSORS_BYTES = 1 << 35


class DataFingerprint(FileModel):
    """What tells a data set from another: shape, and sums of pixels and labels."""

    shape: list[int]
    pixel_sum: int
    label_sum: int | None


class RunMetadata(FileModel):
    """What a state says beside its tensors.

    Attributes:
        step: how many steps have been made.
        elapsed_s: the seconds that they took.
        config: the fields of the :class:`stepfusion.training.config.TrainConfig`.
        data: what was trained on.
    """

    step: int = Field(ge=0, lt=1 << 31)
    elapsed_s: float = Field(ge=0)
    config: dict[str, Any]
    data: DataFingerprint


@dataclass(frozen=True)
class TrainState:
    """Tensors by name, and the metadata of the run; ``metadata.step`` names the folder."""

    tensors: dict[str, Tensor]
    metadata: RunMetadata


def save_state(directory: Path, state: TrainState) -> Path:
    """Write `state` into `directory` and drop all but the last two; returns its folder.

    When writing fails, nothing of it is left behind and the states before it stay. Files in a state's folder that are
    not of the state are never removed.
    """
    folder = directory / _name(state.metadata.step)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.tensors.items()}
    with atomic_directory(folder, overwrite=True, ours=_OURS) as temporary:
        write_synced(temporary / _TENSORS, save(tensors))
        write_synced(temporary / _METADATA, (state.metadata.model_dump_json(indent=1) + "\n").encode())
    for old in _states(directory)[:-KEPT_STATES]:
        remove_folder(old, _OURS)
    return folder


def latest_state(directory: Path) -> Path | None:
    """Return the folder of the newest state in `directory`, or None."""
    states = _states(directory)
    return states[-1] if states else None


def load_state(folder: Path) -> TrainState:
    """Read the state in `folder`.

    Raises:
        ValueError: a file is missing, damaged, or no regular file; the sentence names it.
    """
    try:
        metadata = read_typed(folder / _METADATA, RunMetadata, ValueError, _MAX_JSON_BYTES)
        tensors = load(read_regular(folder / _TENSORS, _MAX_TENSORS_BYTES))
    except OSError as error:
        raise ValueError(f"{folder} is not a sound training state: {_TENSORS}: {error.strerror}") from None
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a sound training state: {error}") from None
    if folder.name != _name(metadata.step):
        raise ValueError(f"{folder} is not a sound training state: it is that of step {metadata.step}")
    return TrainState(tensors, metadata)


def is_state(name: str) -> bool:
    """Whether this is the name of a state's folder."""
    return _STATE.fullmatch(name) is not None


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process was writing."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            remove_folder(path, _OURS)


def check_room_for_states(directory: Path, step: int) -> None:
    """ValueError if something has the name of a state after `step`, the newest one: it would be in the way."""
    for path in sorted(directory.iterdir()):
        match = _STATE.fullmatch(path.name)
        if match is not None and int(match["step"]) > step:
            raise ValueError(f"{path} is no state of this run, and has the name of one: move it away")


def _name(step: int) -> str:
    return f"state-{step:08d}"


def _states(directory: Path) -> list[Path]:
    """The folders of states, oldest first; a link, or a folder without a file of a state, is none."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        found = {
            int(match["step"]): Path(entry.path)
            for entry in entries
            if (match := _STATE.fullmatch(entry.name)) is not None and entry.is_dir(follow_symlinks=False)
        }
    states = [folder for _, folder in sorted(found.items())]
    return [folder for folder in states if any(os.path.lexists(folder / name) for name in (_TENSORS, _METADATA))]
