"""An engine's network as a ``torch.export`` program: the common root of all formats."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.export.batch import DYNAMIC, Batch
from stepfusion.export.manifest import INPUTS, NULL, Tensorspec
from stepfusion.kernels.tolerance import UNIT
from stepfusion.networks.prepare import fuse

#: A whole network: its output may differ by so many units in the last place if kernels are chosen anew.
_ROUNDINGS = {torch.float64: 1000, torch.float32: 1000, torch.float16: 32, torch.bfloat16: 32}


_OUTPUTS = ("out", "x_next", "history_next")


class NetworkCall(nn.Module):
    """The network as ``(x, timesteps[, labels], *conditions) -> out``, whatever kind of output it returns.

    Its inputs have their names in the signature of ``forward``, and so in a program.

    Args:
        network: takes conditions as keyword arguments.
        names: of the inputs, in order.
    """

    def __init__(self, network: nn.Module, names: Sequence[str] = ("x", "timesteps")) -> None:
        super().__init__()
        self.network = network
        own = INPUTS["network"]
        conditions = tuple(name for name in names if name not in own)

        def forward(*inputs: Tensor) -> Tensor:
            plain = len(inputs) - len(conditions)
            out = self.network(*inputs[:plain], **dict(zip(conditions, inputs[plain:], strict=True)))
            result: Tensor = getattr(out, "sample", out)
            return result

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward


def plain_network(engine: Engine) -> NetworkCall:
    """The engine's network without fused kernels, in its dtype, on its device.

    Raises:
        ExportError: it is not a module.
    """
    network = engine.network
    if not isinstance(network, nn.Module):
        raise ExportError(f"only a torch.nn.Module can be exported, and the network is a {type(network).__name__}")
    if any(getattr(module, "fused", False) is True for module in network.modules()):
        network = copy.deepcopy(network)
        fuse(network, False)
    return NetworkCall(network, input_names(engine)).eval()


def input_names(engine: Engine) -> tuple[str, ...]:
    """The inputs of the engine's network, in order.

    Raises:
        ExportError: a condition has the name of another input or output of a network or a tick.
    """
    names = tuple(one.name for one in engine.spec.conditions)
    for name in names:
        if name in (*INPUTS["tick"], *_OUTPUTS) or (name.startswith(NULL) and name.removeprefix(NULL) in names):
            raise ExportError(f"the condition {name!r} cannot be exported: another input or output has this name")
    return ("x", "timesteps", *(() if engine.num_classes is None else ("labels",)), *names)


def export_program(engine: Engine, batch: Batch = DYNAMIC) -> ExportedProgram:
    """The network (x, timesteps[, labels], conditions...) -> out as a program for these batch sizes.

    x is [B, C, H, W] in the engine's dtype, timesteps and labels are int64 [B] (on a path that is not discrete,
    timesteps are what the path tells, float32), conditions are [B, ...] in the engine's dtype, or int64, in the order
    of the spec, and all live on the engine's device. The program's inputs have the names of the conditions.

    Raises:
        ExportError: the network is not a module, cannot be traced, or the program does not give the network's output.
    """
    network = plain_network(engine)
    examples = [example_inputs(engine, size) for size in batch.examples()]
    shapes = None
    if batch.dynamic:
        size = Dim("batch", min=batch.low, max=batch.high)
        shapes = tuple({0: size} for _ in examples[0])
    program = trace(network, examples[0], shapes, "network")
    module = program.module()
    with torch.no_grad():
        for example in examples:
            check_close(module(*example), network(*example), "exported program", len(example[0]))
    return program


def trace(
    module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...] | None, what: str
) -> ExportedProgram:
    """A module as a program, for the dynamic dimensions ``shapes`` of its inputs.

    Raises:
        ExportError: it cannot be traced; ``what`` names it.
    """
    try:
        program = torch.export.export(module, example, dynamic_shapes=shapes)
    except Exception as error:  # whatever a user's module raises when it is traced
        raise ExportError(f"torch.export cannot trace the {what}: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which would go into what is written
    return program


def example_inputs(engine: Engine, batch: int) -> tuple[Tensor, ...]:
    """Inputs of the network for a batch: x, timesteps and, if it takes them, labels and conditions."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn((batch, *engine.shape), generator=generator).to(engine.plan.device, engine.plan.dtype)
    timesteps = _told(engine, batch).to(engine.plan.device)
    conditions = example_conditions(engine, batch, engine.plan.dtype)
    if engine.num_classes is None:
        return x, timesteps, *conditions
    return x, timesteps, torch.arange(batch, device=engine.plan.device) % engine.num_classes, *conditions


def example_conditions(engine: Engine, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Conditions for a batch: normally distributed, or ones and zeros, which are numbers that any network knows."""
    generator, examples = torch.Generator().manual_seed(batch + (seed << 32)), []
    for spec in engine.spec.conditions:
        shape = (batch, *spec.shape)
        value = torch.randn(shape, generator=generator)
        examples.append((value > 0).long() if spec.integer else value.to(dtype))
    return tuple(value.to(engine.plan.device) for value in examples)


def _told(engine: Engine, batch: int) -> Tensor:
    """What a network is told of levels all over its path: int64 or float32 [batch]."""
    most = engine.schedule.max_steps
    if engine.schedule.discrete:
        return (torch.arange(batch) * (most // batch)).clamp(max=most - 1)
    told = engine.table("euler", min(batch, most)).told
    return torch.from_numpy(np.resize(told, batch)).to(torch.float32)


def input_specs(engine: Engine, batch: Batch, dtype: str | None = None) -> tuple[Tensorspec, ...]:
    """What :func:`example_inputs` gives, for a manifest; ``dtype`` of x, the engine's by default."""
    x = Tensorspec("x", dtype or name_of(engine.plan.dtype), (batch.dimension, *engine.shape))
    timesteps = Tensorspec("timesteps", "int64" if engine.schedule.discrete else "float32", (batch.dimension,))
    labels = Tensorspec("labels", "int64", (batch.dimension,))
    conditions = condition_specs(engine, batch, dtype or name_of(engine.plan.dtype))
    return (x, timesteps, *conditions) if engine.num_classes is None else (x, timesteps, labels, *conditions)


def condition_specs(engine: Engine, batch: Batch, dtype: str, prefix: str = "") -> tuple[Tensorspec, ...]:
    """The inputs that are conditions, floating ones in ``dtype``; their names begin with ``prefix``."""
    return tuple(
        Tensorspec(prefix + one.name, "int64" if one.integer else dtype, (batch.dimension, *one.shape))
        for one in engine.spec.conditions
    )


def output_specs(program: ExportedProgram, batch: Batch, dtype: str | None = None) -> tuple[Tensorspec, ...]:
    """The network's output, for a manifest."""
    node = program.graph.find_nodes(op="output")[0].args[0][0]
    value = node.meta["val"]
    return (Tensorspec("out", dtype or name_of(value.dtype), (batch.dimension, *map(int, value.shape[1:]))),)


def check_close(
    actual: Tensor, expected: Tensor, what: str, batch: int, computed_in: torch.dtype | None = None
) -> float:
    """The largest difference between two outputs of a network, or of a tick whose network is in ``computed_in``.

    Raises:
        ExportError: rounding does not explain it.
    """
    dtype = computed_in or expected.dtype
    allowed = _ROUNDINGS[dtype] * UNIT[dtype] * float(expected.abs().max())
    error = float((actual.to(expected.device).double() - expected.double()).abs().max())
    if not error <= allowed:
        raise ExportError(
            f"the {what} differs from the network by {error:.2g} at batch {batch}; rounding explains {allowed:.2g}"
        )
    return error


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
