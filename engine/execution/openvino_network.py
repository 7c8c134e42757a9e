"""``network="openvino"``: a network that OpenVINO runs on a CPU (``pip install stepfusion[openvino]``)."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepfusion.errors import BackendError, first_line
from stepfusion.networks.norm import GroupNormAct

if TYPE_CHECKING:
    import openvino

_PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def openvino_network(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Run ``module`` through OpenVINO: exported and compiled once for each signature of its inputs.

    Args:
        module: maps CPU tensors to one tensor; in eval mode, floating parameters in ``dtype``. Its parameters may not
            change afterwards. It must be what `torch.export` can export.
        dtype: float32, bfloat16 or float16, of the floating inputs and of the output. OpenVINO computes in it where
            the processor can, in float32 where it cannot; it is given a float32 copy of the weights, and float32.

    Returns:
        ``network(*tensors) -> Tensor``. One call at a time: a second thread waits. The threads that it uses are those
        that `torch.get_num_threads` gave when a signature was first seen.

    Raises:
        BackendError: OpenVINO is not installed; a parameter, or later an input, is not on the CPU; or, from the first
            call of a signature, OpenVINO cannot take the network.
        ValueError: ``dtype`` is not one of the three.
    """
    if dtype not in _PRECISION:
        accepted = ", ".join(map(str, _PRECISION))
        raise ValueError(f"dtype must be one of {accepted} for network='openvino', got {dtype}")
    _import_openvino()
    for name, parameter in module.named_parameters():
        _require_cpu(f"parameter {name}", parameter)
    return _OpenVINONetwork(module, dtype)


@functools.cache
def openvino_core() -> openvino.Core:
    """The process's one ``openvino.Core``, which lives as long as the process does.

    On Linux the first model that a core compiles gives the calling thread another stack for signal handlers, and a
    core's end gives back the one before, which is unmapped by then if an older core ended first
    (``SigAltStackSetup`` in OpenVINO's CPU plugin). The next signal, as Ctrl-C, would then kill the process.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    core: openvino.Core = _import_openvino().Core()
    return core


class _OpenVINONetwork:
    """Compiled models by signature (shapes and dtypes) of the inputs."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype
        self._requests: dict[tuple[object, ...], _Request] = {}
        self._lock = threading.Lock()

    def __call__(self, *tensors: Tensor) -> Tensor:
        signature = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        with self._lock:
            request = self._requests.get(signature)
            if request is None:
                for index, tensor in enumerate(tensors):
                    _require_cpu(f"input {index}", tensor)
                request = self._requests[signature] = _Request(self._module, tensors, self._dtype)
            return request(tensors)


class _Request:
    """One compiled model with its own inference request, whose inputs and output are memory of torch tensors."""

    def __init__(self, module: nn.Module, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        ov, core = _import_openvino(), openvino_core()
        self._inputs = [torch.empty(tensor.shape, dtype=_exchanged(tensor.dtype)) for tensor in tensors]
        try:
            compiled = core.compile_model(_convert(module, self._inputs), "CPU", _settings(dtype))
        except Exception as error:
            raise BackendError(f"OpenVINO cannot take this network: {first_line(error)}") from error
        self._request = compiled.create_infer_request()
        for index, tensor in enumerate(self._inputs):
            self._request.set_input_tensor(index, ov.Tensor(tensor.numpy(), shared_memory=True))
        output = torch.empty(list(compiled.output(0).shape), dtype=torch.float32)
        self._request.set_output_tensor(0, ov.Tensor(output.numpy(), shared_memory=True))
        self._output, self._dtype = output, dtype

    def __call__(self, tensors: tuple[Tensor, ...]) -> Tensor:
        for bound, tensor in zip(self._inputs, tensors, strict=True):
            bound.copy_(tensor)
        self._request.infer()
        return self._output.to(self._dtype, copy=True)


def _convert(module: nn.Module, inputs: list[Tensor]) -> openvino.Model:
    """Export a float32 copy of ``module`` for these inputs; OpenVINO rounds the weights to its own precision."""
    ov = _import_openvino()
    module = copy.deepcopy(module).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for norm in module.modules():
        if isinstance(norm, GroupNormAct):
            norm.by_rows = True  # faster there: 6 % of the time of the CIFAR UNet in bfloat16
    with torch.no_grad():
        exported = torch.export.export(module, tuple(inputs)).run_decompositions()
        model: openvino.Model = ov.convert_model(exported)
    for place, tensor in zip(model.inputs, inputs, strict=True):
        place.get_node().set_partial_shape(ov.PartialShape(list(tensor.shape)))
    model.validate_nodes_and_infer_types()
    return model


def _settings(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }


def _exchanged(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which OpenVINO takes a tensor: numpy has no bfloat16."""
    return torch.float32 if dtype.is_floating_point else dtype


def _require_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise BackendError(f"network='openvino' runs on a CPU; {name} is on {tensor.device}: use device='cpu'")


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            "network='openvino' needs the package 'openvino': pip install stepfusion[openvino]"
        ) from error
    return openvino
