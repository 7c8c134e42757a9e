"""A TensorRT engine on several streams: its context has one memory, whichever stream launches it."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from stepfusion.export.manifest import Tensorspec
from stepfusion.export.runtimes import TensorRTNetwork
from stepfusion_testing import fake_cuda
from stepfusion_testing.fake_cuda import FakeCuda

CPU = torch.device("cpu")  # where the tensors of the fake device are


class Context:
    """An execution context: it has one memory, and after a new shape it allocates, which a capture cannot hold."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake, self._stale = fake, True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._stale = True

    def set_tensor_address(self, name: str, address: int) -> None:
        pass

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._fake.current_stream().cuda_stream
        if self._fake.is_current_stream_capturing():
            return not self._stale
        self._stale = False
        self._fake.use(self)
        return True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def network(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TensorRTNetwork:
    """An engine in a TensorRT that does nothing but launch."""
    context = Context(fake)
    package: Any = ModuleType("fake_tensorrt")
    package.__version__ = "0"
    package.ILogger = type("ILogger", (), {"__init__": lambda self: None})
    engine = SimpleNamespace(create_execution_context=lambda: context)
    package.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    monkeypatch.setitem(sys.modules, "fake_tensorrt", package)
    path = tmp_path / "model.engine"
    path.write_bytes(b"engine")
    specs = (Tensorspec("x", "float32", ("batch", 1)), Tensorspec("t", "int64", ("batch",)))
    manifest: Any = SimpleNamespace(inputs=specs, outputs=(Tensorspec("out", "float32", ("batch", 1)),))
    return TensorRTNetwork(path, manifest, CPU, "fake_tensorrt")


def call(network: TensorRTNetwork, size: int = 2) -> torch.Tensor:
    return network(torch.zeros(size, 1), torch.zeros(size, dtype=torch.int64))


def test_calls_on_two_streams_take_turns(fake: FakeCuda, network: TensorRTNetwork) -> None:
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            call(network)
    assert not fake.races


def test_a_capture_after_a_warm_up_finds_no_new_shape(fake: FakeCuda, network: TensorRTNetwork) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        call(network)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        call(network)
        graph.capture_end()
    call(network, size=3)
    call(network)
    assert not fake.races
