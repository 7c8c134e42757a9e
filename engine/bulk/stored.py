"""What a job keeps as JSON: a dataclass says what each file holds, and it is read strictly, within limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import FailFast, create_model

from stepfusion.errors import BulkError
from stepfusion.files.json_files import FileModel, parse_typed, read_typed

_Kind = TypeVar("_Kind")
_MODELS: dict[type[Any], type[FileModel]] = {}


class FirstFault(FailFast):
    """Of an array, only the first entry that is wrong is told: a long array would make as many errors."""

    def __hash__(self) -> int:  # annotations are hashed when they are read, and FailFast cannot be
        return hash(type(self))


def to_json(value: dict[str, Any]) -> bytes:
    """A JSON file that is pleasant to read."""
    return (json.dumps(value, indent=1) + "\n").encode()


def read_stored(path: Path, kind: type[_Kind], most: int) -> _Kind:
    """Read a JSON file as a dataclass.

    Args:
        path: of a regular file; no link is followed.
        kind: the dataclass. Every field has exactly its type, and there is no entry beside the fields.
        most: the most bytes that the file may have.

    Raises:
        BulkError: the file is missing or is not such a file; the sentence names it, and the place in it.
    """
    return _made(kind, read_typed(path, _model_of(kind), BulkError, most), str(path))


def parse_stored(data: bytes, kind: type[_Kind], name: str) -> _Kind:
    """A dataclass from JSON, as :func:`read_stored` does; BulkError, which begins with ``name``, if it is wrong."""
    return _made(kind, parse_typed(data, _model_of(kind), BulkError, name), name)


def _model_of(kind: type[Any]) -> type[FileModel]:
    """What checks the types of a dataclass's fields; their values are checked by the dataclass itself."""
    if kind not in _MODELS:
        hints = get_type_hints(kind, include_extras=True)
        fields: dict[str, Any] = {
            field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
            for field in dataclasses.fields(kind)
        }
        _MODELS[kind] = create_model(kind.__name__, __base__=FileModel, **fields)
    return _MODELS[kind]


def _made(kind: type[_Kind], content: FileModel, name: str) -> _Kind:
    try:
        return kind(**dict(content))
    except (TypeError, ValueError) as error:
        raise BulkError(f"{name}: {error}") from None
