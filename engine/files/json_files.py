"""JSON files of others: bounded in size and depth before they are parsed, and typed when they are."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stepfusion.files.regular import append_regular, read_regular

MAX_DEPTH = 64

_BLOCK = 1 << 12
_Model = TypeVar("_Model", bound=BaseModel)
_MAX_SHOWN = 60  # characters of a value in a message
_TOKENS = re.compile(rb'\\.|["\[\]{}]', re.DOTALL)  # an escape, whose quotation mark ends no string, or a sign


class FileModel(BaseModel):
    """The base of what a file's object must be: every type exact, every key known, every number finite."""

    # building at import would look for plugins in every installed package
    # and fields may be called as the files call them, "model_type" too
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True, protected_namespaces=()
    )


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


def read_lines(path: Path, model: type[_Model], error: type[Exception], most: int) -> list[_Model]:
    """Read a file of ours with a JSON object in each line, as :func:`read_typed` does; none if nothing is there.

    A last line that a crash cut short is left out.
    """
    if not os.path.lexists(path):
        return []
    *lines, _cut_short = _read(path, error, most, follow=False).split(b"\n")
    return [parse_typed(line, model, error, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def append_line(path: Path, value: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add a JSON object to such a file; what a crash left of a line is cut off first.

    Args:
        path: the file, which is made if nothing is there.
        value: the object.
        sync: wait until the line is on disk.

    Raises:
        OSError: something else than a regular file is there, or it cannot be written.
    """
    with append_regular(path) as file:
        os.truncate(file.fileno(), _end_of_lines(file.fileno()))
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


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


def _end_of_lines(descriptor: int) -> int:
    """Where the last line that ends, ends."""
    place = os.lseek(descriptor, 0, os.SEEK_END)
    while place > 0:
        start = max(0, place - _BLOCK)
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, place - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        place = start
    return 0


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _check_finite(value: Any, *, infinite: bool = False) -> None:
    """ValueError for a number that is not finite, except for infinity itself if that is allowed."""
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
