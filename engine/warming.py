"""Everything that an engine would compile for its first images, compiled ahead of time into the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from stepfusion import _checks
from stepfusion.engine import Engine
from stepfusion.execution.warm_cache import WarmRun, add_run, environment_here
from stepfusion.kernels.cache import cache_directory, compiled_anew
from stepfusion.kernels.launch import plain_torch
from stepfusion.lanes import offline
from stepfusion.lanes.conditions import blank_options
from stepfusion.samplers.table import StepTable

_TICKS = 4  # rows that are walked: by then each kind of tick was run, and what multistep samplers remember is full
_GUIDED = 2.0


def warm(
    engine: Engine,
    batches: Sequence[int] = (1,),
    *,
    lanes: int | None = None,
    table: StepTable | None = None,
    name: str | None = None,
    weights: str | None = None,
) -> WarmRun:
    """Compile what the first images of an engine would wait for, and keep it in the cache for other processes.

    The cache is the directory ``STEPFUSION_CACHE`` names, or the platform's; set it before the engine is made. A
    manifest in it, ``warm.json``, says what it was filled for. A process that finds all of it there compiles nothing;
    it may be read-only, and lie at another path than here.

    Args:
        engine: what will sample; from :meth:`stepfusion.Engine.from_exported`, too.
        batches: how many images each request is of, from 1.
        lanes: also what a server with so many lanes needs, as :class:`stepfusion.serving.AsyncEngine` takes them.
        table: the sampler's; by default that of :meth:`stepfusion.Engine.table`. Others run the same kernels, unless
            they reuse, threshold or rescale.
        name, weights: what the manifest calls the model, and the SHA-256 of its weights.

    Returns:
        What was entered in the manifest; its ``compiled`` lists what this process had to compile, the engine's making
        included.

    Raises:
        TypeError, ValueError: naming the argument. OSError: the cache cannot be written.
    """
    for count in batches:
        _checks.integer("batches", count, 1, 1 << 20)
    table = engine.table() if table is None else table
    guided = engine.null_label is not None or bool(engine.spec.conditions)
    for count in batches:
        for guidance in (1.0, _GUIDED) if guided else (1.0,):
            _walk(engine, count, table, guidance)
    if lanes is not None:
        from stepfusion.serving.async_engine import AsyncEngine  # which who does not serve need not wait for

        AsyncEngine(engine, lanes=lanes).start().close()
    plan = engine.plan
    run = WarmRun(
        model=name or repr(engine),
        weights=weights,
        device=plan.device.type,
        dtype=plan.dtype_choice.value,
        backend=plan.backend.value,
        network=plan.network.value,
        invariant=engine.invariant,
        batches=list(batches),
        lanes=lanes,
        guided=guided,
        sampler=table.name,
        compiled=list(compiled_anew()),
        environment=environment_here(plan.network.value),
    )
    add_run(cache_directory(), run)
    return run


def _walk(engine: Engine, count: int, table: StepTable, guidance: float) -> None:
    """Sample the first rows of a table, and make pixels; with Triton also as a callback has it, which sees x0."""
    request = engine.request(count, table, **blank_options(engine.spec, guidance))
    for watched in (False, True) if engine.plan.backend.value == "triton" else (False,):
        images = offline.room_for(engine.runners, request)
        lanes = offline.OfflineLanes(engine.runners, request, images, strict=False, watched=watched)
        rounds = lanes.run()
        for _ in islice(rounds, _TICKS):
            pass
        rounds.close()
    _pixels(engine)


@plain_torch(gradients=False)
def _pixels(engine: Engine) -> None:
    engine.to_uint8(engine.runners.first_state("seed", 0)[None])
