"""The digest by which a file of weights is known, where it takes no time to speak of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from stepfusion.checkpoints.bundled import model_directory
from stepfusion.checkpoints.pipeline import find_layout
from stepfusion.checkpoints.weight_files import find_weights
from stepfusion.errors import CheckpointError

_MOST_BYTES = 1 << 26  # a tenth of a second


def weights_digest(source: str | os.PathLike[str]) -> str | None:
    """SHA-256 of the file of weights that ``source`` means, as ``sha256sum`` prints it.

    Args:
        source: as :meth:`stepfusion.Engine.from_pretrained` takes it.

    Returns:
        64 hexadecimal digits; None if there are shards, more than 64 MiB, or no such file.
    """
    try:
        path = _file(source)
        if path is None or path.stat().st_size > _MOST_BYTES:
            return None
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (CheckpointError, OSError):
        return None


def _file(source: str | os.PathLike[str]) -> Path | None:
    if os.fspath(source).endswith((".pt", ".safetensors")):
        return Path(source)
    weights = find_weights(find_layout(model_directory(source)).network)
    return None if weights.index else weights.path
