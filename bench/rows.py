"""What a benchmark records: one line of JSON for each thing measured, the conditions it was measured under, and how
each part ended.

A field that was not measured is absent from its line. Nothing is estimated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Row:
    """One provider on one operation.

    Attributes:
        part, op, provider: which benchmark, which operation, and who did it. device: its type, "cpu" or "cuda".
        model, shape, dtype, batch, steps: of the work; ``dtype`` is the network's.
        median_ms, p20_ms, p80_ms, p95_ms, min_ms: of one call, in wall time until its result is there, host time
            included.
        device_ms: median time of one call between two events on the device.
        warmup_s: first call, compilation included; never part of the medians.
        bytes, flops: the least that one call has to move and to compute.
        fraction, fraction_of: of what that run measured: "copy bandwidth", "matmul rate"; or "device idle" time.
        max_difference, rms_difference, tolerance: to the reference output, and what was accepted ("max 0.01").
        notes: conditions that the fields do not hold, or why nothing was timed. error: what went wrong.
    """

    part: str
    op: str
    provider: str
    device: str
    model: str | None = None
    shape: str | None = None
    dtype: str | None = None
    batch: int | None = None
    steps: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    p95_ms: float | None = None
    min_ms: float | None = None
    device_ms: float | None = None
    warmup_s: float | None = None
    bytes: int | None = None
    flops: int | None = None
    fraction: float | None = None
    fraction_of: str | None = None
    max_difference: float | None = None
    rms_difference: float | None = None
    tolerance: str | None = None
    notes: str | None = None
    error: str | None = None

    @property
    def images_per_second(self) -> float | None:
        """Finished images a second, if a call is a whole loop."""
        if self.batch is None or self.steps is None or self.median_ms is None:
            return None
        return 1e3 * self.batch / self.median_ms


@dataclass(frozen=True)
class Conditions:
    """Where and with what a part was measured; the header of its rows.

    ``command`` and ``sizes`` are what was asked for; ``load`` is how many processes wanted a processor, a mean of the
    minute before.
    """

    part: str
    device: str
    device_name: str
    date: str
    python: str
    platform: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict)
    driver: str | None = None
    cuda: str | None = None
    commit: str | None = None
    command: str | None = None
    sizes: str | None = None
    load: float | None = None


@dataclass(frozen=True)
class End:
    """How a part ended: "done", "failed" or "stopped" (by its time limit), after so many seconds."""

    part: str
    status: str
    seconds: float
    notes: str | None = None


Record = Row | Conditions | End
_KINDS: dict[str, type[Row] | type[Conditions] | type[End]] = {"row": Row, "conditions": Conditions, "end": End}


def to_line(record: Record) -> str:
    """One line of JSON, without its line end. ValueError for a number that JSON does not have."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    given = {name: value for name, value in asdict(record).items() if value is not None}
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} of a row must be finite, got {value}")
    return json.dumps({"kind": kind, **given}, ensure_ascii=False)


def from_line(line: str) -> Record:
    """The record of one line; ValueError naming what is wrong with it."""
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"a line of benchmark rows must be JSON, got {line[:60]!r}") from error
    cls = _KINDS.get(str(values.pop("kind", None))) if isinstance(values, dict) else None
    if cls is None:
        raise ValueError(f"a line of benchmark rows must have a kind ({', '.join(_KINDS)}), got {line[:60]!r}")
    unknown = sorted(values.keys() - {f.name for f in fields(cls)})
    if unknown:
        raise ValueError(f"a line of benchmark rows has the unknown field {unknown[0]!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"a line of benchmark rows lacks fields: {error}") from error


def parse(text: str) -> list[Record]:
    """Every record of a file of lines."""
    return [from_line(line) for line in text.splitlines() if line.strip()]


def rows_of(records: Iterable[Record], part: str | None = None) -> list[Row]:
    """The rows among the records, of one part or of all."""
    return [r for r in records if isinstance(r, Row) and part in (None, r.part)]


def latest(records: Iterable[Record]) -> list[Record]:
    """The records without those rows that were measured again: the last of each provider's on the same work.

    Who compiles is measured late, beside everyone, who were measured before in case it takes too long.
    """
    kept: dict[object, Record] = {}
    for number, record in enumerate(records):
        if isinstance(record, Row):
            r = record
            work = (r.part, r.op, r.provider, r.device, r.model, r.shape, r.dtype, r.batch, r.steps, r.fraction_of)
            kept.pop(work, None)
            kept[work] = record
        else:
            kept[number] = record
    return list(kept.values())


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first columns to the left, numbers to the right."""
    table = [header, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    numeric = [all(_is_number(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in table
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same table for a report."""
    cells = [header, ["---"] * len(header), *([cell.replace("|", "/") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


#: What a table of rows shows, in order: heading, and the text of a cell.
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "op": lambda r: r.op,
    "model": lambda r: r.model or "",
    "provider": lambda r: r.provider,
    "shape": lambda r: r.shape or "",
    "dtype": lambda r: r.dtype or "",
    "batch": lambda r: "" if r.batch is None else str(r.batch),
    "median ms": lambda r: number(r.median_ms),
    "p20": lambda r: number(r.p20_ms),
    "p80": lambda r: number(r.p80_ms),
    "p95": lambda r: number(r.p95_ms),
    "min": lambda r: number(r.min_ms),
    "device ms": lambda r: number(r.device_ms),
    "warm-up s": lambda r: number(r.warmup_s),
    "images/s": lambda r: number(r.images_per_second),
    "fraction": lambda r: "" if r.fraction is None else f"{100 * r.fraction:.1f} % of {r.fraction_of}",
    "max diff": lambda r: number(r.max_difference),
    "rms diff": lambda r: number(r.rms_difference),
    "notes": lambda r: (r.error and f"ERROR: {r.error}") or r.notes or "",
}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of rows, without the columns that none of them fills."""
    filled = {name: [str(cell(row)) for row in rows] for name, cell in _COLUMNS.items()}
    shown = [name for name, cells in filled.items() if any(cells)]
    return shown, [[filled[name][i] for name in shown] for i in range(len(rows))]


def number(value: float | None) -> str:
    """Four significant digits, or nothing."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True
