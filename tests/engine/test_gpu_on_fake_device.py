"""The engine's tests for a GPU, run on a fake one: that they run, and that no launch overtakes another.

A small network stands for theirs, and Triton's interpreter runs the step. What is left out needs a GPU's memory, its
TF32 or its compiler.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import stepfusion as sf
from stepfusion.execution.streams import Reached
from stepfusion.lanes.runner import Runner
from stepfusion_testing import fake_cuda
from stepfusion_testing.fake_cuda import FakeCuda
from stepfusion_testing.networks import labelled
from stepfusion_testing.recorded_graph import INTERPRETER

pytestmark = pytest.mark.interpreter

RUN: list[tuple[str, dict[str, Any]]] = [
    ("test_auto_captures", {}),
    ("test_a_captured_tick_gives_the_same_bits", {"dtype": "float32", "invariant": False}),
    ("test_a_captured_tick_gives_the_same_bits", {"dtype": "bfloat16", "invariant": True}),
    ("test_a_captured_tick_walks_any_path", {"path": "schedule"}),
    ("test_a_captured_tick_walks_any_path", {"path": "sigma"}),
    ("test_a_captured_tick_walks_any_path", {"path": "flow"}),
    ("test_the_gpu_agrees_with_the_reference_on_the_cpu", {}),
    ("test_changing_the_request_captures_nothing", {}),
    ("test_the_host_does_not_wait_inside_the_loop", {}),
    ("test_intermediates_cancellation_and_non_finite_images", {}),
    ("test_threads_share_an_engine", {}),
    ("test_bulk_pixels_are_those_of_sample", {"invariant": False}),
    ("test_bulk_pixels_are_those_of_sample", {"invariant": True}),
    ("test_a_network_that_waits_runs_eagerly", {}),
    ("test_random_numbers_and_captures_work_after_a_capture_that_fails", {}),
]
#: Slow in Triton's interpreter, and promised by another of the same test.
SOAK = [
    ("test_a_captured_tick_gives_the_same_bits", {"dtype": "float32", "invariant": False}),
    ("test_bulk_pixels_are_those_of_sample", {"invariant": False}),
]
LEFT_OUT = {
    "test_the_batch_follows_the_free_memory",
    "test_compiled_and_captured",
    "test_float32_is_float32_and_tf32_is_not",
}


class OnTheCPU(TorchFunctionMode):
    """Tensors that are asked for on the device are made where its operators run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("device") == "cuda":
            given["device"] = "cpu"
        return func(*args, **given)


def one_at_a_time(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A launch of Triton's interpreter, which has global state."""

    def launch(*args: Any, **kwargs: Any) -> torch.Tensor:
        with INTERPRETER:
            return kernel(*args, **kwargs)

    return launch


def load_gpu_tests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_gpu_tests", Path(__file__).with_name("test_gpu.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def gpu_tests(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the tests, whose engines are on the fake device."""
    module = load_gpu_tests()
    make = sf.Engine

    def engine(schedule: sf.NoiseSchedule, **arguments: Any) -> sf.Engine:
        given = {"shape": (3, 4, 4), "num_classes": 4, "null_label": 3, "backend": "triton", "batch": 16, **arguments}
        return make(labelled, schedule, **{**given, "device": "cpu"})

    class Engine(make):
        """An engine of a test's own."""

        def __init__(self, network: Any, schedule: sf.NoiseSchedule, **arguments: Any) -> None:
            super().__init__(network, schedule, **{**arguments, "device": "cpu", "backend": "triton"})

    for name in ("normal", "diffusion_step", "to_uint8"):
        monkeypatch.setattr(sf.kernels, name, one_at_a_time(getattr(sf.kernels, name)))
    monkeypatch.setattr(sf.execution.plan, "why_not_graph", lambda device: None)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: fake_cuda.FakeStream(fake, 0))
    monkeypatch.setattr(Runner, "reached", lambda self: Reached(self.x.device))
    monkeypatch.setattr(module, "engine", engine)
    monkeypatch.setattr(module.sf, "Engine", Engine)
    return module


@pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow):RuntimeWarning"  # the interpreter is NumPy
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")  # as theirs
@pytest.mark.parametrize(
    ("name", "arguments"),
    [pytest.param(*one, marks=[pytest.mark.soak] * (one in SOAK)) for one in RUN],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_on_a_fake_device(
    name: str, arguments: dict[str, Any], gpu_tests: ModuleType, fake: FakeCuda, request: pytest.FixtureRequest
) -> None:
    test = getattr(gpu_tests, name)
    extra = {"schedule": sf.NoiseSchedule.linear()}
    if "monkeypatch" in test.__code__.co_varnames:
        extra["monkeypatch"] = request.getfixturevalue("monkeypatch")
    with OnTheCPU():
        test(**extra, **arguments)
    assert fake.is_clean()
    assert not fake.races


def test_no_test_for_a_gpu_is_forgotten() -> None:
    written = {name for name in vars(load_gpu_tests()) if name.startswith("test_")}
    assert written == {name for name, _ in RUN} | LEFT_OUT
