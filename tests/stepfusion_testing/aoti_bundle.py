"""The bundled model's guided tick, compiled once per test process, and the loop of a consumer around any tick."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import stepfusion as sf
from stepfusion.export.to_aoti import export_aoti

_FOLDER = tempfile.TemporaryDirectory(prefix="stepfusion-aoti-")


@functools.cache
def bundled_engine() -> sf.Engine:
    """The bundled model in float32 on the CPU."""
    return sf.Engine.from_pretrained("fashion-mnist", device="cpu", dtype="float32")


@functools.cache
def bundled_tick() -> Path:
    """A bundle with its guided tick; compiling takes half a minute."""
    engine, out = bundled_engine(), Path(_FOLDER.name, "tick")
    export_aoti(engine, out, kind="tick", table=engine.table("ddim", 10), guided=True)
    return out


def consume(
    tick: Callable[..., torch.Tensor],
    initial_noise: Callable[..., torch.Tensor],
    table: sf.StepTable,
    seed: int,
    indices: Sequence[int],
    *condition: torch.Tensor,
) -> torch.Tensor:
    """Sample as a consumer does that has nothing but the two programs and the table."""
    values = table.on(torch.device("cpu"))
    index = torch.tensor(indices)
    seeds = torch.full_like(index, seed)
    x, row = initial_noise(seeds, index), 0
    while row >= 0:
        rows = torch.full_like(index, row)
        x = tick(x, rows, values.coefficients, values.timesteps, seeds, index, *condition)
        row = int(values.next_row[row])
    return x
