"""JSON files of others: bounded in size and depth before they are parsed, and typed when they are."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stepfusion.files.regular import read_regular

MAX_DEPTH = 64

_Model = TypeVar("_Model", bound=BaseModel)
_MAX_SHOWN = 60  # characters of a value in a message
_TOKENS = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)  # an escape, whose quotation mark ends no string, or a sign


class FileModel(BaseModel):
    """The base of what a file's object must be: every type exact, every key known, every number finite."""

    # building at import would look for plugins in every installed package
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


def read_json(path: Path, error: type[Exception], most: int, *, infinite: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object of finite numbers, at most `most` bytes long; `error` names the file if it is none.

    A link at `path` is followed: directories of downloaded models are often made of links.

    Args:
        infinite: keys of the object whose own value may be infinite, as Python writes it.
    """
    data = _read(path, error, most, follow=True)
    try:
        check_depth(data)
        value = json.loads(data.decode(), parse_constant=float if infinite else _finite, parse_float=_finite)
        if isinstance(value, dict):
            for key, entry in value.items():
                _check_finite(entry, infinite=key in infinite)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON: {str(problem)[:200]}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}; accepted is an object")
    return value


def read_typed(path: Path, model: type[_Model], error: type[Exception], most: int) -> _Model:
    """Read a JSON file of ours as `model`, strictly: no link is followed, no type is converted.

    Args:
        path: the file.
        model: what its object must be; its config forbids unknown keys.
        error: is raised with one sentence that names the file, and the place in it, if something is wrong.
        most: the most bytes that the file may have.
    """
    return parse_typed(_read(path, error, most, follow=False), model, error, str(path))


def parse_typed(data: bytes, model: type[_Model], error: type[Exception], name: str) -> _Model:
    """Parse JSON as `model`, strictly; `error` begins with `name`, and says the first place that is wrong."""
    try:
        check_depth(data)
        return model.model_validate_json(data, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        given = "" if first["type"] in ("missing", "json_invalid") else f", got {_shown(first['input'])}"
        raise error(f"{name}: {place + ': ' if place else ''}{first['msg']}{given}") from None
    except ValueError as problem:
        raise error(f"{name}: {problem}") from None


def check_depth(data: bytes, most: int = MAX_DEPTH) -> None:
    """ValueError if JSON is nested more than `most` deep; the text need not be valid, and nothing is built of it."""
    depth, in_string = 0, False
    for token in _TOKENS.finditer(data):
        sign = token[0]
        if sign == b'"':
            in_string = not in_string
        elif in_string or len(sign) > 1:
            continue
        elif sign in b"[{":
            depth += 1
            if depth > most:
                raise ValueError(f"it is nested more than {most} deep")
        else:
            depth -= 1


def _read(path: Path, error: type[Exception], most: int, *, follow: bool) -> bytes:
    if not os.path.lexists(path):
        raise error(f"{path} is missing")
    try:
        return read_regular(path, most, follow=follow)
    except OSError as problem:
        if problem.errno == errno.EFBIG:
            raise error(f"{path} is larger than {most} bytes") from None
        raise error(f"{path} cannot be read: {problem.strerror}") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _check_finite(value: Any, *, infinite: bool = False) -> None:
    """ValueError for a number that is not finite, but for infinity itself where that is right."""
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or not infinite):
        raise ValueError(f"{json.dumps(value)} is not a finite number")
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_finite(entry)


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is not a finite number")
    return value
