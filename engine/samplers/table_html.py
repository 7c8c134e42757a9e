"""A table as HTML, which notebooks show in place of its one line."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from stepfusion.samplers.table import StepTable

_SHOWN = 12  # rows: the first and the last ones of a longer table
_COLUMNS = ("next_x0", "next_x", "next_out", "next_prev", "sigma", "clip")


def table_html(table: StepTable) -> str:
    """The rows of a table: what the network is told, signal and noise where they start, and their coefficients.

    Columns that are 0 everywhere are left out, and so are the rows in the middle of a long table.
    """
    signal, noise = table.pairs()
    columns = {"told": table.told, "signal": signal, "noise": noise}
    columns |= {name: table.column(name) for name in _COLUMNS if (table.column(name) != 0).any()}
    head = "".join(f"<th>{name}</th>" for name in ("row", *columns))
    half = _SHOWN // 2
    shown = range(len(table)) if len(table) <= _SHOWN else [*range(half), None, *range(len(table) - half, len(table))]
    rows = []
    for row in shown:
        cells = ["&#8942;"] if row is None else [str(row), *(_number(column[row]) for column in columns.values())]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><caption>{html.escape(repr(table))}</caption><tr>{head}</tr>{''.join(rows)}</table>"


def _number(value: np.generic) -> str:
    return f"{value:.4g}" if isinstance(value, np.floating) else str(value)
