"""ONNX: a network or a tick through ``torch.export``, checked, shape-inferred, and compared in onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.export.bundle import ANY_DEVICE, Manifest, Tensorspec, check_out, versions, write_bundle
from stepfusion.export.facts import model_facts
from stepfusion.export.formats import require
from stepfusion.export.program import (
    DYNAMIC,
    Batch,
    check_close,
    example_inputs,
    export_program,
    input_specs,
    name_of,
    output_specs,
    plain_network,
)
from stepfusion.export.runtimes import OnnxRuntimeNetwork
from stepfusion.export.tick import (
    check_kind,
    compare_tick,
    initial_noise_program,
    initial_noise_specs,
    tick_program,
    tick_specs,
)
from stepfusion.samplers.table import StepTable

MODEL, INITIAL_NOISE = "model.onnx", "initial_noise.onnx"
OPSET = 22  # the first with bfloat16 convolutions; since 21, GroupNormalization has a scale for each channel
_EXTERNAL_ABOVE = 1 << 30  # bytes of weights; a protocol buffer ends at 2 GiB


def export_onnx(
    engine: Engine,
    out: Path,
    *,
    kind: str = "network",
    batch: Batch = DYNAMIC,
    table: StepTable | None = None,
    guided: bool = False,
) -> None:
    """Write a bundle with the network, or a whole tick of a sampler, as ``model.onnx``.

    A tick (:class:`stepfusion.export.tick.Tick`) comes with ``initial_noise.onnx``
    (:class:`stepfusion.export.tick.InitialNoise`).

    Args:
        kind: "network" or "tick".
        table: the sampler's rows for ``table.json``, which a tick needs.
        guided: a tick with classifier-free guidance, whose network runs twice a step.

    Raises:
        ExportError: a package is missing, ``out`` exists, there is no table for a tick, the network cannot be
            exported, or what was exported does not compute what the engine does.
    """
    require(("onnx", "onnxscript"), "onnx")
    check_kind(engine, kind, table, guided)
    check_out(out)
    if kind == "tick" and table is not None:
        _export_tick(engine, out, batch, table, guided)
    else:
        _export_network(engine, out, batch, table)


def _export_network(engine: Engine, out: Path, batch: Batch, table: StepTable | None) -> None:
    program = export_program(engine, batch)
    manifest = _manifest(engine, "network", batch, input_specs(engine, batch), output_specs(program, batch))

    def build(folder: Path) -> str:
        write_onnx(program, folder / MODEL, manifest.inputs, manifest.outputs)
        return compare_in_onnxruntime(engine, folder / MODEL, manifest, batch)

    write_bundle(out, manifest, build, table=table)


def _export_tick(engine: Engine, out: Path, batch: Batch, table: StepTable, guided: bool) -> None:
    program, noise = tick_program(engine, batch, guided=guided), initial_noise_program(engine, batch)
    manifest = _manifest(engine, "tick", batch, *tick_specs(engine, batch, guided=guided))

    def build(folder: Path) -> str:
        write_onnx(program, folder / MODEL, manifest.inputs, manifest.outputs)
        write_onnx(noise, folder / INITIAL_NOISE, *initial_noise_specs(engine.shape, batch.dimension))
        reason = _why_not_run(engine)
        if reason is not None:
            return reason
        loaded = load_onnx_tick(folder, manifest, engine.plan.device)
        found = compare_tick(engine, batch, table, *loaded, "ONNX", guided=guided)
        return f"Run in onnxruntime before the bundle was finished: {found}"

    write_bundle(out, manifest, build, table=table)


def load_onnx_tick(
    folder: Path, manifest: Manifest, device: torch.device
) -> tuple[OnnxRuntimeNetwork, OnnxRuntimeNetwork]:
    """A tick's bundle in onnxruntime: the tick and its initial noise."""
    lanes, *shape = manifest.inputs[0].shape
    inputs, outputs = initial_noise_specs([int(size) for size in shape], lanes)
    noise = replace(manifest, inputs=inputs, outputs=outputs)
    return OnnxRuntimeNetwork(folder / MODEL, manifest, device), OnnxRuntimeNetwork(
        folder / INITIAL_NOISE, noise, device
    )


def _manifest(
    engine: Engine, kind: str, batch: Batch, inputs: tuple[Tensorspec, ...], outputs: tuple[Tensorspec, ...]
) -> Manifest:
    runtime = ("onnxruntime",) if find_spec("onnxruntime") is not None else ()
    return Manifest(
        format="onnx",
        kind=kind,
        device=ANY_DEVICE,
        dtype=name_of(engine.plan.dtype),
        inputs=inputs,
        outputs=outputs,
        versions=versions("onnx", "onnxscript", *runtime),
        model=model_facts(engine, batch),
        files={},
    )


def write_onnx(
    program: ExportedProgram, path: Path, inputs: Sequence[Tensorspec], outputs: Sequence[Tensorspec]
) -> None:
    """Write a program as an ONNX file, its weights beside it where they are above 1 GB, and check it.

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


def compare_in_onnxruntime(engine: Engine, path: Path, manifest: Manifest, batch: Batch) -> str:
    """Run an ONNX file and compare it with the engine's network; says what was found, or why nothing could be.

    Raises:
        ExportError: it computes something else.
    """
    reason = _why_not_run(engine)
    if reason is not None:
        return reason
    network, reference = OnnxRuntimeNetwork(path, manifest, engine.plan.device), plain_network(engine)
    sizes, largest = sorted(set(batch.examples())), 0.0
    with torch.no_grad():
        for size in sizes:
            example = example_inputs(engine, size)
            largest = max(largest, check_close(network(*example), reference(*example), "ONNX model", size))
    batches = " and ".join(map(str, sizes))
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
