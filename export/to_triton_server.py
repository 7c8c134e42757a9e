"""A model repository for the Triton Inference Server: ``config.pbtxt`` and a model for one of its backends."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch.export import ExportedProgram

from stepfusion import _checks
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.export.base import ExportOptions, NetworkExport, Target, export_network
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import Bundle
from stepfusion.export.environment import here, require, versions
from stepfusion.export.manifest import ANY_DEVICE, Tensorspec
from stepfusion.export.tensorrt_engine import build_engine, check_precisions
from stepfusion.export.to_onnx import compare_in_onnxruntime, write_onnx

BACKENDS = ("onnx", "tensorrt", "python")
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
}
_BACKEND_NAMES = {"onnx": "onnxruntime", "tensorrt": "tensorrt", "python": "python"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PYTHON_MODEL = '''"""The network in Triton's Python backend: an exported program of PyTorch, which must be there."""

import os

import torch
import torch.utils.dlpack
import triton_python_backend_utils as pb_utils

INPUTS = {}  # what each image has of each


class TritonPythonModel:
    def initialize(self, args):
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else torch.device("cpu")
        path = os.path.join(args["model_repository"], args["model_version"], "program.pt2")
        self.network = torch.export.load(path).module().to(self.device)

    @torch.no_grad()
    def execute(self, requests):
        responses = []
        for request in requests:
            tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS]
            inputs = [torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).to(self.device) for tensor in tensors]
            inputs = [values.reshape(-1, *shape) for values, shape in zip(inputs, INPUTS.values())]
            out = self.network(*inputs).contiguous()
            result = pb_utils.Tensor.from_dlpack("out", torch.utils.dlpack.to_dlpack(out))
            responses.append(pb_utils.InferenceResponse(output_tensors=[result]))
        return responses
'''


def export_triton_server(
    engine: Engine, out: Path, *, backend: str = "onnx", name: str = "network", **options: Unpack[ExportOptions]
) -> Bundle:
    """Write a bundle with ``models/NAME/config.pbtxt`` and ``models/NAME/1/``, a repository of one model.

    Args:
        out: the directory to write, which must not exist.
        backend: "onnx" (``model.onnx``), "tensorrt" (``model.plan``, for the GPU at hand), or "python"
            (``model.py`` with PyTorch's exported program).
        name: of the model.
        options: :class:`stepfusion.export.base.ExportOptions`. A dynamic batch is made by the server, up to ``high``;
            the model's int64 inputs are then [B, 1] to clients.

    Raises:
        ExportError: as the format that the backend takes.
    """
    _checks.choice("backend", backend, BACKENDS)
    if not _NAME.fullmatch(name):
        raise ValueError(f"name must be letters, digits, '_', '-' and '.', got {name!r}")
    require(("tensorrt",) if backend == "tensorrt" else (), "tensorrt")
    if backend == "tensorrt" and not torch.cuda.is_available():
        raise ExportError("TensorRT builds for the GPU that it finds, and there is none")
    made_with = versions("onnx") if backend != "python" else versions()
    if backend == "tensorrt":
        made_with |= {name: here(name, torch.device("cuda")) for name in ("tensorrt", "compute_capability")}
    target = Target("triton-server", "cuda" if backend == "tensorrt" else ANY_DEVICE, made_with)
    return export_network(engine, out, target, partial(_build, backend=backend, name=name), **options)


def _build(export: NetworkExport, folder: Path, *, backend: str, name: str) -> str | None:
    manifest, model = export.manifest, folder / "models" / name
    version = model / "1"
    version.mkdir(parents=True)
    config = server_config(name, backend, manifest.inputs, manifest.outputs, export.batch)
    (model / "config.pbtxt").write_text(config)
    if backend == "onnx":
        write_onnx(export.program, version / "model.onnx", manifest.inputs, manifest.outputs)
        return compare_in_onnxruntime(export, version / "model.onnx")
    if backend == "python":
        _write_python_model(export, version)
    else:
        _write_tensorrt_model(export, version)
    return None


def _write_python_model(export: NetworkExport, folder: Path) -> None:
    _make_contiguous(export.program)
    torch.export.save(export.program, folder / "program.pt2")
    shapes = {spec.name: spec.shape[1:] for spec in export.manifest.inputs}
    (folder / "model.py").write_text(_PYTHON_MODEL.replace("INPUTS = {}", f"INPUTS = {shapes!r}"))


def _write_tensorrt_model(export: NetworkExport, folder: Path) -> None:
    manifest = export.manifest
    with tempfile.TemporaryDirectory() as scratch:
        write_onnx(export.program, Path(scratch, "model.onnx"), manifest.inputs, manifest.outputs)
        blob, tensors, _ = build_engine(Path(scratch, "model.onnx"), "tensorrt", export.batch)
    check_precisions(tensors, manifest.dtype)
    (folder / "model.plan").write_bytes(blob)


def _make_contiguous(program: ExportedProgram) -> None:
    """Give channels_last weights the default layout, which is the one that ``torch.export.save`` can store whole."""
    for name, value in program.state_dict.items():
        if not value.is_contiguous():
            program.state_dict[name] = torch.nn.Parameter(value.detach().contiguous(), requires_grad=False)


def server_config(
    name: str, backend: str, inputs: Sequence[Tensorspec], outputs: Sequence[Tensorspec], batch: Batch
) -> str:
    """``config.pbtxt`` (ModelConfig in the server's model_config.proto) in protocol buffer text format.

    With a dynamic batch the first dimension is the server's, and a tensor needs another one beside it: [B] is [B, 1]
    to clients and is reshaped for the model.
    """
    lines = [f'name: "{name}"', f'backend: "{_BACKEND_NAMES[backend]}"']
    lines.append(f"max_batch_size: {batch.high if batch.dynamic else 0}")
    for what, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            dims, reshape = list(spec.shape), ""
            if batch.dynamic:
                dims = dims[1:] or [1]
                reshape = "    reshape { shape: [ ] }\n" if len(spec.shape) == 1 else ""
            sizes = ", ".join(map(str, dims))
            lines.append(
                f'{what} [\n  {{\n    name: "{spec.name}"\n    data_type: {_TYPES[spec.dtype]}\n'
                f"    dims: [ {sizes} ]\n{reshape}  }}\n]"
            )
    if batch.dynamic:
        lines.append(f"dynamic_batching {{\n  preferred_batch_size: [ {batch.best} ]\n}}")
    return "\n".join(lines) + "\n"
