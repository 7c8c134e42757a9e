"""Capturing a CUDA graph by hand, on a fake device: what a capture leaves behind, above all one that fails."""

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tqdm import TMonitor

import stepfusion as sf
from stepfusion.execution import cuda_graph
from stepfusion.execution.cuda_graph import CaptureError, GraphPool, capture
from stepfusion_testing import fake_cuda
from stepfusion_testing.fake_cuda import FakeCuda
from stepfusion_testing.networks import smooth

CPU = torch.device("cpu")  # where the operators of the fake device run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch)


@pytest.fixture(autouse=True)
def _no_threads_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers that other tests used leave threads behind."""
    before, alive = {*threading.enumerate()} - {threading.current_thread()}, threading.enumerate
    monkeypatch.setattr(threading, "enumerate", lambda: [thread for thread in alive() if thread not in before])


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Another thread lives while the test runs."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


def waits_in_capture(fake: FakeCuda) -> Callable[[], None]:
    """A body that waits for the device, if it is captured."""

    def body() -> None:
        if fake.is_current_stream_capturing():
            fake.synchronizes()

    return body


def test_a_capture_replays_and_leaves_everything_as_it_was(fake: FakeCuda) -> None:
    value = torch.zeros(3)
    graph = capture(lambda: value.add_(1).clamp_(max=100).sub_(0), CPU)
    calls = value.clone()
    graph.replay()
    assert torch.equal(value, calls + 1)
    assert fake.capture_modes == {"thread_local"}, "what other threads do meanwhile does not break it"
    assert fake.is_clean()
    assert gc.isenabled()
    fake.random()


def test_the_cause_is_shown_and_nothing_of_a_failed_capture_remains(fake: FakeCuda) -> None:
    with pytest.raises(
        CaptureError, match=r"^CUDA error: operation not permitted when stream is capturing$"
    ) as raised:
        capture(waits_in_capture(fake), CPU)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert "operation not permitted" in str(raised.value.__cause__)
    assert not hasattr(raised.value.__cause__, "__notes__"), "every step of the cleaning up worked"
    assert fake.is_clean()
    assert not +fake.pools, "no memory is held"
    fake.random()
    assert gc.isenabled()
    value = torch.zeros(1)
    capture(lambda: value.zero_(), CPU).replay()


def test_pytorchs_own_context_manager_is_what_leaves_things_behind(fake: FakeCuda) -> None:
    """The negative control: the fake device is as unforgiving as the real one."""

    def as_pytorch_does() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            waits_in_capture(fake)()

    with pytest.raises(RuntimeError, match="previous error during capture"):
        as_pytorch_does()
    assert fake.current_stream().cuda_stream != 0
    assert not fake.is_clean()
    with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
        fake.random()


@pytest.mark.parametrize("error", [ValueError("shape"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
def test_an_error_that_cuda_does_not_know_of_ends_the_capture(fake: FakeCuda, error: BaseException) -> None:
    def body() -> None:
        if fake.is_current_stream_capturing():
            raise error

    with pytest.raises(type(error)) as raised:
        capture(body, CPU)
    assert raised.value is error
    assert fake.is_clean()
    assert not +fake.pools
    assert not cuda_graph._BROKEN


def test_a_body_that_hides_its_error_fails_when_the_capture_ends(fake: FakeCuda) -> None:
    def body() -> None:
        try:
            waits_in_capture(fake)()
        except RuntimeError:
            torch.zeros(1)

    with pytest.raises(CaptureError, match="previous error during capture"):
        capture(body, CPU)
    assert fake.is_clean()
    assert not +fake.pools


def test_a_device_on_which_no_capture_begins(fake: FakeCuda) -> None:
    """Cleaning up fails as well, and the first error is shown, with notes."""
    fake.capturable = False
    with pytest.raises(CaptureError, match=r"^CUDA error: out of luck$") as raised:
        capture(lambda: None, CPU)
    assert fake.current_stream().cuda_stream == 0
    assert gc.isenabled()
    assert raised.value.__cause__ is not None


def test_a_failed_capture_spoils_no_memory_that_others_use(fake: FakeCuda) -> None:
    pool, value = GraphPool(), torch.zeros(2)
    first = capture(lambda: value.zero_(), CPU, pool)
    with pytest.raises(CaptureError):
        capture(waits_in_capture(fake), CPU, pool)
    first.replay()
    capture(lambda: value.zero_(), CPU, pool).replay()
    assert sorted(fake.pools.values()) == [0, 1, 1], "that of the second graph is new"
    assert fake.is_clean()


def test_a_network_that_waits_is_found_before_any_capture(fake: FakeCuda) -> None:
    def waits() -> None:
        if float(torch.ones(1)) > 0:
            torch.zeros(1)

    sentence = r"^the network waits for the device, which a CUDA graph cannot hold \(waits, test_capture.py:\d+\)$"
    with pytest.raises(CaptureError, match=sentence) as raised:
        capture(waits, CPU)
    assert "synchronizing" in str(raised.value.__cause__)
    assert not fake.pools, "nothing was captured"
    assert fake.modes == [2, 0]
    assert fake.is_clean()


@pytest.mark.parametrize("before", [0, 1])
def test_the_mode_of_waiting_is_restored(fake: FakeCuda, before: int) -> None:
    fake.mode = before
    calls: list[int] = []

    def compiles() -> None:
        calls.append(fake.mode)
        if len(calls) == 1:
            fake.synchronizes()  # as compilers do that time what they make

    capture(compiles, CPU)
    assert calls == [before, before, 2, before], "the last warm-up, and not the capture"
    assert fake.mode == before


def test_another_error_of_the_warm_up_stays_what_it_is(fake: FakeCuda) -> None:
    def body() -> None:
        if fake.mode == 2:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match=r"^mat1 and mat2") as raised:
        capture(body, CPU)
    assert not isinstance(raised.value, CaptureError)
    assert fake.is_clean()


@pytest.mark.usefixtures("elsewhere")
def test_other_threads_may_wait_while_a_thread_captures(fake: FakeCuda) -> None:
    """The mode would hold for them as well. The network that waits is found by the capture."""
    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing"):
        capture(fake.synchronizes, CPU)
    assert not fake.modes
    assert fake.is_clean()


def test_a_progress_bar_is_no_thread_that_waits(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bars(TMonitor):
        """The thread of tqdm, which is not started here."""

        def __init__(self) -> None:
            threading.Thread.__init__(self)

    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread(), Bars()])
    capture(lambda: None, CPU)
    assert fake.modes == [2, 0]


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_in_a_capture(fake: FakeCuda, enabled: bool) -> None:
    states: list[bool] = []
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        capture(lambda: states.append(gc.isenabled()), CPU)
        with pytest.raises(CaptureError):
            capture(waits_in_capture(fake), CPU)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert states == [enabled, enabled, enabled, False]


def test_all_captures_have_the_same_stream(fake: FakeCuda) -> None:
    used: set[int] = set()
    for _ in range(40):
        capture(lambda: used.add(fake.current_stream().cuda_stream), CPU)
    assert len(used) == 1


def engines(schedule: sf.NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> tuple[sf.Engine, sf.Engine]:
    monkeypatch.setattr(sf.execution.plan, "why_not_graph", lambda device: None)
    return tuple(  # type: ignore[return-value]
        sf.Engine(smooth, schedule, shape=(2, 4, 4), device="cpu", dtype="float32", backend="triton", network=network)
        for network in ("graph", "eager")
    )


@pytest.mark.interpreter
def test_an_engine_on_the_fake_device(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, eager = engines(sf.NoiseSchedule.linear(), monkeypatch)
    for steps in (3, 4):
        assert torch.equal(captured.sample(3, steps=steps, eta=0.5), eager.sample(3, steps=steps, eta=0.5))
    assert [graph.replays for graph in fake.graphs] == [7]
    assert fake.is_clean()


@pytest.mark.interpreter
def test_an_engine_whose_network_waits(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return smooth(x, timesteps) * (1.0 if float(x.abs().max()) < 100 else 0.0)

    monkeypatch.setattr(sf.execution.plan, "why_not_graph", lambda device: None)
    engine = sf.Engine(
        waits, sf.NoiseSchedule.linear(), shape=(2, 4, 4), device="cpu", backend="triton", network="graph"
    )
    with pytest.warns(RuntimeWarning, match=r"runs eagerly: the network waits for the device.*\(waits, test_capture"):
        assert engine.sample(2, steps=2).isfinite().all()
    assert "no tick was captured: the network waits for the device" in engine.explain()
    assert fake.is_clean()


@pytest.mark.interpreter
def test_the_widths_of_a_lane_engine_share_one_memory(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ticks never run at the same time; runners that other threads may have get memory of their own."""
    captured, _ = engines(sf.NoiseSchedule.linear(), monkeypatch)
    runners = captured.runners
    key = runners.key(captured.request(4, steps=2), 4)
    shared = runners.make(key).tables
    for tables in (shared, shared, None):
        runners.make(key, tables).prepare(noise=False, keep_x0=False)
    one, two, own = (graph.pool_handle for graph in fake.graphs)
    assert one == two
    assert own != one
