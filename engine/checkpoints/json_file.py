"""The JSON files of a checkpoint: read with limits on their size and depth, written alike every time."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from stepfusion.errors import CheckpointError
from stepfusion.strict_model import StrictModel

MAX_JSON_BYTES = 1 << 20
_MAX_DEPTH = 32

Model = TypeVar("Model", bound=StrictModel)


def read_object(path: Path, *, infinite: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object in a file of at most :data:`MAX_JSON_BYTES`, nested at most 32 deep.

    Args:
        infinite: keys of the object itself whose value may be infinite, as Python writes it; no other number may.

    Raises:
        CheckpointError: the file is missing, or holds anything else; it is named.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(data.decode(), parse_constant=float, parse_float=_finite)
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; accepted is an object")
        for key, entry in value.items():
            _check(entry, _MAX_DEPTH - 1, infinite=key in infinite)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {str(error)[:200]}") from None
    return value


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


def _check(value: Any, depth: int, *, infinite: bool = False) -> None:
    """ValueError for a number that is not finite, or nesting beyond ``depth``."""
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or not infinite):
        literal = {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
        raise ValueError(f"{literal} is not a finite number")
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        for entry in value.values() if isinstance(value, dict) else value:
            _check(entry, depth - 1)


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is not a finite number")
    return value
