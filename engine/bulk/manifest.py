"""The manifest: one line of JSON for each finished unit, appended and synced when its shard is on disk.

Every line carries a digest of itself. A line that was cut off or damaged is no line: its unit is made again, and
comes out the same. Several writers append to a part each; :func:`write_sorted` joins them when all is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepfusion.files.atomic import atomic_write

NAME = "manifest.jsonl"

_PARTS = "manifest-*.jsonl"
_CHECK = "line_sha256"
_DIGITS = 16


@dataclass(frozen=True)
class Record:
    """A finished unit: its shard in images/, with hash and size, holds ``count`` images from index ``first``.

    ``left_out`` are the indices of images that became non-finite, which are not in it.
    """

    unit: int
    first: int
    count: int
    shard: str
    bytes: int
    sha256: str
    left_out: tuple[int, ...] = ()


class Manifest:
    """Appends records to the manifest of ``out``, or to part ``part`` of it."""

    def __init__(self, out: Path, part: int | None = None) -> None:
        self._path = out / (NAME if part is None else f"manifest-{part}.jsonl")
        self._begun = False

    def append(self, record: Record) -> None:
        """Add a line, and wait until it is on disk; what a killed process left of a line is cut off first."""
        with open(self._path, "ab") as file:
            if not self._begun:
                file.truncate(_whole_lines(self._path.read_bytes()))
                self._begun = True
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def read_records(out: Path) -> dict[int, Record]:
    """The finished units by number, of the manifest and all its parts."""
    records = {}
    for path in [*parts(out), out / NAME]:
        if path.is_file():
            for line in path.read_bytes().splitlines():
                record = _record(line)
                if record is not None:
                    records[record.unit] = record
    return records


def write_sorted(out: Path, records: Iterable[Record]) -> None:
    """Replace the manifest and its parts by one manifest in the order of units; the same images, the same bytes."""
    atomic_write(out / NAME, b"".join(_line(record) for record in sorted(records, key=lambda record: record.unit)))
    for path in parts(out):
        path.unlink()


def parts(out: Path) -> list[Path]:
    """The parts of several writers."""
    return sorted(out.glob(_PARTS))


def record_from(fields: dict[str, Any]) -> Record:
    """A record of its fields as JSON has them."""
    return Record(**{**fields, "left_out": tuple(fields["left_out"])})


def _line(record: Record) -> bytes:
    fields = asdict(record)
    return json.dumps({**fields, _CHECK: _digest(fields)}).encode() + b"\n"


def _record(line: bytes) -> Record | None:
    """The record in a line; None if the line is not one that :func:`_line` wrote."""
    try:
        fields = json.loads(line)
        check = fields.pop(_CHECK)
        return record_from(fields) if check == _digest(fields) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _whole_lines(data: bytes) -> int:
    """How many bytes of ``data`` are lines that end."""
    return data.rfind(b"\n") + 1
