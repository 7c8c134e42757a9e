"""Building and inspecting engines of TensorRT and TensorRT for RTX, from ONNX files.

Networks are strongly typed: every layer computes in the dtype that the network has in the ONNX file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from stepfusion.errors import ExportError
from stepfusion.execution.cache import make_cache_directory
from stepfusion.export.batch import Batch
from stepfusion.export.runtimes import collecting_logger, reason
from stepfusion.files.atomic import atomic_write

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


def build_engine(
    onnx: Path, package: str, batch: Batch, *, strip_weights: bool = False, progress: Progress | None = None
) -> tuple[bytes, Tensors, Tensors | None]:
    """Build an engine from an ONNX file with ``package``, "tensorrt" or "tensorrt_rtx".

    Returns:
        The engine, the strongly typed network that it was built from, and the engine's tensors and layers as the
        builder reports them; None if it does not.

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
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32
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
