"""The manifest: one line of JSON for each finished unit, appended and synced when its shard is on disk.

Every line carries a digest of itself. A line that was cut off or damaged is no line: its unit is made again, and
comes out the same. Several writers append to a part each; :func:`write_sorted` joins them when all is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Annotated, Any

from stepfusion import _checks
from stepfusion.bulk.job import MAX_INDEX, MAX_UNITS, SUFFIXES, check_digest
from stepfusion.bulk.stored import FirstFault, parse_stored
from stepfusion.errors import BulkError
from stepfusion.files.atomic import atomic_write_below
from stepfusion.files.regular import append_regular, open_regular

NAME = "manifest.jsonl"
MOST_LEFT_OUT = 16

_PART = re.compile(r"manifest-(0|[1-9]\d{0,8})\.jsonl")
_SHARD = re.compile(rf"\d{{6}}({'|'.join(map(re.escape, SUFFIXES.values()))})")
_DIGITS = 16
_MAX_BYTES = 1 << 62
_MAX_LINE = 1 << 12
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Record:
    """A finished unit: its shard in images/, with hash and size, holds ``count`` images from index ``first``.

    ``left_out`` are the indices of images that became non-finite, which are not in it.

    Raises:
        TypeError, ValueError: naming the entry.
    """

    unit: int
    first: int
    count: int
    shard: str
    bytes: int
    sha256: str
    left_out: Annotated[tuple[int, ...], FirstFault()] = ()

    def __post_init__(self) -> None:
        _checks.integer("unit", self.unit, 0, MAX_UNITS - 1)
        _checks.integer("first", self.first, 0, MAX_INDEX - 1)
        _checks.integer("count", self.count, 1, MAX_INDEX)
        if not _SHARD.fullmatch(self.shard):
            raise ValueError(f"shard must be the name of a shard, got {self.shard!r}")
        _checks.integer("bytes", self.bytes, 0, _MAX_BYTES)
        check_digest("sha256", self.sha256)
        if len(self.left_out) > MOST_LEFT_OUT:
            raise ValueError(f"left_out must have at most {MOST_LEFT_OUT} indices, got {len(self.left_out)}")


@dataclass(frozen=True, kw_only=True)
class _Line(Record):
    """A line of the manifest."""

    line_sha256: str


class Manifest:
    """Appends records to the manifest of ``out``, or to part ``part`` of it."""

    def __init__(self, out: Path, part: int | None = None) -> None:
        self._out, self._name = out, NAME if part is None else f"manifest-{part}.jsonl"
        self._begun = False

    def append(self, record: Record) -> None:
        """Add a line, and wait until it is on disk; what a killed process left of a line is cut off first."""
        whole = None if self._begun else self._begin()
        with append_regular(self._out / self._name) as file:
            if whole is not None:
                file.truncate(whole)
                self._begun = True
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def _begin(self) -> int:
        """How many bytes of the file are whole lines. If it has another name too, this one gets a file of its own."""
        with suppress(FileNotFoundError), open_regular(self._out / self._name) as file:
            whole = _whole_lines(file)
            if os.fstat(file.fileno()).st_nlink > 1:
                file.seek(0)
                atomic_write_below(self._out, self._name, file.read(whole))
            return whole
        return 0


def read_records(out: Path) -> dict[int, Record]:
    """The finished units by number, of the manifest and all its parts.

    Raises:
        OSError: one of these is no regular file.
    """
    records = {}
    for path in [*parts(out), out / NAME]:
        with suppress(FileNotFoundError), open_regular(path) as file:
            for line in _lines(file):
                record = _record(line)
                if record is not None:
                    records[record.unit] = record
    return records


def write_sorted(out: Path, records: Iterable[Record]) -> None:
    """Replace the manifest and its parts by one manifest in the order of units; the same images, the same bytes."""
    lines = (_line(record) for record in sorted(records, key=lambda record: record.unit))
    atomic_write_below(out, NAME, b"".join(lines))
    for path in parts(out):
        path.unlink()


def parts(out: Path) -> list[Path]:
    """The parts of several writers."""
    return sorted(out / name for name in os.listdir(out) if _PART.fullmatch(name))


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, but for those that are too long to be of a manifest."""
    while line := file.readline(_MAX_LINE):
        if line.endswith(b"\n") or len(line) < _MAX_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_CHUNK)


def _line(record: Record) -> bytes:
    entries = asdict(record)
    return json.dumps({**entries, "line_sha256": _digest(entries)}).encode() + b"\n"


def _record(line: bytes) -> Record | None:
    """The record in a line; None if the line is not one that :func:`_line` wrote."""
    try:
        content = parse_stored(line, _Line, "line")
    except BulkError:
        return None
    record = Record(**{field.name: getattr(content, field.name) for field in fields(Record)})
    return record if content.line_sha256 == _digest(asdict(record)) else None


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _whole_lines(file: IO[bytes]) -> int:
    """How many bytes of a file are lines that end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _CHUNK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
