"""What reuse of inner levels saves and costs: ``python -m stepfusion.bench.reuse --data DIR``.

Time is that of a tick of a published UNet whose rows run the whole network, and of one whose rows run its outermost
level (:mod:`stepfusion.networks.levels`), in one interleaved run. Quality is that of a model's images if every
so-manieth row is whole: the root of the mean squared difference to those of whole rows, of the same seeds and labels,
and the Frechet distance to test images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepfusion.bench.measure import interleave
from stepfusion.bench.models import load_model
from stepfusion.bench.quality import as_stored, balanced_labels, engine_draw
from stepfusion.bench.rows import markdown
from stepfusion.bench.sampler_quality import distance_to_test
from stepfusion.engine import Engine
from stepfusion.lanes.runner import Part
from stepfusion.options import NetworkMode
from stepfusion.samplers.schedule import NoiseSchedule

EVERY = 1, 2, 3, 5


@dataclass(frozen=True)
class TickTimes:
    """Milliseconds of a tick of ``batch`` lanes, medians of ``rounds``."""

    model: str
    batch: int
    network: str
    rounds: int
    whole_ms: float
    outer_ms: float

    @property
    def ratio(self) -> float:
        """How many times as long a whole tick takes."""
        return self.whole_ms / self.outer_ms


@dataclass(frozen=True)
class ReuseQuality:
    """Images of ``steps`` rows, every ``every``-th of which is whole.

    Attributes:
        distance: to the images of whole rows.
        frechet: Frechet distance to test images, None without a data set.
    """

    every: int
    steps: int
    images: int
    distance: float
    frechet: float | None


def time_ticks(model: str, batch: int, network: NetworkMode, rounds: int) -> TickTimes:
    """Time both kinds of a tick of a published UNet (:data:`stepfusion.bench.models.PUBLISHED`).

    Raises:
        RuntimeError: one of them fails.
    """
    published = load_model(model)
    engine = Engine(
        published.network, NoiseSchedule.linear(), shape=published.image_shape, network=network, batch=batch
    )
    request = engine.request(batch, engine.table("ddim", 50).reusing(2))
    runner = engine.runners.make(engine.runners.key(request, batch))
    first = runner.load(request.table)
    runner.prepare(noise=False, keep_x0=False)
    with torch.no_grad():
        runner.admit(range(batch), list(request.lane_starts), first)

        def tick(part: Part) -> Callable[[], None]:
            def call() -> None:
                runner.rows.fill_(1)  # the same row, whatever was ticked before
                runner.tick(part=part)

            return call

        times = interleave({part.value: tick(part) for part in (Part.WHOLE, Part.OUTER)}, engine.plan.device, rounds)
    whole, outer = times[Part.WHOLE.value], times[Part.OUTER.value]
    if isinstance(whole, str) or isinstance(outer, str):
        raise RuntimeError(f"whole rows: {whole}; reuse rows: {outer}")
    way = engine.plan.network.value
    return TickTimes(model, batch, way, rounds, whole.median_ms, outer.median_ms)


def qualities(
    engine: Engine, steps: int, images: int, distance_to: Callable[[Tensor], float] | None, workers: int
) -> Iterator[ReuseQuality]:
    """Each of :data:`EVERY`, with DDIM; labels are balanced if the model takes labels."""
    classes = engine.num_classes
    if classes is None:
        raise ValueError("the model takes no labels; the Frechet distance here is that of labelled test images")
    labels = balanced_labels(images, classes - (engine.null_label is not None))
    table = engine.table("ddim", steps)
    exact: Tensor | None = None
    for every in EVERY:
        samples = engine_draw(engine, table.reusing(every), workers)(labels, 0, None)
        exact = samples if exact is None else exact
        distance = float((samples - exact).square().mean().sqrt())
        frechet = None if distance_to is None else distance_to(as_stored(samples))
        yield ReuseQuality(every, steps, images, distance, frechet)


def as_markdown(times: TickTimes, found: Sequence[ReuseQuality]) -> str:
    """Both tables, for a page."""
    speed = markdown(
        ["UNet", "batch", "network", "whole row, ms", "reuse row, ms", "ratio"],
        [
            [
                *(times.model, str(times.batch), times.network),
                *(f"{times.whole_ms:.1f}", f"{times.outer_ms:.1f}", f"{times.ratio:.2f}"),
            ]
        ],
    )
    rows = [[str(q.every), f"{q.distance:.3f}", "" if q.frechet is None else f"{q.frechet:.2f}"] for q in found]
    return f"{speed}\n\n" + markdown(["whole every", "distance", "Frechet distance"], rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print both tables and a line of JSON for each result."""
    parser = argparse.ArgumentParser(prog="python -m stepfusion.bench.reuse", description=__doc__)
    parser.add_argument("--model", default="fashion-mnist", help="whose images are judged (default: %(default)s)")
    parser.add_argument("--unet", default="cifar10", help="whose ticks are timed (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--network", default="auto", help="how networks run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM (default: %(default)s)")
    parser.add_argument("--images", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="directory of idx files, for the Frechet distance")
    parser.add_argument("--workers", type=int, default=2, help="threads (default: %(default)s)")
    args = parser.parse_args(arguments)
    times = time_ticks(args.unet, args.batch, args.network, args.rounds)
    print(json.dumps({**asdict(times), "ratio": times.ratio}), flush=True)
    torch.set_num_threads(1)
    engine = Engine.from_pretrained(args.model, dtype="float32", batch=64, network=args.network)
    distance_to = None if args.data is None else distance_to_test(args.data)
    found = []
    for quality in qualities(engine, args.steps, args.images, distance_to, args.workers):
        found.append(quality)
        print(json.dumps(asdict(quality)), flush=True)
    print(as_markdown(times, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
