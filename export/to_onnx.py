"""ONNX: the network through ``torch.export``, checked, shape-inferred, and compared in onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.export.bundle import ANY_DEVICE, Manifest, versions, write_bundle
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
from stepfusion.table import StepTable

MODEL = "model.onnx"
OPSET = 22  # the first with bfloat16 convolutions; since 21, GroupNormalization has a scale for each channel
_EXTERNAL_ABOVE = 1 << 30  # bytes of weights; a protocol buffer ends at 2 GiB


def export_onnx(engine: Engine, out: Path, *, batch: Batch = DYNAMIC, table: StepTable | None = None) -> None:
    """Write a bundle with the network as ``model.onnx``.

    Raises:
        ExportError: a package is missing, ``out`` exists, the network cannot be exported, or what was exported does
            not compute what the network does.
    """
    require(("onnx", "onnxscript"), "onnx")
    program = export_program(engine, batch)
    runtime = ("onnxruntime",) if find_spec("onnxruntime") is not None else ()
    manifest = Manifest(
        format="onnx",
        kind="network",
        device=ANY_DEVICE,
        dtype=name_of(engine.plan.dtype),
        inputs=input_specs(engine, batch),
        outputs=output_specs(program, batch),
        versions=versions("onnx", "onnxscript", *runtime),
        model=model_facts(engine, batch),
        files={},
    )

    def build(folder: Path) -> str:
        write_onnx(program, folder / MODEL)
        return compare_in_onnxruntime(engine, folder / MODEL, manifest, batch)

    write_bundle(out, manifest, build, table=table)


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write a program as an ONNX file, its weights beside it where they are above 1 GB, and check it.

    Raises:
        ExportError: an operator has no ONNX form, or the file does not pass ``onnx.checker`` with shape inference.
    """
    import onnx

    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [name for name in names if name in program.graph_signature.user_inputs]
    dynamic = not all(isinstance(size, int) for size in _shape(program, inputs[0]))
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=["out"],
                dynamic_shapes=tuple({0: "batch"} for _ in inputs) if dynamic else None,
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
    if find_spec("onnxruntime") is None:
        return "Not run after it was written: onnxruntime was not installed."
    if engine.plan.dtype == torch.bfloat16 and engine.plan.device.type == "cpu":
        return "Not run after it was written: onnxruntime has no bfloat16 convolutions on a CPU."
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


def _forget_sources(model: Any) -> None:
    """Remove what PyTorch notes of every node and value: stack traces with the paths of this machine, above all."""
    graph = model.graph
    for node in graph:
        node.metadata_props.clear()
    values = [value for node in graph for value in node.outputs]
    for holder in (graph, *graph.inputs, *graph.initializers.values(), *values):
        holder.metadata_props.clear()


def _shape(program: ExportedProgram, name: str) -> list[object]:
    node = next(node for node in program.graph.nodes if node.name == name)
    return list(node.meta["val"].shape)


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
