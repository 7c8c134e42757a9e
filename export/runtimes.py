"""Networks in other runtimes, called with PyTorch's tensors: ``(x, timesteps[, labels], *conditions) -> out``."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stepfusion.errors import ExportError
from stepfusion.execution.openvino_network import openvino_core
from stepfusion.execution.plan import DTYPES
from stepfusion.execution.streams import Turns
from stepfusion.export.manifest import Manifest, Tensorspec

LAYER_REPORT = "Layers:\n"
#: ``onnx.TensorProto.DataType`` of each dtype.
_ONNX_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


class Runtime(Protocol):
    """A loaded artefact: inputs as the manifest lists them, contiguous, on its device."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it; returns a tensor of its own."""
        ...


class TickRuntime(Protocol):
    """A loaded tick, like :class:`Runtime`; one that keeps a history returns (x_next, history_next)."""

    def __call__(self, *inputs: Tensor) -> Tensor | Sequence[Tensor]:
        """Run it; returns tensors of its own."""
        ...


def output_for(manifest: Manifest, inputs: Sequence[Tensor], device: torch.device) -> Tensor:
    """An empty tensor for the first output, if the inputs are these."""
    return _output_for(manifest.outputs[0], inputs, device)


def _output_for(spec: Tensorspec, inputs: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.empty((len(inputs[0]), *map(int, spec.shape[1:])), dtype=DTYPES[spec.dtype], device=device)


def as_specified(specs: Sequence[Tensorspec], inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Inputs as they are specified: contiguous, on the device, in the dtype.

    Raises:
        ExportError: there are too few or too many.
    """
    if len(inputs) != len(specs):
        raise ExportError(
            f"the network takes {', '.join(spec.name for spec in specs)}, and {len(inputs)} inputs were given"
        )
    types = {**DTYPES, "int64": torch.int64}
    return [value.to(device, types[spec.dtype]).contiguous() for spec, value in zip(specs, inputs, strict=True)]


class OnnxRuntimeNetwork:
    """An ONNX file in onnxruntime, on a CPU or on CUDA: there on the stream that was PyTorch's when it was loaded."""

    def __init__(self, path: Path, manifest: Manifest, device: torch.device) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise ExportError("onnxruntime has no CUDA here: pip install onnxruntime-gpu")
            self._stream = torch.cuda.current_stream(device)
            settings = {
                "device_id": device.index or 0,
                "user_compute_stream": str(self._stream.cuda_stream),
                "use_tf32": "0",  # float32 is float32
            }
            providers.insert(0, ("CUDAExecutionProvider", settings))
        else:
            options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime derives one class for each status from Exception
            raise ExportError(f"onnxruntime cannot run {path.name}: {' '.join(str(error).split())}") from error
        self._manifest, self._device = manifest, device

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it; returns its first output."""
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it; returns all that its manifest lists."""
        values = as_specified(self._manifest.inputs, inputs, self._device)
        outputs = tuple(_output_for(spec, values, self._device) for spec in self._manifest.outputs)
        binding = self._session.io_binding()
        for spec, value in zip(self._manifest.inputs, values, strict=True):
            binding.bind_input(*self._buffer(spec.name, value))
        for spec, out in zip(self._manifest.outputs, outputs, strict=True):
            binding.bind_output(*self._buffer(spec.name, out))
        if self._device.type == "cuda":
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which made the inputs
        self._session.run_with_iobinding(binding)  # returns when the outputs are there
        return outputs

    def _buffer(self, name: str, value: Tensor) -> tuple[Any, ...]:
        kind = _ONNX_TYPES[value.dtype]
        return name, self._device.type, self._device.index or 0, kind, list(value.shape), value.data_ptr()


class OpenVINONetwork:
    """OpenVINO IR on a CPU, computing in the dtype of its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[manifest.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        core = openvino_core()
        self._manifest = manifest
        self._request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
        self._lock = threading.Lock()  # a request serves one call at a time

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it."""
        values = as_specified(self._manifest.inputs, inputs, torch.device("cpu"))
        with self._lock:
            (out,) = self._request.infer([value.numpy() for value in values]).to_tuple()
        return torch.from_numpy(out).to(DTYPES[self._manifest.dtype])


class TensorRTNetwork:
    """An engine of TensorRT or TensorRT for RTX on CUDA, on PyTorch's current stream; calls can be captured.

    Args:
        package: "tensorrt" or "tensorrt_rtx".
        weights: the ONNX file that an engine without weights gets them from.
    """

    def __init__(
        self, path: Path, manifest: Manifest, device: torch.device, package: str, weights: Path | None = None
    ) -> None:
        trt = import_module(package)
        self._logger = collecting_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        with torch.cuda.device(device):
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise ExportError(
                    f"{package} {trt.__version__} cannot load {path.name} on {device}; its log says why"
                )
            if weights is not None:
                refitter = trt.Refitter(self._engine, self._logger)
                parser = trt.OnnxParserRefitter(refitter, self._logger)
                if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
                    raise ExportError(f"{package} cannot refit {path.name}: {reason(self._logger)}")
            self._context = self._engine.create_execution_context()
        self._manifest, self._device = manifest, device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.turns = Turns(device)  #: a context serves one call at a time, and has one memory on all streams

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it."""
        values = as_specified(self._manifest.inputs, inputs, self._device)
        out = output_for(self._manifest, values, self._device)
        with self.turns.take():
            for spec, value in zip(self._manifest.inputs, values, strict=True):
                shape = tuple(value.shape)
                # Once set, so that a capture finds no shape that is new: TensorRT then allocates at the next call.
                if self._shapes.get(spec.name) != shape:
                    self._context.set_input_shape(spec.name, shape)
                    self._shapes[spec.name] = shape
                self._context.set_tensor_address(spec.name, value.data_ptr())
            self._context.set_tensor_address(self._manifest.outputs[0].name, out.data_ptr())
            stream = torch.cuda.current_stream(self._device)
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise ExportError(f"TensorRT refused a batch of {len(out)}: {reason(self._logger)}")
        return out


def collecting_logger(trt: Any) -> Any:
    """A logger of TensorRT that keeps errors in its list ``errors``, what a builder says of an engine's layers in
    ``reports``, and is silent otherwise.
    """

    class Collecting(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.reports: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith(LAYER_REPORT):
                self.reports.append(message)

    return Collecting()


def reason(logger: Any) -> str:
    """What TensorRT said last, in a line."""
    return " ".join(logger.errors[-1].split()) if logger.errors else "it gave no reason"
