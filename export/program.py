"""An engine's network as a ``torch.export`` program."""

from __future__ import annotations

import torch
from torch.export import Dim, ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.kernels.tolerance import UNIT

_BATCHES = (2, 5)  # the program is traced at the first and checked at both
_ROUNDINGS = (
    1000  # a whole network: its output may differ by so many units in the last place where kernels are chosen anew
)


def export_program(engine: Engine) -> ExportedProgram:
    """The network (x, timesteps[, labels]) -> out as a program with a dynamic batch size.

    x is [B, C, H, W] in the engine's dtype, timesteps and labels are int64 [B], and all live on the engine's device.

    Raises:
        ExportError: the network is not a module, cannot be traced, or the program does not give the network's output.
    """
    network = engine.network
    if not isinstance(network, torch.nn.Module):
        raise ExportError(f"only a torch.nn.Module can be exported, and the network is a {type(network).__name__}")
    examples = [_example(engine, batch) for batch in _BATCHES]
    dynamic = tuple({0: Dim("batch")} for _ in examples[0])
    try:
        program = torch.export.export(network, examples[0], dynamic_shapes=dynamic)
    except Exception as error:  # whatever a user's module raises when it is traced
        raise ExportError(f"torch.export cannot trace the network: {_first_line(error)}") from error
    module = program.module()
    with torch.no_grad():
        for example in examples:
            _check(module(*example), network(*example), len(example[0]))
    return program


def _example(engine: Engine, batch: int) -> tuple[torch.Tensor, ...]:
    """Inputs of the network for a batch: x, timesteps and, where it takes them, labels."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn((batch, *engine.shape), generator=generator).to(engine.plan.device, engine.plan.dtype)
    timesteps = torch.arange(batch, device=engine.plan.device) * (engine.schedule.num_timesteps // batch)
    if engine.num_classes is None:
        return x, timesteps
    return x, timesteps, torch.arange(batch, device=engine.plan.device) % engine.num_classes


def _check(actual: torch.Tensor, expected: torch.Tensor, batch: int) -> None:
    allowed = _ROUNDINGS * UNIT[expected.dtype] * float(expected.abs().max())
    error = float((actual - expected).abs().max())
    if not error <= allowed:
        raise ExportError(f"the exported program differs from the network by {error:.2g} at batch {batch}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
