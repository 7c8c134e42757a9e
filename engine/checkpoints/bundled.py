"""The models that come with the package, by their names."""

import os
import re
from pathlib import Path

from stepfusion.errors import CheckpointError

MODELS = Path(__file__).parents[1] / "models"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # of a repository of models: owner/name
_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def bundled_models() -> tuple[str, ...]:
    """Return the names of the models that come with the package."""
    if not MODELS.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in MODELS.iterdir() if entry.is_dir() and _is_model_name(entry.name)))


def _is_model_name(name: str) -> bool:
    return _MODEL_NAME.fullmatch(name) is not None


def model_directory(source: str | os.PathLike[str]) -> Path:
    """Return the directory that `source` means: only a plain name, never a path, is looked up in the package."""
    if isinstance(source, str) and source in bundled_models():
        return MODELS / source
    path = Path(source)
    if source != "" and path.is_dir():
        return path
    if not isinstance(source, str) or any(mark in source for mark in (os.sep, os.altsep) if mark):
        raise CheckpointError(f"{path} is {'not a directory' if path.exists() else 'missing'}{_how_to_get(source)}")
    names = ", ".join(bundled_models()) or "none"
    raise CheckpointError(f"{source!r} is neither a bundled model ({names}) nor a directory")


def _how_to_get(source: str | os.PathLike[str]) -> str:
    """What to do about a repository's name in place of a directory."""
    if not isinstance(source, str) or _HUB_NAME.fullmatch(source) is None or Path(source).exists():
        return ""
    if Path(source).suffix in (".pt", ".safetensors") or Path(source).parent.exists():
        return ""
    name = source.rpartition("/")[2]
    return (
        f"; nothing is downloaded: if it is a repository of the Hugging Face hub, get its files with "
        f"`hf download {source} --local-dir {name}`, and name the directory {name}"
    )
