"""What a training run is for: the averaged weights as a model directory, which replaces earlier exports alone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from pydantic import Field

from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.files.atomic import atomic_directory
from stepfusion.files.json_files import FileModel, append_line, read_lines
from stepfusion.files.regular import open_regular
from stepfusion.files.removal import file_names, first_other
from stepfusion.training.state import is_state
from stepfusion.training.trainer import Trainer

EXPORTS = "exports.jsonl"

_MAX_BYTES = 1 << 26


class Export(FileModel):
    """A line of the record: the files that a run has written, each with its SHA-256."""

    step: int = Field(ge=0)
    directory: str
    files: dict[str, str]


class ExportRecord:
    """What a run has exported so far, kept in its directory: only that, unchanged, is replaced by a new export."""

    def __init__(self, run: Path) -> None:
        self._path = run / EXPORTS

    def refusal(self, directory: Path) -> str | None:
        """Say why an export may not go to `directory`; None if it may."""
        path, run = Path(os.path.abspath(directory)), self._path.parent.resolve()
        if path.is_symlink():
            return f"{directory} is a symbolic link: name the directory itself"
        if path.exists() and not path.is_dir():
            return f"{directory} is a file; it must be a directory"
        if not path.parent.is_dir() and path.parent.resolve() != run:
            return f"{directory} cannot be written: {directory.parent} is not a directory"
        real = path.resolve()
        if real == run or real in run.parents or (real.parent == run and is_state(real.name)):
            return f"{directory} holds the run itself: give a directory of its own"
        other = first_other(path, self.ours) if path.is_dir() else None
        if other is None:
            return None
        return f"{directory} holds {other}, which this run did not write: give a directory that is new or empty"

    def ours(self, folder: Path, name: str) -> bool:
        """Whether a file is one that the run exported under this name, and unchanged."""
        known = {export.files.get(name) for export in read_lines(self._path, Export, ValueError, _MAX_BYTES)}
        return bool(known - {None}) and _digest(folder / name) in known

    def add(self, step: int, directory: Path, folder: Path) -> None:
        """Enter the files in `folder`, which is about to become `directory`."""
        files = {name: _digest(folder / name) for name in sorted(file_names(folder))}
        append_line(self._path, {"step": step, "directory": str(directory), "files": files}, sync=True)


def export_model(trainer: Trainer, directory: Path, record: ExportRecord) -> None:
    """Write the averaged weights as a diffusers directory in float16.

    Args:
        trainer: whose weights.
        directory: where; its parent exists. What it holds is replaced if it is an export in `record`.
        record: of the run's exports, to which this one is added.

    Raises:
        FileExistsError: `directory` holds something that the run did not write.
    """
    dataset = trainer.dataset
    path = Path(os.path.abspath(directory))
    with atomic_directory(path, overwrite=True, ours=record.ours) as folder:
        save_pretrained(
            folder,
            trainer.ema_network(),
            trainer.config.scheduler_config(),
            class_names=dataset.class_names,
            null_label=None if dataset.labels is None else dataset.num_classes,
            dtype=torch.float16,
        )
        record.add(trainer.step, path, folder)


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
