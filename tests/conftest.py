"""Where kernels run, which tests a machine can run, and the seeds. pytest imports this before any test or kernel."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from stepfusion_testing.recorded_graph import Captures

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any is imported
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None

# after TRITON_INTERPRET is set: it imports the kernels
from stepfusion_testing.bad_input_fixtures import bad_input_workspace, good_model, no_network_call  # noqa: E402, F401

SKIPS = {
    "gpu": None if HAS_GPU and not INTERPRETING else "needs a GPU that torch sees, and TRITON_INTERPRET unset",
    "interpreter": None if INTERPRETING else "kernels do not run in Triton's interpreter here",
}

# A shell that starts the tests in the background has them ignore SIGINT, and every process they start; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    for item in items:
        for marker, reason in SKIPS.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded of their extent, which a dot does not show."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session", autouse=True)
def _compiled_sampling_kernels() -> None:
    """Compile the C++ sampling kernels, if they compile here, before a test can see the line that says so."""
    from stepfusion.kernels.cpu.sampling_library import why_not_sampling_kernels

    why_not_sampling_kernels()


def _check_descriptor(descriptor: int) -> None:
    """All of ``os.fsync`` that a test can see: a closed descriptor is an error."""
    os.fstat(descriptor)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """What tests write in this process need not outlive a failure of the power; the processes that they kill do wait.

    A few milliseconds each, thousands of times.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _check_descriptor)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same global random state, whatever ran before it on this worker."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors as small as the tests' are slower on two threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inductor_cache() -> Iterator[None]:
    """For tests that call ``torch.compile`` themselves: Inductor's cache as networks have it.

    Inductor's own is one for all instruction sets, and what a process without their limits left there gives wrong
    results in a process that has them.
    """
    from stepfusion.execution.cache import compiler_cache

    with compiler_cache():
        yield


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Lets engines on a CPU capture their ticks, with Triton's interpreter for the step."""
    import stepfusion as sf
    from stepfusion_testing.recorded_graph import Captures

    recorded = Captures()
    monkeypatch.setattr(sf.execution.plan, "why_not_graph", lambda device: None)
    monkeypatch.setattr(sf.execution.cuda_graph, "capture", recorded)
    return recorded


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """The device on which this session runs Triton kernels: the GPU, or the CPU through the interpreter."""
    if not HAS_GPU and not INTERPRETING:
        pytest.skip("there is neither a GPU nor Triton's interpreter")
    return torch.device("cpu" if INTERPRETING else "cuda")
