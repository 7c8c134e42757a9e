"""Which sampler is best for so many evaluations of the network: ``python -m stepfusion.bench.sampler_quality MODEL``.

Two measures, of the same seeds and labels for all samplers:

- *distance*: the root of the mean squared difference to where the differential equation goes, DDIM with all
  timesteps of a schedule, else Heun's method with 500 steps; of deterministic samplers;
- *Frechet distance* to test images (:mod:`stepfusion.bench.quality`), if a data set is given; it takes many samples.

A sampler takes as many steps, by its model's defaults, as do not need more evaluations than are allowed. Each row is
written when it is measured, and a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stepfusion.bench.image_classifier import load_classifier, read_images, to_unit_range
from stepfusion.bench.plots import png
from stepfusion.bench.quality import as_stored, balanced_labels, engine_draw, frechet_distance
from stepfusion.bench.rows import markdown
from stepfusion.engine import Engine
from stepfusion.files.atomic import atomic_write
from stepfusion.files.json_files import append_line, read_lines
from stepfusion.samplers.registry import DISTILLED_SAMPLERS, samplers_of
from stepfusion.samplers.table import StepTable
from stepfusion.training.datasets import load_dataset

EVALUATIONS = 8, 12, 15, 20, 30, 50
_TRUE_STEPS = 500  # of Heun's method
_MOST_BYTES = 1 << 20  # of the rows of a run before


class Quality(BaseModel):
    """One sampler with one budget.

    Attributes:
        model: as it was named.
        images, samples: how many the distance is of, and the Frechet distance (None without a data set).
        sampler, table: its name, and its table's.
        allowed, evaluations: of the network for an image: the budget, and what it takes of it.
        distance: to the differential equation's solution; None for samplers that add noise.
        frechet: Frechet distance to test images, None without a data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    images: int
    samples: int | None
    sampler: str
    table: str
    allowed: int
    evaluations: int
    distance: float | None
    frechet: float | None


def fitting_table(engine: Engine, sampler: str, allowed: int) -> StepTable | None:
    """The table of a sampler with the most steps that need at most ``allowed`` evaluations; None if none does."""
    for steps in range(allowed, 0, -1):
        try:
            table = engine.spec.table(sampler, steps)
        except ValueError:
            continue  # a solver of several orders may need more steps than one
        if len(table) <= allowed:
            return table
    return None


@dataclass(frozen=True)
class Frechet:
    """The Frechet distance of ``samples`` images, as they are stored, to test images."""

    samples: int
    distance: Callable[[Tensor], float]


def measure(
    engine: Engine,
    budgets: Sequence[int],
    images: int,
    frechet: Frechet | None,
    workers: int,
    *,
    model: str = "model",
    known: Collection[tuple[str, int]] = (),
) -> Iterator[Quality]:
    """Every sampler of the engine's path with every budget.

    Args:
        images: of seed 0, labels balanced if the model takes labels, whose distance is measured.
        frechet: None to leave it out.
        workers: threads.
        model: its name in the rows.
        known: samplers and budgets that are left out.
    """
    draw = _Draw(engine, workers)
    true: Tensor | None = None
    for sampler in samplers_of(engine.schedule):
        for allowed in () if sampler in DISTILLED_SAMPLERS else budgets:
            table = None if (sampler, allowed) in known else fitting_table(engine, sampler, allowed)
            if table is None:
                continue
            samples = draw(table, images if frechet is None else max(images, frechet.samples))
            distance = None
            if not table.stochastic:
                true = draw(_true(engine), images) if true is None else true
                distance = float((samples[:images] - true).square().mean().sqrt())
            yield Quality(
                model=model,
                images=images,
                samples=None if frechet is None else frechet.samples,
                sampler=sampler,
                table=table.name,
                allowed=allowed,
                evaluations=len(table),
                distance=distance,
                frechet=None if frechet is None else frechet.distance(as_stored(samples[: frechet.samples])),
            )


class _Draw:
    """The first images of seed 0 by a table."""

    def __init__(self, engine: Engine, workers: int) -> None:
        self._engine, self._workers = engine, workers

    def __call__(self, table: StepTable, count: int) -> Tensor:
        engine, classes = self._engine, self._engine.num_classes
        if classes is None:
            return engine.sample(count, table, progress=False).cpu()
        labels = balanced_labels(count, classes - (engine.null_label is not None))
        return engine_draw(engine, table, self._workers)(labels, 0, None)


