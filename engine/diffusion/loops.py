"""Whole sampling loops: a table walked from its first row to its last, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from stepfusion import _checks, kernels
from stepfusion.diffusion.forward import BackendOps
from stepfusion.diffusion.model_calls import Model, Step
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.diffusion.reverse import ReverseProcess, evaluate
from stepfusion.diffusion.single_steps import place, take_step
from stepfusion.execution.plan import choose_device
from stepfusion.kernels import launch
from stepfusion.lanes.runner import as_int64
from stepfusion.samplers.table import StepTable

GuidedStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Step]


class LoopArguments(NamedTuple):
    """What a caller says of a loop, as :meth:`stepfusion.GaussianDiffusion.p_sample_loop_progressive` takes it."""

    shape: tuple[int, ...]
    start: torch.Tensor | None
    noise: torch.Tensor | None
    seed: int
    device: str | torch.device
    repeat_noise: bool = False


@dataclass(frozen=True)
class Loop:
    """A loop that is about to start: on which device, from which state [B, ...], and by which noise."""

    ops: ModuleType
    start: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    noise: torch.Tensor | None
    repeat_noise: bool

    def everywhere(self, value: int) -> torch.Tensor:
        """One integer for every image, int64 [B]."""
        return torch.full_like(self.indices, value)

    def source(self, step: int) -> NoiseSource:
        """The noise of a step, given or to be drawn."""
        if self.noise is None:
            return NoiseSource(None, self.seeds, self.indices)
        source = NoiseSource(self.noise[step])
        return source.repeated() if self.repeat_noise else source

    def z(self, step: int, t: torch.Tensor) -> torch.Tensor:
        """The noise of a step, [B, ...], drawn here for the training timesteps t unless it was given."""
        given = self.source(step).noise
        if given is not None:
            return given
        drawn: torch.Tensor = self.ops.normal(
            self.seeds, self.indices, t, tuple(self.start.shape[1:]), kernels.STREAM_STEP
        )
        return drawn


def begin(backend: BackendOps, table: StepTable, arguments: LoopArguments) -> Loop:
    """Check the arguments of a loop over ``table``, and draw its start.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    device = choose_device(arguments.device)[0]
    shape, start, noise = arguments.shape, arguments.start, arguments.noise
    if not isinstance(shape, (tuple, list, torch.Size)) or not shape:
        raise TypeError(f"shape must be a tuple of sizes, e.g. (4, 3, 32, 32), got {shape!r}")
    batch, *_ = (_checks.integer("shape", size, 0, 1 << 31) for size in shape)
    seed = _checks.integer("seed", arguments.seed, 0, (1 << 64) - 1)
    seeds = torch.full((batch,), as_int64(seed), dtype=torch.int64, device=device)
    indices = torch.arange(batch, device=device)
    ops = backend.on(device)
    if start is None:
        start = ops.normal(seeds, indices, torch.zeros_like(indices), tuple(shape[1:]), kernels.STREAM_INITIAL)
    launch.check_like("start", start, tuple(shape), device)
    if noise is not None:
        launch.check_like("noise", noise, (len(table), *shape), device)
    if arguments.repeat_noise:
        indices = torch.zeros_like(indices)
    return Loop(ops, start.to(torch.float32), seeds, indices, noise, arguments.repeat_noise)


@torch.no_grad()
def walk(
    process: ReverseProcess, table: StepTable, arguments: LoopArguments, model: Model, model_kwargs: dict[str, Any]
) -> Iterator[Step]:
    """Walk a table by fused steps, and yield every one."""
    loop = begin(process.ops, table, arguments)
    x, on_device = loop.start, place(table, loop.start.device, process.told)
    for i, timestep in enumerate(table.timesteps):
        out = evaluate(process, model, x, loop.everywhere(int(timestep)), model_kwargs)
        step = take_step(loop.ops, on_device, loop.everywhere(i), out, x, loop.source(i))
        x = step["sample"]
        yield step


@torch.no_grad()
def walk_guided(
    process: ReverseProcess, table: StepTable, arguments: LoopArguments, guided: GuidedStep
) -> Iterator[Step]:
    """Walk a table by single steps ``guided(x, t, z)`` of the process that visits its timesteps alone.

    The noise z is that of :func:`walk`, and t counts from the number of rows down to 0.
    """
    loop = begin(process.ops, table, arguments)
    x, last = loop.start, len(table) - 1
    for i, timestep in enumerate(table.timesteps):
        step = guided(x, loop.everywhere(last - i), loop.z(i, process.told(loop.everywhere(int(timestep)))))
        x = step["sample"]
        yield step


def last_sample(steps: Iterator[Step]) -> torch.Tensor:
    """The sample of the last of some steps."""
    for step in steps:
        last = step["sample"]
    return last
