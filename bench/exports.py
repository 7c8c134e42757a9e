"""The engine with its network exported in every format that runs here, beside the engine as it is."""

from __future__ import annotations

from collections.abc import Iterator

from stepfusion.bench.floors import measure_floors
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options
from stepfusion.bench.peers import Case, Exported, exported_providers
from stepfusion.bench.race import Race
from stepfusion.bench.rows import Row

PART = "exports"


def export_rows(options: Options) -> Iterator[Row]:
    """Rows of one evaluation and of one loop, for each format."""
    device, tiny = options.device, options.tiny
    floors = measure_floors(PART, device, tiny=tiny)
    yield from floors.rows
    steps = options.steps or (2 if tiny else 50 if device.type == "cuda" else 10)
    providers = [p for p in exported_providers(device) if not tiny or options.compiled or _is_quick(p)]
    for name in options.models or (("tiny",) if tiny else ("fashion-mnist",)):
        for batch in options.batches or ((2,) if tiny else (8,)):
            case = Case(load_model(name), device, batch, steps, evaluations=20 if device.type == "cuda" else 1)
            with Race(PART, case, providers, floors) as race:
                yield from race.absent()
                yield from race.evaluations(options.rounds or (3 if tiny else 9))
                yield from race.loops(options.rounds or (2 if tiny else 5))


def _is_quick(provider: object) -> bool:
    """Whether nothing is compiled that takes long: the rehearsal takes these."""
    return not isinstance(provider, Exported) or provider.form == "onnx"
