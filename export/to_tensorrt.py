"""TensorRT and TensorRT for RTX: one builder, from ONNX.

TensorRT for RTX builds without a GPU and its engines run on the GPUs of
:data:`stepfusion.export.tensorrt_engine.RTX_GPUS`; TensorRT builds for the GPU that it finds.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Unpack

import torch

from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.export.base import ExportOptions, NetworkExport, Target, export_network
from stepfusion.export.bundle import Bundle
from stepfusion.export.environment import here, require, versions
from stepfusion.export.manifest import Manifest
from stepfusion.export.runtimes import TensorRTNetwork
from stepfusion.export.tensorrt_engine import RTX_GPUS, Progress, build_engine, check_precisions, inspect_engine
from stepfusion.export.to_onnx import MODEL as ONNX_MODEL
from stepfusion.export.to_onnx import write_onnx

MODEL, LAYERS = "model.engine", "layers.json"


class TensorRTOptions(ExportOptions, total=False):
    """The options of an export to TensorRT. The batch is one optimisation profile, from ``low`` to ``high``, tuned
    for ``best``.

    Attributes:
        strip_weights: leave the weights out; the engine is refitted from the ONNX file, which is in the bundle, when
            it is loaded.
        progress: called as (phase, step, steps) while it builds; False stops it.
    """

    strip_weights: bool
    progress: Progress | None


def export_tensorrt(engine: Engine, out: Path, **options: Unpack[TensorRTOptions]) -> Bundle:
    """Write a bundle with the network as ``model.engine``, and its layers as ``layers.json``.

    Args:
        engine: on a CPU; its dtype is that of the network in the bundle.
        out: the directory to write, which must not exist.
        options: :class:`TensorRTOptions`.

    Raises:
        ExportError: a package or the GPU is missing, ``out`` exists, or TensorRT cannot build the network; its reason
            and the operator are named.
    """
    require(("tensorrt",), "tensorrt")
    if not torch.cuda.is_available():
        raise ExportError("TensorRT builds for the GPU that it finds, and there is none; tensorrt-rtx builds without")
    return _export(engine, out, "tensorrt", **options)


def export_tensorrt_rtx(engine: Engine, out: Path, **options: Unpack[TensorRTOptions]) -> Bundle:
    """The same for TensorRT for RTX, for the GPUs of :data:`stepfusion.export.tensorrt_engine.RTX_GPUS`.

    It needs no GPU, unless weights are stripped.
    """
    require(("tensorrt_rtx",), "tensorrt-rtx")
    if options.get("strip_weights") and not torch.cuda.is_available():
        raise ExportError("TensorRT for RTX strips weights only if there is a GPU, and there is none")
    return _export(engine, out, "tensorrt_rtx", **options)


def _export(
    engine: Engine,
    out: Path,
    package: str,
    *,
    strip_weights: bool = False,
    progress: Progress | None = None,
    **options: Unpack[ExportOptions],
) -> Bundle:
    name = package.replace("_", "-")
    gpus = " ".join(RTX_GPUS) if package == "tensorrt_rtx" else here("compute_capability", torch.device("cuda"))
    target = Target(
        name,
        "cuda",
        {**versions(name, "onnx"), "compute_capability": gpus},
        entries={"weights": "stripped" if strip_weights else "included"},
    )
    build = partial(_build, package=package, strip_weights=strip_weights, progress=progress)
    return export_network(engine, out, target, build, **options)


def _build(
    export: NetworkExport, folder: Path, *, package: str, strip_weights: bool, progress: Progress | None
) -> str:
    manifest = export.manifest
    with tempfile.TemporaryDirectory() as scratch:
        onnx = folder / ONNX_MODEL if strip_weights else Path(scratch, ONNX_MODEL)
        write_onnx(export.program, onnx, manifest.inputs, manifest.outputs)
        blob, tensors, built = build_engine(
            onnx, package, export.batch, strip_weights=strip_weights, progress=progress
        )
    check_precisions(tensors, manifest.dtype)
    (folder / MODEL).write_bytes(blob)
    gpu = _gpu_for(manifest)
    if gpu is not None:
        built = inspect_engine(blob, package)
    layers = {"network": vars(tensors), "engine": None if built is None else vars(built)}
    (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n")
    if gpu is None:
        return (
            "Not run after it was written: there was no GPU that it runs on. `layers.json` lists inputs, outputs and "
            "layers of the strongly typed network that the engine was built from, and of the engine as its builder "
            "reports them."
        )
    weights = folder / ONNX_MODEL if strip_weights else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TensorRT's own names, which change between releases
        run = TensorRTNetwork(folder / MODEL, manifest, gpu, package, weights)
    return export.compared(run, f"{package} engine", (export.batch.low, export.batch.best))


def _gpu_for(manifest: Manifest) -> torch.device | None:
    """PyTorch's current GPU, if an engine with this manifest runs on it."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.device("cuda", torch.cuda.current_device())
    return gpu if here("compute_capability", gpu) in manifest.versions["compute_capability"].split() else None
