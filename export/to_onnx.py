"""ONNX: a network or a tick through ``torch.export``, checked, shape-inferred, and compared in onnxruntime."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

import torch
from torch.export import ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.export.base import NetworkExport, Target, TickExport, TickOptions, export_either
from stepfusion.export.bundle import Bundle
from stepfusion.export.environment import require, versions
from stepfusion.export.manifest import ANY_DEVICE, Manifest, Tensorspec
from stepfusion.export.runtimes import OnnxRuntimeNetwork, Runtime, TickRuntime
from stepfusion.export.tick_program import initial_noise_specs

MODEL, INITIAL_NOISE = "model.onnx", "initial_noise.onnx"
OPSET = 22  # the first with bfloat16 convolutions; since 21, GroupNormalization has a scale for each channel
_EXTERNAL_ABOVE = 1 << 30  # bytes of weights; a protocol buffer ends at 2 GiB


def export_onnx(engine: Engine, out: Path, **options: Unpack[TickOptions]) -> Bundle:
    """Write a bundle with the network, or a whole tick of a sampler, as ``model.onnx``.

    A tick (:class:`stepfusion.export.tick.Tick`) comes with ``initial_noise.onnx``
    (:class:`stepfusion.export.tick.InitialNoise`).

    Args:
        out: the directory to write, which must not exist.
        options: :class:`stepfusion.export.base.TickOptions`.

    Raises:
        ExportError: a package is missing, ``out`` exists, there is no table for a tick, the network cannot be
            exported, or what was exported does not compute what the engine does.
    """
    require(("onnx", "onnxscript"), "onnx")
    runtime = ("onnxruntime",) if find_spec("onnxruntime") is not None else ()
    target = Target("onnx", ANY_DEVICE, versions("onnx", "onnxscript", *runtime))
    return export_either(engine, out, target, _build_network, _build_tick, **options)


def _build_network(export: NetworkExport, folder: Path) -> str:
    write_onnx(export.program, folder / MODEL, export.manifest.inputs, export.manifest.outputs)
    return compare_in_onnxruntime(export, folder / MODEL)


def _build_tick(export: TickExport, folder: Path) -> str:
    engine, manifest = export.engine, export.manifest
    write_onnx(export.program, folder / MODEL, manifest.inputs, manifest.outputs)
    noise_specs = initial_noise_specs(engine.shape, export.batch.dimension)
    write_onnx(export.initial_noise, folder / INITIAL_NOISE, *noise_specs)
    reason = _why_not_run(engine)
    if reason is not None:
        return reason
    found = export.compare(*load_onnx_tick(folder, manifest, engine.plan.device), "ONNX")
    return f"Run in onnxruntime before the bundle was finished: {found}"


def load_onnx_tick(folder: Path, manifest: Manifest, device: torch.device) -> tuple[TickRuntime, Runtime]:
    """A tick's bundle in onnxruntime: the tick and its initial noise."""
    lanes, *shape = manifest.inputs[0].shape
    inputs, outputs = initial_noise_specs([int(size) for size in shape], lanes)
    noise = replace(manifest, inputs=inputs, outputs=outputs)
    tick = OnnxRuntimeNetwork(folder / MODEL, manifest, device)
    initial_noise = OnnxRuntimeNetwork(folder / INITIAL_NOISE, noise, device)
    return tick if len(manifest.outputs) == 1 else tick.outputs, initial_noise


def write_onnx(
    program: ExportedProgram, path: Path, inputs: Sequence[Tensorspec], outputs: Sequence[Tensorspec]
) -> None:
    """Write a program as an ONNX file, its weights beside it if they are above 1 GB, and check it.

    Args:
        inputs, outputs: of the program, in its order: they name the file's tensors and dynamic dimensions.

    Raises:
        ExportError: an operator has no ONNX form, or the file does not pass ``onnx.checker`` with shape inference.
    """
    import onnx

    named = tuple({i: size for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs)
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=named if any(named) else None,
                verbose=False,
            )
    except Exception as error:  # torch.onnx has a class for each stage, all private
        raise ExportError(f"torch.onnx cannot convert the network: {_reason(error)}") from error
    if converted is None:
        raise ExportError("torch.onnx returned no program")
    _forget_sources(converted.model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    converted.save(str(path), external_data=size > _EXTERNAL_ABOVE)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and the shape inference have their own classes, derived from Exception
        raise ExportError(f"onnx.checker refuses the exported model: {first_line(error)}") from error


def compare_in_onnxruntime(export: NetworkExport, path: Path) -> str:
    """Run an ONNX file and compare it with the engine's network; says what was found, or why nothing could be.

    Raises:
        ExportError: it computes something else.
    """
    reason = _why_not_run(export.engine)
    if reason is not None:
        return reason
    network = OnnxRuntimeNetwork(path, export.manifest, export.engine.plan.device)
    largest = export.compare(network, "ONNX model")
    batches = " and ".join(map(str, sorted(set(export.batch.examples()))))
    return (
        f"Run in onnxruntime before the bundle was finished, at batch {batches}: "
        f"it differs from the engine's network by at most {largest:.2g}."
    )


def _why_not_run(engine: Engine) -> str | None:
    if find_spec("onnxruntime") is None:
        return "Not run after it was written: onnxruntime was not installed."
    if engine.plan.dtype == torch.bfloat16 and engine.plan.device.type == "cpu":
        return "Not run after it was written: onnxruntime has no bfloat16 convolutions on a CPU."
    return None


def _forget_sources(model: Any) -> None:
    """Remove what PyTorch notes of every node and value: stack traces with the paths of this machine, above all."""
    graph = model.graph
    for node in graph:
        node.metadata_props.clear()
    values = [value for node in graph for value in node.outputs]
    for holder in (graph, *graph.inputs, *graph.initializers.values(), *values):
        holder.metadata_props.clear()


def _reason(error: BaseException) -> str:
    """The innermost cause that names an operator, or else the outermost message."""
    cause: BaseException | None = error
    while cause is not None:
        for line in str(cause).splitlines():
            if "No ONNX function found" in line or "No decompositions registered" in line:
                return line.strip()
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the converter says about packages that it could use and does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # ONNX Script 0.6 prints what it rewrote
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
