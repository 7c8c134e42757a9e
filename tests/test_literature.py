"""docs/literature.md: no cell is empty, every test it names is there, and no difference is larger than it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from stepfusion_testing.literature import DIFFERENCES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "literature.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.partition("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| text or peer"))
]
KEYED = {match[1]: float(match[2]) for row in ROWS if (match := re.fullmatch(r"`(\w+)` ([\d.e-]+)", row[-1]))}


def names_in(path: Path) -> set[str]:
    """The tests of a file: "test_it", or "TestClass::test_it"."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_no_cell_is_empty() -> None:
    assert len(ROWS) > 20
    assert all(len(row) == 6 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_the_test_of_a_row_is_there(row: list[str]) -> None:
    path, _, name = row[4].strip("`").partition("::")
    assert (ROOT / path).is_file()
    assert name in names_in(ROOT / path), row[4]


def test_every_measured_difference_is_on_the_page() -> None:
    assert KEYED.keys() == DIFFERENCES.keys()


@pytest.mark.parametrize("key", DIFFERENCES)
def test_the_page_tells_the_truth(key: str) -> None:
    assert DIFFERENCES[key]() <= KEYED[key]


def test_the_figures_are_there_and_small() -> None:
    figures = re.findall(r"\]\((images/[\w.-]+)\)", PAGE)
    assert len(figures) >= 6
    for figure in figures:
        assert 0 < (ROOT / "docs" / figure).stat().st_size < 300_000
