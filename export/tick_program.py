"""An engine's tick as a ``torch.export`` program, its description, and its comparison with the engine's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from stepfusion import _checks
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.export.batch import Batch
from stepfusion.export.manifest import KINDS, Tensorspec
from stepfusion.export.program import check_close, example_inputs, plain_network, trace
from stepfusion.export.runtimes import Runtime
from stepfusion.export.tick import InitialNoise, Tick
from stepfusion.kernels import COLUMNS
from stepfusion.samplers.table import StepTable

_MOST_ROWS = 1 << 24
_EXAMPLE_ROWS = 8
_EXAMPLE_SEED = 0x0123456789ABCDEF
_LOOP_EVALUATIONS = 50  # of one image, in the loop that checks an export
_LOOP_DRIFT = 1e-3  # float32, after that loop


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
    if table.history:
        raise ExportError(f"a tick keeps nothing but x from row to row, and {table!r} needs the x0 before as well")
    if table.whole_image:
        raise ExportError(f"a tick has no dynamic thresholding and no rescaled guidance, and {table!r} asks for it")
    if (table.column("net_scale") != 1).any():
        raise ExportError(f"a tick shows the network x as it is, and {table!r} scales it")
    if guided and engine.null_label is None:
        raise ExportError("a guided tick needs a null label, and the model has none")


def tick_module(engine: Engine, *, guided: bool = False) -> Tick:
    """The engine's tick, with its network in plain operators."""
    return Tick(plain_network(engine), engine.plan.dtype, engine.null_label if guided else None).eval()


def tick_program(engine: Engine, batch: Batch, *, guided: bool = False) -> ExportedProgram:
    """The engine's tick as a program for these batch sizes and tables of any length.

    Raises:
        ExportError: the network is not a module, or cannot be traced.
    """
    example = tick_example(engine, batch.examples()[0], guided=guided)
    shapes = [_lanes(batch) for _ in example]
    shapes[2] = shapes[3] = {0: Dim("rows", min=1, max=_MOST_ROWS)}
    return trace(tick_module(engine, guided=guided), example, tuple(shapes), "tick")


def initial_noise_program(engine: Engine, batch: Batch) -> ExportedProgram:
    """Where the engine's images start, as a program (seed, index) -> x_T for these batch sizes."""
    numbers = torch.arange(batch.examples()[0], device=engine.plan.device)
    shapes = (_lanes(batch), _lanes(batch))
    return trace(InitialNoise(engine.shape).eval(), (numbers, numbers.clone()), shapes, "initial noise")


def tick_example(engine: Engine, batch: int, *, guided: bool = False) -> tuple[Tensor, ...]:
    """Inputs of the engine's tick for a batch, in order: lanes all over a DDPM's table."""
    x, _, *labels = example_inputs(engine, batch)
    table = engine.table("ddpm", min(_EXAMPLE_ROWS, engine.schedule.num_timesteps)).on(x.device)
    lane = torch.arange(batch, device=x.device)
    row = lane % len(table.timesteps)
    scale = [1.0 + lane.to(torch.float32)] if guided else []
    seed = (lane + 1) * _EXAMPLE_SEED
    return (x.float(), row, table.coefficients, table.timesteps, seed, lane + 7, *labels, *scale)


def tick_specs(
    engine: Engine, batch: Batch, *, guided: bool = False
) -> tuple[tuple[Tensorspec, ...], tuple[Tensorspec, ...]]:
    """The inputs and outputs of the engine's tick, for a manifest."""
    lanes, image = (batch.dimension,), (batch.dimension, *engine.shape)
    inputs = [
        Tensorspec("x", "float32", image),
        Tensorspec("row", "int64", lanes),
        Tensorspec("coefficients", "float32", ("rows", len(COLUMNS))),
        Tensorspec("timesteps", "int64", ("rows",)),
        Tensorspec("seed", "int64", lanes),
        Tensorspec("index", "int64", lanes),
    ]
    if engine.num_classes is not None:
        inputs.append(Tensorspec("labels", "int64", lanes))
    if guided:
        inputs.append(Tensorspec("guidance", "float32", lanes))
    return tuple(inputs), (Tensorspec("x_next", "float32", image),)


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
    tick: Runtime,
    initial_noise: Runtime,
    what: str,
    *,
    guided: bool = False,
) -> str:
    """Hold an exported tick and its initial noise against the engine's, alone and in a loop; says what was found.

    Raises:
        ExportError: ``what`` computes something else.
    """
    reference, start, dtype = tick_module(engine, guided=guided), InitialNoise(engine.shape), engine.plan.dtype
    largest = noise = 0.0
    for size in sorted(set(batch.examples())):
        example = tick_example(engine, size, guided=guided)
        largest = max(largest, check_close(tick(*example), reference(*example), f"{what} tick", size, dtype))
        lanes = example[4], example[5]
        noise = max(noise, check_close(initial_noise(*lanes), start(*lanes), f"{what} initial noise", size))
    rows = _loop_rows(table, max(2, _LOOP_EVALUATIONS // batch.low))
    _, _, _, _, seed, index, *condition = tick_example(engine, batch.low, guided=guided)
    values, expected = table.on(engine.plan.device), start(seed, index)
    actual = initial_noise(seed, index)
    for row in rows:
        data = torch.full_like(index, row), values.coefficients, values.timesteps, seed, index, *condition
        actual, expected = tick(actual, *data), reference(expected, *data)
    drift = float((actual.to(expected.device) - expected).abs().max())
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


def _loop_rows(table: StepTable, most: int) -> list[int]:
    """The rows that an image goes through from row 0 on, up to ``most`` of them."""
    rows = [0]
    while len(rows) < most and (row := int(table.next_row[rows[-1]])) >= 0:
        rows.append(row)
    return rows


def _lanes(batch: Batch) -> dict[int, Any]:
    """The dynamic dimensions of an input with one entry for each lane."""
    return {0: Dim("batch", min=batch.low, max=batch.high)} if batch.dynamic else {}
