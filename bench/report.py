"""A folder of results: ``rows.jsonl``, the pictures, and one ``report.md`` that a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from stepfusion.bench.optional import why_not
from stepfusion.bench.plots import draw
from stepfusion.bench.rows import Conditions, End, Record, Row, markdown, parse, rows_of, table, to_line
from stepfusion.bench.targets import TARGETS
from stepfusion.files.atomic import atomic_write

ROWS_FILE, REPORT_FILE = "rows.jsonl", "report.md"
_TITLES = {
    "kernels": "Kernels",
    "latency": "Latency: from start noise to images on the host",
    "throughput": "Throughput",
    "compare": "Side by side: one evaluation, one loop",
    "exports": "Exported and loaded back",
    "headline": "The teaching text's headline",
    "host": "Host",
}
_PICTURES = {"kernels": ("roofline.png",), "latency": ("latency.png", "tick.png"), "throughput": ("throughput.png",)}
_LEGEND = """Times are wall times of one call, host time included, in milliseconds: the median of interleaved rounds,
with the 20th and 80th percentile. Warm-up (compilation included) is apart. Outputs were compared with the reference
before anything was timed; if the difference is more than the tolerance, the row is an error and has no time.
Fractions refer to the ceilings that the same run measured."""


def read(folder: Path) -> list[Record]:
    """The records of a folder of results; none if there are no results yet.

    Raises:
        ValueError: the file of rows is not one.
    """
    path = folder / ROWS_FILE
    return parse(path.read_text(encoding="utf-8")) if path.exists() else []


def write(folder: Path, records: Sequence[Record]) -> None:
    """Write rows, pictures and report, each whole or not at all. Without matplotlib the report says so."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / ROWS_FILE, "".join(to_line(record) + "\n" for record in records).encode())
    missing = why_not("matplotlib")
    pictures = draw(rows_of(records)) if missing is None else {}
    for name, picture in pictures.items():
        atomic_write(folder / name, picture)
    atomic_write(folder / REPORT_FILE, render(records, tuple(pictures), missing).encode())


def replace_part(records: Sequence[Record], part: str, fresh: Sequence[Record]) -> list[Record]:
    """The records with those of one part replaced."""
    return [*(record for record in records if record.part != part), *fresh]


def render(records: Sequence[Record], pictures: Sequence[str], missing: str | None = None) -> str:
    """The report as Markdown. ``missing``: why there are no pictures."""
    rows = rows_of(records)
    sections = ["# stepfusion: benchmark report", _conditions(records), _targets(rows), "## How to read it", _LEGEND]
    if missing is not None:
        sections.append(f"There are no pictures: matplotlib is {missing}.")
    parts = list(dict.fromkeys(record.part for record in records))
    parts.sort(key=lambda name: list(_TITLES).index(name) if name in _TITLES else len(_TITLES))
    sections += [_part(part, records, pictures) for part in parts]
    return "\n\n".join(sections) + "\n"


def _targets(rows: Sequence[Row]) -> str:
    lines = [[target.what, target.target, *target.verdict(rows)] for target in TARGETS]
    return "## Targets\n\n" + markdown(("what", "target", "measured", "verdict"), lines)


def _conditions(records: Sequence[Record]) -> str:
    """What all parts share, once; what differs between parts, with the parts."""
    headers = [record for record in records if isinstance(record, Conditions)]
    values: dict[str, dict[str, list[str]]] = {}
    for header in headers:
        for name, value in asdict(header).items():
            if name in ("part", "date") or value is None:
                continue
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            values.setdefault(name, {}).setdefault(text, []).append(header.part)
    lines = []
    for name, texts in values.items():
        for text, parts in texts.items():
            where = "" if len(texts) == 1 else f" ({', '.join(parts)})"
            lines.append([name.replace("_", " "), text + where])
    if headers:
        dates = sorted(header.date for header in headers)
        lines.append(["date", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"])
    return "## Conditions\n\n" + markdown(("what", "value"), lines)


def _part(part: str, records: Sequence[Record], pictures: Sequence[str]) -> str:
    rows = rows_of(records, part)
    text = [f"## {_TITLES.get(part, part)}"]
    for record in records:
        if isinstance(record, End) and record.part == part:
            notes = "" if record.notes is None else f" {record.notes}"
            text.append(f"{record.status.capitalize()} after {record.seconds:.0f} s.{notes}")
    text += [f"![{name.removesuffix('.png')}]({name})" for name in _PICTURES.get(part, ()) if name in pictures]
    if rows:
        text.append(markdown(*table(rows)))
    return "\n\n".join(text)
