"""Images a second against the batch: whole DDIM loops until the images are on the host."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from stepfusion.bench.floors import measure_floors
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options, stages
from stepfusion.bench.providers import Case
from stepfusion.bench.race import Race
from stepfusion.bench.rows import Row

PART = "throughput"
_BATCHES: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {"tiny": (2, 4)},
    "cpu": {"cifar10": (1, 8, 32)},
    "cuda": {"cifar10": (64, 256, 1024), "celebahq-256": (8, 32)},
}
_DEFAULT_BATCHES = (1, 8, 32)


def throughput_rows(options: Options) -> Iterator[Row]:
    """Rows for each model and batch; loops are short, for the rate does not depend on their length."""
    device, tiny = options.device, options.tiny
    floors = measure_floors(PART, device, tiny=tiny)
    yield from floors.rows
    sizes = _BATCHES["tiny" if tiny else device.type]
    steps = options.steps or (2 if tiny else 20 if device.type == "cuda" else 4)
    rounds = options.rounds or (2 if tiny else 3)
    for taking_part, name in product(stages(options.select()), options.models or tuple(sizes)):
        model = load_model(name)
        for batch in options.batches or sizes.get(name, _DEFAULT_BATCHES):
            with Race(PART, Case(model, device, batch, steps), taking_part, floors) as race:
                yield from race.absent()
                yield from race.loops(rounds, finish=True)
