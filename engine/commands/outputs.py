"""Checks, before any work, that what a command will write can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_folder(name: str, path: Path, folder: Path) -> None:
    """Try to make a file, which vanishes at once: a directory's permissions say too little."""
    if not folder.is_dir():
        raise ValueError(f"{name} {path} cannot be written: {folder} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be written: {error.strerror}") from error


def check_figure(name: str, path: Path) -> None:
    """ValueError unless a PNG file can be written there."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"{name} must be a file that ends in .png, got {path}")
    check_folder(name, path, path.parent)
