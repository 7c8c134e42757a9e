"""The JSON files of a checkpoint: read within limits, written alike every time."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from stepfusion.errors import CheckpointError
from stepfusion.files.json_files import read_json
from stepfusion.files.strict_model import StrictModel

MAX_JSON_BYTES = 1 << 20

Model = TypeVar("Model", bound=StrictModel)


def read_object(path: Path, *, infinite: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object in a file of at most :data:`MAX_JSON_BYTES`; CheckpointError if it holds anything else.

    Args:
        path: the file.
        infinite: keys of the object whose value may be infinite; no other number may.
    """
    return read_json(path, CheckpointError, MAX_JSON_BYTES, infinite=infinite)


def read_model(path: Path, kind: type[Model]) -> Model:
    """The strict model in a JSON file; keys that start with "_" are notes and are left out.

    Raises:
        CheckpointError: as for :func:`read_object`, or the object is not of this kind; the file and key are named.
    """
    given = {key: value for key, value in read_object(path).items() if not key.startswith("_")}
    try:
        return kind.of(given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys and finite numbers; CheckpointError for values that JSON does not have."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler_config is not JSON: {str(error).splitlines()[0][:200]}") from None
