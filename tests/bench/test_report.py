"""Rows, lines, pictures and the report: what is written is what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepfusion.bench import report
from stepfusion.bench.optional import need
from stepfusion.bench.plots import draw, plain_numbers, png
from stepfusion.bench.rows import (
    Conditions,
    End,
    Record,
    Row,
    aligned,
    from_line,
    markdown,
    number,
    parse,
    table,
    to_line,
)
from stepfusion.bench.targets import TARGETS

ROW = Row(
    "latency", "DDIM-2 to images on the host", "stepfusion eager float32", "cpu", median_ms=2.0, batch=4, steps=2
)
HEADER = Conditions(
    "latency", "cpu", "a processor", "2026-11-21T00:00:00+00:00", "3.11.7", "Linux", 2, {"torch": "2.13.0"}
)


def everything() -> list[Record]:
    """Rows that every picture has something to draw of."""
    ceiling = Row("kernels", "ceiling: copy", "torch", "cpu", dtype="uint8", bytes=1 << 20, median_ms=0.1, min_ms=0.1)
    matmul = replace(
        ceiling, op="ceiling: matmul", dtype="float32", bytes=None, flops=1 << 30, median_ms=10.0, min_ms=10.0
    )
    step = replace(ceiling, op="ddim step, no noise", provider="reference", bytes=1200, flops=1000, median_ms=0.01)
    tick = Row("latency", "tick: network", ROW.provider, "cpu", model="tiny", shape="1x3x8x8", median_ms=1.0)
    return [
        HEADER,
        ceiling,
        matmul,
        step,
        replace(ROW, model="tiny"),
        replace(ROW, model="tiny", batch=8, median_ms=3.0),
        replace(ROW, part="throughput", model="tiny"),
        tick,
        replace(tick, op="tick: step", median_ms=0.2),
        replace(tick, op="tick: rest", median_ms=-0.01),
        replace(tick, op="tick: python", median_ms=0.005),
        End("latency", "done", 3.0),
    ]


@pytest.mark.parametrize("record", [ROW, HEADER, End("latency", "stopped", 3.0, "at its limit")])
def test_a_line_comes_back(record: Record) -> None:
    assert from_line(to_line(record)) == record


def test_what_was_not_measured_is_absent() -> None:
    assert set(json.loads(to_line(ROW))) == {
        "kind", "part", "op", "provider", "device", "median_ms", "batch", "steps",
    }  # fmt: skip


def test_infinity_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"^max_difference of a row must be finite, got inf$"):
        to_line(replace(ROW, max_difference=math.inf))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a line of benchmark rows must be JSON, got '{'"),
        ("[1]", "a line of benchmark rows must have a kind (row, conditions, end), got '[1]'"),
        (
            '{"kind": "x"}',
            """a line of benchmark rows must have a kind (row, conditions, end), got '{"kind": "x"}'""",
        ),
        ('{"kind": "end", "speed": 1}', "a line of benchmark rows has the unknown field 'speed'"),
    ],
)
def test_what_is_no_line(line: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(line)
    assert str(caught.value) == message


def test_images_a_second() -> None:
    assert ROW.images_per_second == 2000.0
    assert replace(ROW, steps=None).images_per_second is None  # one evaluation makes no image


def test_a_table_shows_filled_columns_only_and_errors() -> None:
    header, lines = table([ROW, replace(ROW, median_ms=None, error="differs")])
    assert header == ["op", "provider", "batch", "median ms", "images/s", "notes"]
    assert lines[1] == [ROW.op, ROW.provider, "4", "", "", "ERROR: differs"]


def test_tables_of_text() -> None:
    header, lines = ("name", "ms"), [("a|b", "1.5"), ("c", "20")]
    assert aligned(header, lines) == "name   ms\na|b   1.5\nc      20"
    assert markdown(header, lines) == "| name | ms |\n| --- | --- |\n| a/b | 1.5 |\n| c | 20 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.0123, "0.0123"), (2e-6, "2.0e-06")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_picture_for_everything_that_has_data() -> None:
    rows = [record for record in everything() if isinstance(record, Row)]
    pictures = draw(rows)
    assert set(pictures) == {"roofline.png", "latency.png", "throughput.png", "tick.png"}
    for picture in pictures.values():
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    assert draw([row for row in rows if row.part == "throughput"]).keys() == {"throughput.png"}
    assert draw([]) == {}


def test_ticks_are_plain_numbers() -> None:
    labels = []

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0.1, 1000], [0.01, 10000])
        axes.set(xscale="log", yscale="log")
        plain_numbers(axes.xaxis, axes.yaxis)
        figure.canvas.draw()
        labels.extend(text.get_text() for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels())

    png(paint, (3, 3))
    assert {"0.1", "1", "10", "1000", "10000"} <= set(labels)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(need("matplotlib").rcParams)
    draw([record for record in everything() if isinstance(record, Row)])
    assert dict(need("matplotlib").rcParams) == before


def test_the_report_holds_conditions_targets_rows_and_pictures(tmp_path: Path) -> None:
    report.write(tmp_path, everything())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latency.png", "report.md", "roofline.png", "rows.jsonl", "throughput.png", "tick.png",
    ]  # fmt: skip
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| device name | a processor |" in text
    assert "| versions | torch 2.13.0 |" in text
    assert "Done after 3 s." in text
    assert text.count("![") == 4
    lines = text.split("## Targets\n\n")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [cell[:2] for cell in cells] == [[target.what, target.target] for target in TARGETS]
    assert {cell[3] for cell in cells} == {"not measured here"}
    assert report.read(tmp_path) == everything()


def test_conditions_that_differ_name_their_parts() -> None:
    other = replace(HEADER, part="host", device_name="another")
    text = report.render([HEADER, other], ())
    assert "| device name | a processor (latency) |\n| device name | another (host) |" in text
    assert "| python | 3.11.7 |" in text


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "why_not", lambda *_: "not installed: pip install matplotlib")
    report.write(tmp_path, everything())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "There are no pictures: matplotlib is not installed: pip install matplotlib." in text
    assert not list(tmp_path.glob("*.png"))


def test_a_part_measured_again_replaces_its_rows_only() -> None:
    kept, fresh = End("host", "done", 1.0), replace(ROW, median_ms=9.0)
    assert report.replace_part([kept, HEADER, ROW], "latency", [fresh]) == [kept, fresh]
