"""The JSON files of a checkpoint: read with a limit on their size, written alike every time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepfusion.errors import CheckpointError
from stepfusion.files.atomic import read_json

MAX_JSON_BYTES = 1 << 20


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most :data:`MAX_JSON_BYTES`; CheckpointError if it holds anything else."""
    return read_json(path, CheckpointError, MAX_JSON_BYTES)


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys and finite numbers; CheckpointError for values that JSON does not have."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler_config is not JSON: {str(error).splitlines()[0][:200]}") from None
