"""OpenVINO IR for CPUs, from ONNX."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.export.bundle import Manifest, versions, write_bundle
from stepfusion.export.facts import model_facts
from stepfusion.export.formats import find_format, require
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
from stepfusion.export.runtimes import OpenVINONetwork
from stepfusion.export.to_onnx import write_onnx
from stepfusion.samplers.table import StepTable

MODEL = "model.xml"


def export_openvino(engine: Engine, out: Path, *, batch: Batch = DYNAMIC, table: StepTable | None = None) -> None:
    """Write a bundle with the network as ``model.xml`` and ``model.bin``.

    Weights, inputs and outputs of the file are float32. A bfloat16 network is told to compute in bfloat16 when it is
    loaded: OpenVINO rounds weights that are bfloat16 already, and so changes none.

    Raises:
        ExportError: as :func:`stepfusion.export.to_onnx.export_onnx`, and for a float16 network.
    """
    dtype = name_of(engine.plan.dtype)
    require(find_format("openvino", dtype=dtype).needs, "openvino")
    import openvino

    engine = _in_float32(engine)
    program = export_program(engine, batch)
    manifest = Manifest(
        format="openvino",
        kind="network",
        device="cpu",
        dtype=dtype,
        inputs=input_specs(engine, batch),
        outputs=output_specs(program, batch),
        versions=versions("openvino", "onnx"),
        model=model_facts(engine, batch),
        files={},
    )

    def build(folder: Path) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            write_onnx(program, Path(scratch, "model.onnx"), manifest.inputs, manifest.outputs)
            try:
                model = openvino.convert_model(Path(scratch, "model.onnx"))
            except RuntimeError as error:  # OpenVINO's conversion errors derive from it
                raise ExportError(f"OpenVINO cannot convert the network: {first_line(error)}") from error
            openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
        return _compare(engine, folder / MODEL, manifest, batch)

    write_bundle(out, manifest, build, table=table)


def _in_float32(engine: Engine) -> Engine:
    """An engine for the same network in float32 on a CPU, its weights as they are."""
    return Engine(
        copy.deepcopy(plain_network(engine).network).float(),
        engine.schedule,
        prediction=engine.prediction,
        shape=engine.shape,
        num_classes=engine.num_classes,
        null_label=engine.null_label,
        class_names=engine.class_names,
        device="cpu",
        dtype="float32",
        backend="reference",
        network="eager",
        options=engine.options,
    )


def _compare(engine: Engine, path: Path, manifest: Manifest, batch: Batch) -> str:
    """Run the IR and compare it with the engine's network: within rounding of the dtype that it computes in."""
    run = OpenVINONetwork(path, manifest)
    reference, largest = plain_network(engine), 0.0
    with torch.no_grad():
        for size in sorted(set(batch.examples())):
            example = example_inputs(engine, size)
            expected = reference(*example)
            if manifest.dtype == "bfloat16":
                expected = expected.bfloat16()
            largest = max(largest, check_close(run(*example), expected, "OpenVINO model", size))
    return (
        "Run in OpenVINO before the bundle was finished: "
        f"it differs from the engine's float32 network by at most {largest:.2g}."
    )
