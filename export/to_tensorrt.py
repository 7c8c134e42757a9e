"""TensorRT and TensorRT for RTX: one builder, from ONNX.

Networks are strongly typed: every layer computes in the dtype that the exported network has there. TensorRT for RTX
builds without a GPU and its engines run on the GPUs of :data:`RTX_GPUS`; TensorRT builds for the GPU that it finds.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.execution.cache import make_cache_directory
from stepfusion.export.bundle import Manifest, here, versions, write_bundle
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
from stepfusion.export.runtimes import TensorRTNetwork, collecting_logger, reason
from stepfusion.export.to_onnx import MODEL as ONNX_MODEL
from stepfusion.export.to_onnx import write_onnx
from stepfusion.files.atomic import atomic_write
from stepfusion.samplers.table import StepTable

MODEL, LAYERS = "model.engine", "layers.json"
RTX_GPUS = ("8.6", "8.9", "12.0")  # compute capabilities: GeForce and RTX 30, 40 and 50
Progress = Callable[[str, int, int], bool]

#: Types whose layers do the arithmetic of a UNet: these must have the network's dtype.
_HEAVY = ("CONVOLUTION", "NORMALIZATION", "MATRIX_MULTIPLY")
_REPORTED_TENSOR = re.compile(r"Name: (.+?), IOMode: (Input|Output), DataType: (\w+), Dimensions: \[([-\d,]*)\]")
_REPORTED_LAYER = re.compile(
    r"^Name: (.+?), LayerType: (\w+), .*?Outputs: \[ \{ Name: .+?, Datatype: (\w+)", re.MULTILINE
)
_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Tensors:
    """Inputs and outputs as (name, dtype, shape), and layers as (name, type, dtype)."""

    inputs: list[tuple[str, str, list[int]]]
    outputs: list[tuple[str, str, list[int]]]
    layers: list[tuple[str, str, str]]

    def precisions(self) -> Counter[tuple[str, str]]:
        """How many layers there are of each (type, dtype)."""
        return Counter((kind, dtype) for _, kind, dtype in self.layers)


def export_tensorrt(
    engine: Engine,
    out: Path,
    *,
    batch: Batch = DYNAMIC,
    table: StepTable | None = None,
    strip_weights: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a bundle with the network as ``model.engine``, and its layers as ``layers.json``.

    Args:
        engine: on a CPU; its dtype is the engine's.
        batch: one optimisation profile, from ``low`` to ``high``, tuned for ``best``.
        strip_weights: leave the weights out; the engine is refitted from the ONNX file, which is in the bundle, when
            it is loaded.
        progress: called as (phase, step, steps) while it builds; False stops it.

    Raises:
        ExportError: a package or the GPU is missing, ``out`` exists, or TensorRT cannot build the network; its reason
            and the operator are named.
    """
    require(("tensorrt",), "tensorrt")
    if not torch.cuda.is_available():
        raise ExportError("TensorRT builds for the GPU that it finds, and there is none; tensorrt-rtx builds without")
    _export(engine, out, batch, table, "tensorrt", strip_weights, progress)


def export_tensorrt_rtx(
    engine: Engine,
    out: Path,
    *,
    batch: Batch = DYNAMIC,
    table: StepTable | None = None,
    strip_weights: bool = False,
    progress: Progress | None = None,
) -> None:
    """The same for TensorRT for RTX, for the GPUs of :data:`RTX_GPUS`; needs no GPU, unless weights are stripped."""
    require(("tensorrt_rtx",), "tensorrt-rtx")
    if strip_weights and not torch.cuda.is_available():
        raise ExportError("TensorRT for RTX strips weights only where there is a GPU, and there is none")
    _export(engine, out, batch, table, "tensorrt_rtx", strip_weights, progress)


