"""The metrics of a training run: a line of JSON each in ``metrics.jsonl``, and the figure of the loss."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from stepfusion.files.atomic import atomic_write
from stepfusion.files.json_files import FileModel, read_lines
from stepfusion.files.regular import open_regular

METRICS = "metrics.jsonl"
FIGURE = "loss.png"

_SOFTWARE = "stepfusion train"  # by which a figure is known as ours
_MAX_BYTES = 1 << 28


class MetricsRow(FileModel):
    """One line: the mean loss since the line before, and how fast it went."""

    step: int = Field(ge=0)
    loss: float
    lr: float | None = None
    images_per_s: float | None = None
    elapsed_s: float | None = None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line that was cut short by a crash is left out.

    Raises:
        ValueError: another line is not one of a training run's metrics, or the file is no regular file.
    """
    rows = read_lines(Path(path), MetricsRow, ValueError, _MAX_BYTES)
    return [row.model_dump(exclude_unset=True) for row in rows]


def forget_rows_after(path: Path, step: int) -> None:
    """Drop the rows of steps that are about to be made again, and what a crash left of a line.

    A file that has other names (hard links, as backups have) is replaced by one of its own, so that theirs stays.
    """
    kept = b"".join(json.dumps(row).encode() + b"\n" for row in read_metrics(path) if row["step"] <= step)
    if not path.exists():
        return
    with open_regular(path) as file:
        as_it_is = file.read() == kept and os.fstat(file.fileno()).st_nlink == 1
    if not as_it_is:
        atomic_write(path, kept)


def plot_loss(directory: Path) -> None:
    """Draw ``metrics.jsonl`` of a run as ``loss.png``; if it cannot be drawn, say why and go on."""
    rows = read_metrics(directory / METRICS)
    if not rows:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: no {FIGURE}; {METRICS} holds the curve", file=sys.stderr)
        return
    if not _is_ours(directory / FIGURE):
        print(f"{directory / FIGURE} is not of this program, and stays; {METRICS} holds the curve", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="training loss")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:g}")  # plain numbers, and no powers of ten
    axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": _SOFTWARE})
    atomic_write(directory / FIGURE, png.getvalue())


def _is_ours(path: Path) -> bool:
    """Whether a figure may be replaced: there is none, or a run drew it."""
    if not os.path.lexists(path):
        return True
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG",)) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return False
