"""The network once, and a whole DDIM loop, by everyone who can run it: one interleaved run."""

from __future__ import annotations

from collections.abc import Iterator

from stepfusion.bench.floors import measure_floors
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options
from stepfusion.bench.peers import Case
from stepfusion.bench.race import Race
from stepfusion.bench.rows import Row

PART = "compare"


def compare_rows(options: Options) -> Iterator[Row]:
    """Rows of one evaluation and of one loop for each model and batch; by default the CIFAR-10 UNet at batch 8."""
    device, tiny = options.device, options.tiny
    floors = measure_floors(PART, device, tiny=tiny)
    yield from floors.rows
    steps = options.steps or (2 if tiny else 50 if device.type == "cuda" else 10)
    evaluations = 20 if device.type == "cuda" else 1
    for name in options.models or (("tiny",) if tiny else ("cifar10",)):
        model = load_model(name)
        for batch in options.batches or ((2,) if tiny else (8,)):
            case = Case(model, device, batch, steps, evaluations=evaluations)
            with Race(PART, case, options.select(), floors) as race:
                yield from race.absent()
                yield from race.evaluations(options.rounds or (3 if tiny else 9))
                yield from race.loops(options.rounds or (2 if tiny else 5 if device.type == "cuda" else 3))
