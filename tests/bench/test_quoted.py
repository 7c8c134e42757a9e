"""The ratios on the pages are those of the committed rows."""

import json
from pathlib import Path

import pytest

from stepfusion.bench.quoted import PAGES, TABLES, Ratio, Table, renew
from stepfusion.bench.rows import Row

ROOT = Path(__file__).parents[2]
TABLE = Table("made-up", "faster than", (("step", "step; 1x3"),), (Ratio("a peer", "ours", "peer"),))


def row(provider: str, milliseconds: float | None, shape: str = "1x3") -> Row:
    return Row("kernels", "step", provider, "cpu", shape=shape, median_ms=milliseconds)


@pytest.mark.parametrize("page", PAGES)
def test_each_marked_table_is_what_its_rows_say(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == renew(text, ROOT), "python -m stepfusion.bench.quoted writes the tables again"


def test_every_table_stands_on_a_page() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in TABLES if f"<!-- measured: {name} -->" not in pages] == []


def test_a_ratio_is_the_peers_time_in_ours() -> None:
    rows = [row("ours", 2.0), row("peer", 5.0), row("peer", 9.0, "2x3")]
    assert TABLE.render(rows) == "| faster than | step |\n| --- | --- |\n| a peer | 2.50x |\n"


@pytest.mark.parametrize("rows", [[row("ours", 2.0)], [row("ours", 2.0), row("peer", None)]], ids=["none", "no time"])
def test_a_figure_that_was_not_measured_cannot_be_quoted(rows: list[Row]) -> None:
    with pytest.raises(LookupError, match="one timed row of 'step; 1x3' by 'peer'"):
        TABLE.render(rows)


def test_a_changed_figure_is_noticed() -> None:
    name = next(iter(TABLES))
    assert "0.01x" not in renew(f"<!-- measured: {name} -->\n| 0.01x |\n<!-- end -->", ROOT)


def test_frechet_distances_are_those_that_were_measured() -> None:
    page = (ROOT / "docs/cpu.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "bench/results/frechet").glob("*.json"))
    assert len(files) == 4
    for file in files:
        measured = json.loads(file.read_text())
        assert (measured["frechet_samples"], measured["accuracy_samples"]) == (5000, 1000)
        network = {"cpp": "C++ kernels", "eager": "eager"}[measured["network"]]
        figures = f"{measured['frechet_samples_to_test']:.5f} | {100 * measured['asked_for_accuracy']:.1f} %"
        assert f"| {network}, {measured['network_dtype']} | {figures} |" in page
