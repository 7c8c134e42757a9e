"""The network once, and a whole DDIM loop, by everyone who can run it: one interleaved run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from stepfusion.bench.floors import measure_floors
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options, stages
from stepfusion.bench.ours import exported_providers
from stepfusion.bench.providers import Case, Provider
from stepfusion.bench.race import Race
from stepfusion.bench.rows import Row

#: Models and their batches, by device.
_COMPARED = {"cpu": {"cifar10": 8}, "cuda": {"cifar10": 8, "sd-class": 1, "adm-64": 1}}


def compare_rows(options: Options) -> Iterator[Row]:
    """Everyone, for each model and batch; by default the CIFAR-10 UNet at batch 8, and on a GPU, at batch 1, UNets of
    the sizes that published figures are of.
    """
    yield from _side_by_side("compare", options, options.select(), _COMPARED[options.device.type])


def export_rows(options: Options) -> Iterator[Row]:
    """The engine with its network in every format that runs here, beside the engine as it is."""
    providers = [p for p in exported_providers(options.device) if options.compiled or not p.compiles]
    yield from _side_by_side("exports", options, providers, {"fashion-mnist": 8})


def _side_by_side(
    part: str, options: Options, providers: Sequence[Provider], models: Mapping[str, int]
) -> Iterator[Row]:
    """Rows of one evaluation and of one loop of each model, at its batch."""
    device, tiny = options.device, options.tiny
    floors = measure_floors(part, device, tiny=tiny)
    yield from floors.rows
    steps = options.steps or (2 if tiny else 50 if device.type == "cuda" else 10)
    evaluations = 20 if device.type == "cuda" else 1
    names = options.models or (("tiny",) if tiny else tuple(models))
    for taking_part, name in product(stages(providers), names):
        source = load_model(name)
        for batch in options.batches or ((2,) if tiny else (models.get(name, 8),)):
            case = Case(source, device, batch, steps, evaluations=evaluations)
            with Race(part, case, taking_part, floors) as race:
                yield from race.absent()
                yield from race.evaluations(options.rounds or (3 if tiny else 9))
                yield from race.loops(options.rounds or (2 if tiny else 5 if device.type == "cuda" else 3))
