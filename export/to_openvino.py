"""OpenVINO IR for CPUs, from ONNX."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Unpack

import torch

from stepfusion.engine import Engine
from stepfusion.errors import ExportError, first_line
from stepfusion.export.base import ExportOptions, NetworkExport, Target, export_network
from stepfusion.export.bundle import Bundle, check_out
from stepfusion.export.environment import require, versions
from stepfusion.export.formats import find_format
from stepfusion.export.program import name_of, plain_network
from stepfusion.export.runtimes import OpenVINONetwork
from stepfusion.export.to_onnx import write_onnx

MODEL = "model.xml"


def export_openvino(engine: Engine, out: Path, **options: Unpack[ExportOptions]) -> Bundle:
    """Write a bundle with the network as ``model.xml`` and ``model.bin``.

    Weights, inputs and outputs of the file are float32. A bfloat16 network is told to compute in bfloat16 when it is
    loaded: OpenVINO rounds weights that are bfloat16 already, and so changes none.

    Args:
        out: the directory to write, which must not exist.
        options: :class:`stepfusion.export.base.ExportOptions`.

    Raises:
        ExportError: as :func:`stepfusion.export.to_onnx.export_onnx`, and for a float16 network.
    """
    dtype = name_of(engine.plan.dtype)
    require(find_format("openvino", dtype=dtype).needs, "openvino")
    check_out(out)
    target = Target("openvino", "cpu", versions("openvino", "onnx"), dtype)
    return export_network(_in_float32(engine), out, target, _build, **options)


def _build(export: NetworkExport, folder: Path) -> str:
    import openvino

    manifest = export.manifest
    with tempfile.TemporaryDirectory() as scratch:
        write_onnx(export.program, Path(scratch, "model.onnx"), manifest.inputs, manifest.outputs)
        try:
            model = openvino.convert_model(Path(scratch, "model.onnx"))
        except RuntimeError as error:  # OpenVINO's conversion errors derive from it
            raise ExportError(f"OpenVINO cannot convert the network: {first_line(error)}") from error
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    computed_in = torch.bfloat16 if manifest.dtype == "bfloat16" else None
    largest = export.compare(OpenVINONetwork(folder / MODEL, manifest), "OpenVINO model", rounded_to=computed_in)
    return (
        "Run in OpenVINO before the bundle was finished: "
        f"it differs from the engine's float32 network by at most {largest:.2g}."
    )


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
        conditions=engine.spec.conditions,
    )
