"""An engine's tick as a ``torch.export`` program, its description, and its comparison with the engine's own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from stepfusion import _checks
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.export.batch import Batch
from stepfusion.export.manifest import KINDS, NULL, Tensorspec
from stepfusion.export.program import (
    check_close,
    condition_specs,
    example_conditions,
    example_inputs,
    input_names,
    plain_network,
    trace,
)
from stepfusion.export.runtimes import Runtime, TickRuntime
from stepfusion.export.tick import InitialNoise, Tick
from stepfusion.export.tick_loop import outputs_of, table_inputs, walk
from stepfusion.kernels import COLUMNS
from stepfusion.samplers.table import StepTable

_MOST_ROWS = 1 << 24
_EXAMPLE_ROWS = 8
#: Samplers whose rows draw noise, by how much history they use.
_EXAMPLES = ("euler_ancestral", "dpmpp_2m_sde")
_EXAMPLE_SEED = 0x0123456789ABCDEF
_LOOP_EVALUATIONS = 50  # of one image, in the loop that checks an export
_LOOP_DRIFT = 1e-3  # float32, after that loop; of the largest element on a path that is not discrete


def check_kind(engine: Engine, kind: str, table: StepTable | None, guided: bool) -> None:
    """Refuse a kind that there is not, guidance of a network, and what :func:`check_tick` refuses of a tick."""
    _checks.choice("kind", kind, KINDS)
    if kind == "network" and guided:
        raise ExportError("guided is for kind='tick': a network runs once, with the labels that it is given")
    if kind == "tick":
        check_tick(engine, table, guided)


def check_tick(engine: Engine, table: StepTable | None, guided: bool) -> None:
    """Refuse a tick that could not run.

    Raises:
        ExportError: there is no table, or one for another prediction type or schedule, or of a sampler that a tick
            cannot run, or a tick of a model without a null label was to be guided.
    """
    if table is None:
        raise ExportError("a tick needs a table: the sampler's rows that go with it")
    if table.prediction != engine.prediction or table.schedule != engine.schedule:
        raise ExportError(
            f"the table is for {table.prediction} and {table.schedule}, and the engine for {engine.prediction} and "
            f"{engine.schedule}"
        )
    if table.whole_image:
        raise ExportError(f"a tick has no dynamic thresholding and no rescaled guidance, and {table!r} asks for it")
    if engine.schedule.discrete and (table.column("net_scale") != 1).any():
        raise ExportError(f"a tick shows the network x as it is, and {table!r} scales it")
    if guided and engine.null_label is None and not engine.spec.conditions:
        raise ExportError("a guided tick needs a null label or conditions, and the model has none")


def further_inputs(engine: Engine, *, guided: bool = False, history: int = 0) -> tuple[str, ...]:
    """The inputs of the engine's tick after ``index``; ``history`` is how many entries of it the tick keeps."""
    conditions = input_names(engine)[-len(engine.spec.conditions) :] if engine.spec.conditions else ()
    present = {
        "labels": engine.num_classes is not None,
        "guidance": guided,
        **dict.fromkeys(conditions, True),
        **dict.fromkeys((NULL + name for name in conditions), guided),
        "told": not engine.schedule.discrete,
        "in_scale": not engine.schedule.discrete,
        "history": history > 0,
    }
    return tuple(name for name, there in present.items() if there)


def tick_module(engine: Engine, *, guided: bool = False, history: int = 0) -> Tick:
    """The engine's tick, with its network in plain operators."""
    further = further_inputs(engine, guided=guided, history=history)
    null_label = engine.null_label if guided else None
    conditions = [one.name for one in engine.spec.conditions]
    return Tick(plain_network(engine), engine.plan.dtype, null_label, further, conditions).eval()


def tick_program(engine: Engine, batch: Batch, *, guided: bool = False, history: int = 0) -> ExportedProgram:
    """The engine's tick as a program for these batch sizes and tables of any length.

    Args:
        history: of how many entries; 0 for a tick that keeps nothing but x from row to row.

    Raises:
        ExportError: the network is not a module, or cannot be traced.
    """
    example = tick_example(engine, batch.examples()[0], guided=guided, history=history)
    inputs, _ = tick_specs(engine, batch, guided=guided, history=history)
    rows = {0: Dim("rows", min=1, max=_MOST_ROWS)}
    shapes = [rows if spec.shape[0] == "rows" else _lanes(batch) for spec in inputs]
    further = len(further_inputs(engine, guided=guided, history=history))
    named = len(shapes) - further
    module = tick_module(engine, guided=guided, history=history)
    # torch.export takes the inputs after the named ones as one
    return trace(module, example, (*shapes[:named], *([tuple(shapes[named:])] if further else [])), "tick")


def initial_noise_program(engine: Engine, batch: Batch) -> ExportedProgram:
    """Where the engine's images start, as a program (seed, index) -> x_T for these batch sizes."""
    numbers = torch.arange(batch.examples()[0], device=engine.plan.device)
    shapes = (_lanes(batch), _lanes(batch))
    return trace(InitialNoise(engine.shape).eval(), (numbers, numbers.clone()), shapes, "initial noise")


