"""A float32 network that is exported computes in float32 in the other runtime, too, and not in TF32."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from stepfusion.export import to_torch_tensorrt
from stepfusion.export.batch import Batch
from stepfusion.export.runtimes import OnnxRuntimeNetwork
from stepfusion.export.tensorrt_engine import build_engine
from stepfusion_testing import fake_cuda


def test_tensorrt_is_told_to_leave_it_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = MagicMock()
    package.ILogger = type("ILogger", (), {"__init__": lambda self: None})
    builder = package.Builder.return_value
    builder.create_network.return_value = SimpleNamespace(num_layers=0, num_inputs=0, num_outputs=0)
    builder.build_serialized_network.return_value = b"engine"
    monkeypatch.setitem(sys.modules, "fake_tensorrt", package)
    assert build_engine(tmp_path / "model.onnx", "fake_tensorrt", Batch.fixed(1))[0] == b"engine"
    config = builder.create_builder_config.return_value
    config.clear_flag.assert_called_once_with(package.BuilderFlag.TF32)


def test_torch_tensorrt_is_told_to_leave_it_out() -> None:
    def compile(disable_tf32: bool = False, min_block_size: int = 5) -> None:
        """The real one takes both, by these names."""

    trt = SimpleNamespace(dynamo=SimpleNamespace(compile=compile))
    assert to_torch_tensorrt._settings(trt, torch.device("cpu"))["disable_tf32"] is True


def test_onnxruntime_is_told_to_leave_it_out_and_waits_for_its_inputs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = fake_cuda.install(monkeypatch)
    package: Any = MagicMock()
    package.get_available_providers.return_value = ["CUDAExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    manifest: Any = SimpleNamespace(inputs=(), outputs=(SimpleNamespace(name="out", dtype="float32"),))
    network = OnnxRuntimeNetwork(tmp_path / "model.onnx", manifest, torch.device("cuda", 0))
    ((_, settings), _) = package.InferenceSession.call_args.kwargs["providers"]
    assert settings["use_tf32"] == "0"
    assert settings["user_compute_stream"] == "0"

    inputs, out = object(), torch.zeros(1)
    monkeypatch.setattr("stepfusion.export.runtimes.as_specified", lambda *_: [])
    monkeypatch.setattr("stepfusion.export.runtimes._output_for", lambda *_: out)
    own = fake.current_stream()
    binding = package.InferenceSession.return_value

    def run(_: object) -> None:
        with torch.cuda.stream(own):
            fake.use(inputs)

    binding.run_with_iobinding = run
    with torch.cuda.stream(torch.cuda.Stream()):
        fake.use(inputs)
        network()
    assert not fake.races
