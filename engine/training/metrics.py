"""The metrics of a training run: a line of JSON each in ``metrics.jsonl``, and the figure of the loss."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from stepfusion.files.atomic import atomic_write

METRICS = "metrics.jsonl"

_FIGURE = "loss.png"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line that was cut short by a crash is left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line to ``metrics.jsonl``."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def forget_rows_after(path: Path, step: int) -> None:
    """Drop the rows of steps that are about to be made again."""
    rows = read_metrics(path)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if len(kept) < len(rows):
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def plot_loss(directory: Path) -> None:
    """Draw ``metrics.jsonl`` of a run as ``loss.png``; without matplotlib, say so and go on."""
    rows = read_metrics(directory / METRICS)
    if not rows:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: no {_FIGURE}; {METRICS} holds the curve", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    atomic_write(directory / _FIGURE, png.getvalue())