def _true(engine: Engine) -> StepTable:
    """The table that goes nearest to the solution of the differential equation."""
    if engine.schedule.discrete:
        return engine.table("ddim", engine.schedule.max_steps)
    return engine.table("heun", _TRUE_STEPS)


def distance_to_test(data: Path) -> Callable[[Tensor], float]:
    """The Frechet distance of images to the test images of a data set, read by the classifier of its classes."""
    classifier = load_classifier()
    features, _ = read_images(classifier, to_unit_range(load_dataset(data, "test").images))

    def distance(images: Tensor) -> float:
        return frechet_distance(read_images(classifier, images)[0], features)

    return distance


def as_markdown(found: Sequence[Quality], measure_of: str) -> str:
    """A table of one measure: samplers by evaluations, the best of each column marked."""
    budgets = sorted({quality.allowed for quality in found})
    values = {(q.sampler, q.allowed): getattr(q, measure_of) for q in found if getattr(q, measure_of) is not None}
    best = {b: min((v for (_, allowed), v in values.items() if allowed == b), default=None) for b in budgets}
    lines = []
    for sampler in dict.fromkeys(q.sampler for q in found):
        row = [values.get((sampler, budget)) for budget in budgets]
        if any(value is not None for value in row):
            cells = [_cell(value, best[budget]) for budget, value in zip(budgets, row, strict=True)]
            lines.append([f"`{sampler}`", *cells])
    return markdown(["sampler", *map(str, budgets)], lines) + "\n"


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return ""
    return f"**{value:.3g}**" if value == best else f"{value:.3g}"


def picture(found: Sequence[Quality]) -> bytes:
    """Distance, and Frechet distance if it was measured, against evaluations; both axes logarithmic."""
    measures = [name for name in ("distance", "frechet") if any(getattr(q, name) is not None for q in found)]

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(measures), squeeze=False)[0]
        for axis, name in zip(axes, measures, strict=True):
            for number, sampler in enumerate(dict.fromkeys(q.sampler for q in found)):
                points = [(q.evaluations, getattr(q, name)) for q in found if q.sampler == sampler]
                points = [point for point in points if point[1] is not None]
                if points:
                    style = ("-", "--", ":")[number // 10 % 3]
                    color = f"C{number % 10}"  # the same on both axes
                    axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, label=sampler)
            axis.set(xscale="log", yscale="log", xlabel="evaluations of the network for an image")
            axis.set_ylabel({"distance": "distance to the solution", "frechet": "Frechet distance"}[name])
            ticks = sorted({q.allowed for q in found})
            axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(visible=True, alpha=0.3)
            axis.legend(fontsize=7, ncols=2, handlelength=3)

    return png(paint, (6.0 * len(measures), 4.5))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write ``samplers.jsonl``, ``samplers.md`` and ``samplers.png``."""
    parser = argparse.ArgumentParser(prog="python -m stepfusion.bench.sampler_quality", description=__doc__)
    parser.add_argument("model", help="a bundled model, a model directory or a file")
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS, help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=64, help="for the distance (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="directory of idx files, for the Frechet distance")
    parser.add_argument("--samples", type=int, default=1000, help="for the Frechet distance (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="directory")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    engine = Engine.from_pretrained(args.model, dtype="float32", batch=64)
    frechet = None if args.data is None else Frechet(args.samples, distance_to_test(args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / "samplers.jsonl"
    found = _of_this(rows, args.model, args.images, None if frechet is None else args.samples)
    known = {(quality.sampler, quality.allowed) for quality in found}
    for quality in measure(
        engine, args.evaluations, args.images, frechet, args.workers, model=args.model, known=known
    ):
        found.append(quality)
        append_line(rows, quality.model_dump())
        print(quality.model_dump_json(), flush=True)
    measures = ("distance",) if frechet is None else ("distance", "frechet")
    text = "\n".join(f"{name}\n\n{as_markdown(found, name)}" for name in measures)
    atomic_write(args.out / "samplers.md", text.encode())
    atomic_write(args.out / "samplers.png", picture(found))
    return 0


def _of_this(rows: Path, model: str, images: int, samples: int | None) -> list[Quality]:
    """The rows that the same command has measured before; ValueError if they are another's."""
    found = read_lines(rows, Quality, ValueError, _MOST_BYTES) if rows.exists() else []
    if any((quality.model, quality.images, quality.samples) != (model, images, samples) for quality in found):
        raise ValueError(f"{rows} has rows of another model, or of other numbers of images: give another --out")
    return found


if __name__ == "__main__":
    sys.exit(main())