def tick_example(engine: Engine, batch: int, *, guided: bool = False, history: int = 0) -> tuple[Tensor, ...]:
    """Inputs of the engine's tick for a batch, in order: lanes all over the table of a sampler that draws noise."""
    x, _, *rest = example_inputs(engine, batch)
    labels = rest[: engine.num_classes is not None]
    discrete = engine.schedule.discrete
    sampler = "ddpm" if discrete and not history else _EXAMPLES[min(history, 1)]
    rows = engine.spec.table(sampler, min(_EXAMPLE_ROWS, engine.schedule.max_steps))
    table = table_inputs(rows, x.device)
    lane = torch.arange(batch, device=x.device)
    scale = [1.0 + lane.to(torch.float32)] if guided else []
    levels = [] if discrete else [table["told"], table["in_scale"]]
    kept = [x.float()[:, None].expand(-1, history, *engine.shape).contiguous()] if history else []
    seed = (lane + 1) * _EXAMPLE_SEED
    conditions = [example_conditions(engine, batch, torch.float32, seed) for seed in range(1 + guided)]
    further = (*labels, *scale, *itertools.chain(*conditions), *levels, *kept)
    return (x.float(), lane % len(rows), table["coefficients"], table["timesteps"], seed, lane + 7, *further)


def tick_specs(
    engine: Engine, batch: Batch, *, guided: bool = False, history: int = 0
) -> tuple[tuple[Tensorspec, ...], tuple[Tensorspec, ...]]:
    """The inputs and outputs of the engine's tick, for a manifest."""
    lanes, image = (batch.dimension,), (batch.dimension, *engine.shape)
    kept = (batch.dimension, history, *engine.shape)
    conditions = [condition_specs(engine, batch, "float32", prefix) for prefix in ("", NULL)]
    further = {
        **{spec.name: spec for spec in itertools.chain(*conditions)},
        "labels": Tensorspec("labels", "int64", lanes),
        "guidance": Tensorspec("guidance", "float32", lanes),
        "told": Tensorspec("told", "float32", ("rows",)),
        "in_scale": Tensorspec("in_scale", "float32", ("rows",)),
        "history": Tensorspec("history", "float32", kept),
    }
    inputs = (
        Tensorspec("x", "float32", image),
        Tensorspec("row", "int64", lanes),
        Tensorspec("coefficients", "float32", ("rows", len(COLUMNS))),
        Tensorspec("timesteps", "int64", ("rows",)),
        Tensorspec("seed", "int64", lanes),
        Tensorspec("index", "int64", lanes),
        *(further[name] for name in further_inputs(engine, guided=guided, history=history)),
    )
    outputs = (Tensorspec("x_next", "float32", image),)
    return inputs, (*outputs, Tensorspec("history_next", "float32", kept)) if history else outputs


def initial_noise_specs(
    shape: Sequence[int], lanes: int | str
) -> tuple[tuple[Tensorspec, ...], tuple[Tensorspec, ...]]:
    """The inputs and outputs of the initial noise of images of a shape, for ``lanes`` of them, a number or a name."""
    return (Tensorspec("seed", "int64", (lanes,)), Tensorspec("index", "int64", (lanes,))), (
        Tensorspec("x", "float32", (lanes, *shape)),
    )


@torch.no_grad()
def compare_tick(
    engine: Engine,
    batch: Batch,
    table: StepTable,
    tick: TickRuntime,
    initial_noise: Runtime,
    what: str,
    *,
    guided: bool = False,
) -> str:
    """Hold an exported tick and its initial noise against the engine's, alone and in a loop; says what was found.

    Raises:
        ExportError: ``what`` computes something else.
    """
    form: dict[str, Any] = {"guided": guided, "history": table.history}
    reference, start, dtype = tick_module(engine, **form), InitialNoise(engine.shape), engine.plan.dtype
    inputs, _ = tick_specs(engine, batch, **form)
    largest = noise = 0.0
    for size in sorted(set(batch.examples())):
        example = tick_example(engine, size, **form)
        for actual, wanted in zip(outputs_of(tick(*example)), outputs_of(reference(*example)), strict=True):
            largest = max(largest, check_close(actual, wanted, f"{what} tick", size, dtype))
        lanes = example[4], example[5]
        noise = max(noise, check_close(initial_noise(*lanes), start(*lanes), f"{what} initial noise", size))
    rows = range(min(table.steps(), max(2, _LOOP_EVALUATIONS // batch.low)))
    given = dict(zip((spec.name for spec in inputs), tick_example(engine, batch.low, **form), strict=True))
    lanes = given["seed"], given["index"]
    expected = walk(reference, inputs, table, rows, table.start_scales[0] * start(*lanes), given)
    found = walk(tick, inputs, table, rows, table.start_scales[0] * initial_noise(*lanes), given)
    scale = 1.0 if table.schedule.discrete else max(1.0, float(expected.abs().max()))  # of states at a large sigma
    drift = float((found.to(expected.device) - expected).abs().max()) / scale
    if dtype == torch.float32 and engine.plan.device.type == "cpu" and not drift <= _LOOP_DRIFT:
        raise ExportError(
            f"the {what} tick differs from the engine's by {drift:.2g} after {len(rows)} rows; "
            f"{_LOOP_DRIFT} is allowed"
        )
    same = "bit for bit the engine's" if noise == 0.0 else f"the engine's to {noise:.2g}"
    return (
        f"a tick differs from the engine's by at most {largest:.2g}, and the state by {drift:.2g} after {len(rows)} "
        f"row(s) of {table.name}; the initial noise is {same}."
    )


def _lanes(batch: Batch) -> dict[int, Any]:
    """The dynamic dimensions of an input with one entry for each lane."""
    return {0: Dim("batch", min=batch.low, max=batch.high)} if batch.dynamic else {}
