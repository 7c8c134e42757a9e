"""A model repository: its config, parsed and held against the model, and the Python backend's model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import read_bundle
from stepfusion.export.manifest import Tensorspec
from stepfusion.export.program import example_inputs
from stepfusion.export.to_triton_server import export_triton_server, server_config
from stepfusion_testing.exports import cpu_engine
from stepfusion_testing.networks import labelled
from stepfusion_testing.tiny_model import tiny_network

TOKEN = re.compile(r'"[^"]*"|[A-Za-z_][A-Za-z0-9_]*|-?\d+|[\[\]{}:,]|\S')
INPUTS = (Tensorspec("x", "bfloat16", ("batch", 3, 32, 32)), Tensorspec("timesteps", "int64", ("batch",)))
OUTPUTS = (Tensorspec("out", "bfloat16", ("batch", 6, 32, 32)),)
#: The fields of ModelConfig, ModelInput, ModelOutput and ModelDynamicBatching in model_config.proto that are written.
KNOWN = {"name", "backend", "max_batch_size", "input", "output", "dynamic_batching"}
KNOWN_OF_TENSOR = {"name", "data_type", "dims", "reshape"}


def parse(text: str) -> dict[str, list[Any]]:
    """A message in protocol buffer text format: every field as the list of its values."""
    tokens = iter([*TOKEN.findall(text), "}"])
    message = _message(tokens)
    assert next(tokens, None) is None, "something follows the message"
    return message


def _message(tokens: Iterator[str]) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    for name in tokens:
        if name == "}":
            return fields
        assert re.fullmatch(r"[a-z_]+", name), name
        mark = next(tokens)
        values = _values(next(tokens) if mark == ":" else mark, tokens)
        fields.setdefault(name, []).extend(values)
    raise AssertionError("a message has no end")


def _values(token: str, tokens: Iterator[str]) -> list[Any]:
    if token == "{":
        return [_message(tokens)]
    if token != "[":
        return [int(token) if re.fullmatch(r"-?\d+", token) else token.strip('"')]
    values: list[Any] = []
    for inner in tokens:
        if inner == "]":
            return values
        if inner != ",":
            values += _values(inner, tokens)
    raise AssertionError("a list has no end")


def test_a_dynamic_batch_is_the_servers() -> None:
    config = parse(server_config("network", "onnx", INPUTS, OUTPUTS, Batch(1, 8, 64)))
    assert set(config) == KNOWN
    assert (config["name"], config["backend"], config["max_batch_size"]) == (["network"], ["onnxruntime"], [64])
    x, timesteps = config["input"]
    assert x == {"name": ["x"], "data_type": ["TYPE_BF16"], "dims": [3, 32, 32]}
    assert timesteps["dims"] == [1]
    assert timesteps["reshape"] == [{"shape": []}]
    assert timesteps["data_type"] == ["TYPE_INT64"]
    assert config["output"] == [{"name": ["out"], "data_type": ["TYPE_BF16"], "dims": [6, 32, 32]}]
    assert config["dynamic_batching"] == [{"preferred_batch_size": [8]}]
    assert all(set(tensor) <= KNOWN_OF_TENSOR for tensor in (*config["input"], *config["output"]))


def test_a_fixed_batch_is_part_of_the_shape() -> None:
    fixed = tuple(Tensorspec(spec.name, spec.dtype, (2, *spec.shape[1:])) for spec in INPUTS)
    config = parse(server_config("n", "tensorrt", fixed, OUTPUTS, Batch.fixed(2)))
    assert config["max_batch_size"] == [0]
    assert [tensor["dims"] for tensor in config["input"]] == [[2, 3, 32, 32], [2]]
    assert "dynamic_batching" not in config
    assert "reshape" not in config["input"][1]


def test_the_parser_refuses_what_is_no_message() -> None:
    for text in ('name: "a" }', "input [ {", "dims: [ 1", "Name: 1"):
        with pytest.raises((AssertionError, StopIteration)):
            parse(text)


class Labelled(torch.nn.Module):
    """Every kind of input, and few operators."""

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return labelled(x, timesteps, labels)


def test_the_onnx_backends_model_has_the_configs_tensors(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    engine = cpu_engine(Labelled(), shape=(1, 8, 8), num_classes=4)
    export_triton_server(engine, tmp_path / "bundle", name="unet")
    folder = read_bundle(tmp_path / "bundle").path / "models" / "unet"
    model = onnx.load(folder / "1" / "model.onnx")
    config = parse((folder / "config.pbtxt").read_text())
    for tensors, values in ((config["input"], model.graph.input), (config["output"], model.graph.output)):
        for tensor, value in zip(tensors, values, strict=True):
            assert tensor["name"] == [value.name]
            sizes = [size.dim_value for size in value.type.tensor_type.shape.dim][1:]
            assert (tensor["reshape"][0]["shape"] if "reshape" in tensor else tensor["dims"]) == sizes
            kind = {1: "TYPE_FP32", 7: "TYPE_INT64"}[value.type.tensor_type.elem_type]
            assert tensor["data_type"] == [kind]


class PbTensor:
    """What the server's Python backend hands to a model."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def to_dlpack(self) -> Any:
        return torch.utils.dlpack.to_dlpack(self.value)

    @classmethod
    def from_dlpack(cls, name: str, capsule: Any) -> PbTensor:
        assert name == "out"
        return cls(torch.utils.dlpack.from_dlpack(capsule))


# PyTorch 2.11 reads a program's weights from a buffer that may not be written
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_the_python_backends_model_runs_as_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cpu_engine(tiny_network())
    export_triton_server(engine, tmp_path / "bundle", backend="python")
    folder = tmp_path / "bundle" / "models" / "network"
    utilities = ModuleType("triton_python_backend_utils")
    utilities.__dict__.update(
        Tensor=PbTensor,
        get_input_tensor_by_name=lambda request, name: PbTensor(request[name]),
        InferenceResponse=lambda output_tensors: output_tensors[0].value,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    names: dict[str, Any] = {}
    exec((folder / "1" / "model.py").read_text(), names)
    model = names["TritonPythonModel"]()
    kind = {"model_instance_kind": "CPU", "model_instance_device_id": "0"}
    model.initialize({"model_repository": str(folder), "model_version": "1", **kind})
    x, timesteps, labels = example_inputs(engine, 3)
    request = {"x": x, "timesteps": timesteps, "labels": labels}
    shaped = {"x": x, "timesteps": timesteps[:, None], "labels": labels[:, None]}
    with torch.no_grad():
        expected = engine.network(x, timesteps, labels)
    for actual in model.execute([request, shaped]):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert parse((folder / "config.pbtxt").read_text())["backend"] == ["python"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "java"}, ValueError, r"^backend must be one of 'onnx', 'tensorrt', 'python', got 'java'$"),
        ({"name": "../x"}, ValueError, r"^name must be letters, digits, .* got '../x'$"),
        ({"backend": "tensorrt"}, sf.ExportError, r"tensorrt|GPU"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    if arguments.get("backend") == "tensorrt" and torch.cuda.is_available():
        pytest.skip("there is a GPU to build for")
    with pytest.raises(error, match=message):
        export_triton_server(cpu_engine(SimpleNamespace, shape=(1, 8, 8)), tmp_path / "bundle", **arguments)
    assert list(tmp_path.iterdir()) == []
