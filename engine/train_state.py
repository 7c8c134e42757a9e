"""The state of a training run on disk: a folder ``state-00001000/`` of tensors (safetensors) and facts (JSON).

A state is written under a temporary name, flushed to disk and renamed, so it is there whole or not at all. The last two
are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT_STATES = 2

_PREFIX = "state-"
_TEMPORARY = ".writing-"
_TENSORS = "state.safetensors"
_FACTS = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Tensors by name, and facts that JSON can hold; ``facts["step"]`` names the folder."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_state(directory: Path, state: TrainState) -> Path:
    """Write `state` into `directory` and drop all but the last two; returns its folder.

    When writing fails, nothing of it is left behind and the states before it stay.
    """
    name = f"{_PREFIX}{state.facts['step']:08d}"
    temporary, final = directory / f"{_TEMPORARY}{name}", directory / name
    temporary.mkdir(parents=True)
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in state.tensors.items()}, temporary / _TENSORS)
        (temporary / _FACTS).write_text(json.dumps(state.facts, indent=1) + "\n", encoding="utf-8")
        for path in (temporary / _TENSORS, temporary / _FACTS, temporary):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(directory)
    for old in _states(directory)[:-KEPT_STATES]:
        shutil.rmtree(old)
    return final


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
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / _TENSORS)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a sound training state: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{folder / _FACTS} holds no JSON object")
    return TrainState(tensors, facts)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process was writing."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it and rename it to `path`."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _states(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if path.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
