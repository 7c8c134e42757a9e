"""The tables of ratios on the pages, made of committed rows: ``python -m stepfusion.bench.quoted``.

A page marks where a table of :data:`TABLES` stands:

    <!-- measured: NAME -->
    ...
    <!-- end -->

The command, in the root of the repository, writes the tables between the marks again; a test compares them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepfusion.bench.rows import Record, Row, latest, markdown, parse, rows_of

PAGES = "README.md", "docs/cpu.md", "docs/deploy.md"
_MARKED = re.compile(r"(?P<open><!-- measured: (?P<name>[\w-]+) -->\n).*?(?P<close><!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Ratio:
    """A line of a table: how many times faster ``ours`` is than ``peer``, in each of the table's columns."""

    words: str
    ours: str
    peer: str


@dataclass(frozen=True)
class Table:
    """A table of ratios.

    Attributes:
        results: the folder of rows, in ``bench/results``.
        head: the words above the first column.
        columns: what stands above the others, and their rows' operation, with its shape after a semicolon if there
            are several.
        lines: of the table.
    """

    results: str
    head: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[Ratio, ...]

    def render(self, records: Sequence[Record]) -> str:
        """The table in Markdown; LookupError if a row is missing or has no time."""
        rows = rows_of(latest(records))
        lines = [[line.words, *(_ratio(rows, op, line) for _, op in self.columns)] for line in self.lines]
        return markdown([self.head, *(title for title, _ in self.columns)], lines) + "\n"


def _ratio(rows: Sequence[Row], operation: str, line: Ratio) -> str:
    ours, peer = (_milliseconds(rows, operation, provider) for provider in (line.ours, line.peer))
    return f"{peer / ours:.2f}x"


def _milliseconds(rows: Sequence[Row], operation: str, provider: str) -> float:
    op, _, shape = operation.partition("; ")
    found = [r for r in rows if r.op == op and r.provider == provider and shape in ("", r.shape)]
    if len(found) != 1 or found[0].median_ms is None:
        raise LookupError(f"there must be one timed row of {operation!r} by {provider!r}, got {len(found)}")
    return found[0].median_ms


def render(name: str, root: Path) -> str:
    """The table of this name, from the rows in the repository at ``root``."""
    table = TABLES[name]
    text = (root / "bench" / "results" / table.results / "rows.jsonl").read_text(encoding="utf-8")
    return table.render(parse(text))


def renew(page: str, root: Path) -> str:
    """The text of a page, with each marked table as its rows say."""
    return _MARKED.sub(lambda mark: mark["open"] + render(mark["name"], root) + mark["close"], page)


_NETWORK = (("one evaluation", "evaluation"), ("DDIM-10 loop", "DDIM-10 loop"))
_FLOAT32, _BFLOAT16, _EAGER = "stepfusion cpp float32", "stepfusion cpp bfloat16", "stepfusion eager float32"


def _beside(ours: str) -> tuple[Ratio, ...]:
    return (
        Ratio("diffusers 0.42.1 as shipped", ours, "diffusers float32"),
        Ratio("diffusers, compiled with frozen weights", ours, "diffusers float32 compiled"),
        Ratio("OpenVINO, on diffusers' network", ours, "openvino float32"),
        Ratio("ONNX Runtime, on diffusers' network", ours, "onnxruntime float32"),
    )


def _in_bfloat16(results: str) -> Table:
    lines = (
        Ratio("diffusers 0.42.1 as shipped (float32)", _BFLOAT16, "diffusers float32"),
        Ratio(
            "diffusers in bfloat16, channels_last, compiled with frozen weights",
            _BFLOAT16,
            "diffusers bfloat16 channels_last compiled",
        ),
        Ratio("ours in float32", _BFLOAT16, _FLOAT32),
    )
    return Table(results, "bfloat16, ours is faster than", _NETWORK, lines)


def _kernels(shape: str) -> Table:
    """The sampling kernels for one shape [B, C, H, W], beside diffusers' scheduler."""
    operations = {
        "step": "ddim step, no noise",
        "step, noise given": "ddim step, noise given",
        "step, noise drawn": "ddim step, noise drawn",
        "`q_sample`": "q_sample, noise given",
        "`q_sample`, drawn": "q_sample, noise drawn",
        "posterior": "posterior",
    }
    columns = tuple((title, f"{operation}; {shape}") for title, operation in operations.items())
    lines = tuple(
        Ratio(f"{peer}, {shape}", "stepfusion C++", peer) for peer in ("diffusers", "inductor", "reference")
    )
    return Table("cpu-zen4", "the C++ kernels are faster than", columns, lines)


_HEAD = "float32, ours is faster than"
TABLES: dict[str, Table] = {
    "float32": Table("cpu-zen4", _HEAD, _NETWORK, _beside(_FLOAT32)),
    "float32-no-bfloat16": Table("cpu-zen4-no-bfloat16", _HEAD, _NETWORK, _beside(_FLOAT32)),
    "eager": Table("cpu-zen4", "our UNet as eager operators is faster than", _NETWORK, _beside(_EAGER)),
    "bfloat16": _in_bfloat16("cpu-zen4-bfloat16"),
    "amx": _in_bfloat16("cpu-amx"),
    "starts": Table(
        "start-zen3",
        "the first image of a process comes earlier by",
        tuple(
            (words, f"first image: {what}")
            for words, what in (
                ("`stepfusion sample`", "sample"),
                ("`stepfusion serve`", "serve"),
                ("an exported bundle", "exported bundle"),
            )
        ),
        (Ratio("caches of `stepfusion warm`, beside empty ones", "warm", "cold"),),
    ),
    "kernels-large": _kernels("64x3x64x64"),
    "kernels-small": _kernels("1x1x28x28"),
}


def main() -> int:
    """Write the tables of every page again."""
    root = Path.cwd()
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        (root / page).write_text(renew(text, root), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