def _export(
    engine: Engine,
    out: Path,
    batch: Batch,
    table: StepTable | None,
    package: str,
    strip_weights: bool,
    progress: Progress | None,
) -> None:
    program = export_program(engine, batch)
    name = package.replace("_", "-")
    gpus = " ".join(RTX_GPUS) if package == "tensorrt_rtx" else here("compute_capability", torch.device("cuda"))
    manifest = Manifest(
        format=name,
        kind="network",
        device="cuda",
        dtype=name_of(engine.plan.dtype),
        inputs=input_specs(engine, batch),
        outputs=output_specs(program, batch),
        versions={**versions(name, "onnx"), "compute_capability": gpus},
        model={**model_facts(engine, batch), "weights": "stripped" if strip_weights else "included"},
        files={},
    )

    def build(folder: Path) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            onnx = folder / ONNX_MODEL if strip_weights else Path(scratch, ONNX_MODEL)
            write_onnx(program, onnx, manifest.inputs, manifest.outputs)
            blob, tensors, built = build_engine(onnx, package, batch, strip_weights=strip_weights, progress=progress)
        check_precisions(tensors, manifest.dtype)
        (folder / MODEL).write_bytes(blob)
        if _gpu_for(manifest) is not None:
            built = inspect_engine(blob, package)
        layers = {"network": vars(tensors), "engine": None if built is None else vars(built)}
        (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n")
        return _compare(engine, folder, manifest, package, batch)

    write_bundle(out, manifest, build, table=table)


def build_engine(
    onnx: Path, package: str, batch: Batch, *, strip_weights: bool = False, progress: Progress | None = None
) -> tuple[bytes, Tensors, Tensors | None]:
    """Build an engine from an ONNX file with ``package``, "tensorrt" or "tensorrt_rtx".

    Returns:
        The engine, the strongly typed network that it was built from, and the engine's tensors and layers as the
        builder reports them, where it does.

    Raises:
        ExportError: the parser refuses an operator, which is named, or the builder fails.
    """
    trt = import_module(package)
    logger = collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise ExportError(f"{package} cannot read the network: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(_profile(builder, network, batch))
    if strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if package == "tensorrt_rtx":
        config.num_compute_capabilities = len(RTX_GPUS)
        for i, gpu in enumerate(RTX_GPUS):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{gpu.replace('.', '')}"), i)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    measured = _timing_cache(trt, config) if package == "tensorrt" else None
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        raise ExportError(f"{package} cannot build the network: {reason(logger)}")
    if measured is not None:
        atomic_write(measured, memoryview(config.get_timing_cache().serialize()).tobytes())
    report = read_report(logger.reports[-1]) if logger.reports else None
    return memoryview(blob).tobytes(), inspect_network(network), report


def inspect_network(network: Any) -> Tensors:
    """The tensors and layers of a network definition; in a strongly typed one its dtypes bind the engine."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return Tensors(
        [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        [(layer.name, layer.type.name, layer.get_output(0).dtype.name) for layer in layers if layer.num_outputs],
    )


def read_report(text: str) -> Tensors:
    """The tensors and layers of a built engine, as its builder logs them: with the types that the engine computes in,
    and no GPU needed.
    """
    layers, _, tensors = text.partition("I/O Tensors:")
    found: dict[str, list[tuple[str, str, list[int]]]] = {"Input": [], "Output": []}
    for name, mode, kind, sizes in _REPORTED_TENSOR.findall(tensors):
        found[mode].append((name, _reported(kind), [int(size) for size in sizes.split(",") if size]))
    return Tensors(
        found["Input"],
        found["Output"],
        [(name, kind, _reported(dtype)) for name, kind, dtype in _REPORTED_LAYER.findall(layers)],
    )


def inspect_engine(data: bytes, package: str) -> Tensors:
    """The tensors and layers of a built engine, which needs a GPU that it runs on.

    Raises:
        ExportError: it cannot be loaded.
    """
    trt = import_module(package)
    logger = collecting_logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(data)
    if engine is None:
        raise ExportError(f"{package} cannot load the engine that it built: {reason(logger)}")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    specs = [(n, engine.get_tensor_dtype(n).name, list(engine.get_tensor_shape(n))) for n in names]
    is_input = [engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names]
    found = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return Tensors(
        [spec for spec, chosen in zip(specs, is_input, strict=True) if chosen],
        [spec for spec, chosen in zip(specs, is_input, strict=True) if not chosen],
        [_engine_layer(layer) for layer in found.get("Layers", ())],
    )


def check_precisions(tensors: Tensors, dtype: str) -> None:
    """Refuse a network whose convolutions, normalisations or matrix products are not in its dtype.

    The sinusoid of a timestep is in float32 in every network. A strongly typed network's dtypes bind its engine.

    Raises:
        ExportError: the first layer that is not.
    """
    for name, kind, found in tensors.layers:
        if kind in _HEAVY and found != _TYPES[dtype]:
            raise ExportError(f"layer {name} ({kind.lower()}) is {found}, and the network is {dtype}")


def _strongly_typed(trt: Any) -> int:
    """The creation flag, which TensorRT 11 still accepts although it knows no other networks."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_errors(parser: Any) -> str:
    """What a parser refused: operator, node and reason."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return "the parser gave no reason"
    said = [
        f"operator {error.node_operator() or 'unknown'} at {error.node_name() or 'an unnamed node'}: {error.desc()}"
        for error in errors
    ]
    return "; ".join(said[:3])


def _profile(builder: Any, network: Any, batch: Batch) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (batch.low, *sizes), (batch.best, *sizes), (batch.high, *sizes))
    return profile


def _timing_cache(trt: Any, config: Any) -> Path | None:
    """Have the builder use what it measured before on this GPU; the file that keeps that, or None."""
    folder = make_cache_directory("tensorrt")
    if folder is None:
        return None
    path = folder / f"timing-{trt.__version__}-{torch.cuda.get_device_name().replace(' ', '-')}.bin"
    config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
    return path


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Hands the builder's steps on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress(phase_name, step + 1, self._steps[phase_name]) is not False

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _tensor(tensor: Any) -> tuple[str, str, list[int]]:
    return tensor.name, tensor.dtype.name, list(tensor.shape)


def _reported(dtype: str) -> str:
    """A type of a report in the words of TensorRT's ``DataType``."""
    return {"BFLOAT16": "BF16"}.get(dtype.upper(), dtype.upper())


def _engine_layer(layer: dict[str, Any] | str) -> tuple[str, str, str]:
    if isinstance(layer, str):  # without detailed verbosity
        return layer, "UNKNOWN", "UNKNOWN"
    outputs = layer.get("Outputs") or [{}]
    form = str(outputs[0].get("Format/Datatype", outputs[0].get("Format", "UNKNOWN")))
    return str(layer.get("Name")), str(layer.get("LayerType")), form


def _gpu_for(manifest: Manifest) -> torch.device | None:
    """PyTorch's current GPU, if an engine with this manifest runs on it."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.device("cuda", torch.cuda.current_device())
    return gpu if here("compute_capability", gpu) in manifest.versions["compute_capability"].split() else None


def _compare(engine: Engine, folder: Path, manifest: Manifest, package: str, batch: Batch) -> str:
    """Run the engine where it can run, and compare it with the network."""
    where = _gpu_for(manifest)
    if where is None:
        return (
            "Not run after it was written: there was no GPU that it runs on. `layers.json` lists inputs, outputs and "
            "layers of the strongly typed network that the engine was built from, and of the engine as its builder "
            "reports them."
        )
    weights = folder / ONNX_MODEL if manifest.model["weights"] == "stripped" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TensorRT's own names, which change between releases
        run = TensorRTNetwork(folder / MODEL, manifest, where, package, weights)
    reference, largest = plain_network(engine), 0.0
    with torch.no_grad():
        for size in sorted({batch.low, batch.best}):
            example = example_inputs(engine, size)
            actual = run(*(value.to(where) for value in example))
            largest = max(largest, check_close(actual, reference(*example), f"{package} engine", size))
    return f"Run before the bundle was finished: it differs from the engine's network by at most {largest:.2g}."
