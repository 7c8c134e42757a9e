"""The order between the streams of several threads, on a fake device that notices what is not ordered."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.execution.cuda_graph import OrderedGraph, capture
from stepfusion.execution.evaluator import Evaluator
from stepfusion.execution.streams import Reached, Turns, capture_stream, copy_stream
from stepfusion.lanes.runner import Runner, RunnerKey
from stepfusion.lanes.runners import RunnerPool
from stepfusion.lanes.transfer import HostCopy
from stepfusion.options import ExecutionOptions
from stepfusion_testing import fake_cuda
from stepfusion_testing.fake_cuda import FakeCuda
from stepfusion_testing.networks import smooth

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
KEY = RunnerKey(1, (1, 2, 2), CUDA, torch.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch)


def in_thread(work: Callable[[], object]) -> None:
    """Do it in another thread, to the end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def on_a_stream(work: Callable[[], object]) -> Callable[[], None]:
    """The same on a stream of its own, as a caller may have one."""

    def run() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            work()

    return run


class LaunchingRunner:
    """A runner whose every operation is a launch that writes its buffers."""

    def __init__(self, fake: FakeCuda) -> None:
        self._fake = fake
        self.buffers = [torch.zeros(1)]

    def tick(self) -> None:
        self._fake.use(self)

    def reached(self) -> Reached:
        return Reached(CUDA)

    park = tick


def test_a_runner_goes_from_one_thread_to_another_with_its_work_done(fake: FakeCuda) -> None:
    pool, runner = RunnerPool(2), LaunchingRunner(fake)

    def request() -> None:
        borrowed = pool.take(KEY, lambda _: runner)  # type: ignore[arg-type, return-value]
        borrowed.tick()
        pool.give(KEY, borrowed)

    for _ in range(3):
        in_thread(on_a_stream(request))
    assert not fake.races
    assert fake.recorded_streams, "its memory is not given away while another stream uses it"


def test_on_one_stream_nothing_is_waited_for(fake: FakeCuda) -> None:
    pool, runner = RunnerPool(2), LaunchingRunner(fake)
    for _ in range(3):
        pool.give(KEY, pool.take(KEY, lambda _: runner))  # type: ignore[arg-type, return-value]
    assert not fake.recorded_streams
    assert not fake.races


def test_the_fake_device_notices_a_hand_over_without_an_event(fake: FakeCuda) -> None:
    """The negative control."""
    runner = LaunchingRunner(fake)
    in_thread(runner.tick)
    in_thread(on_a_stream(runner.tick))
    assert len(fake.races) == 1


def test_a_runner_has_all_its_tensors_among_its_buffers() -> None:
    network = Evaluator(lambda x, t: x, False)
    key = RunnerKey(2, (1, 2, 2), CPU, torch.float32, null_label=0, known=True)
    runner = Runner(network, key, sf.kernels.reference)
    runner.prepare(noise=True, keep_x0=True)
    runner.load(sf.ddpm(sf.NoiseSchedule.linear(), 3))
    storages = {tensor.untyped_storage().data_ptr() for tensor in runner.buffers}
    for thing in (runner, runner.tables):
        held = [value for value in vars(thing).values() if isinstance(value, torch.Tensor)]
        assert len(held) >= 4
        assert all(value.untyped_storage().data_ptr() in storages for value in held)


def test_a_runner_on_a_cpu_has_no_stream_to_wait_for(fake: FakeCuda) -> None:
    on_cpu, on_gpu = (SimpleNamespace(x=SimpleNamespace(device=device)) for device in (CPU, CUDA))
    assert Runner.reached(on_cpu) is None  # type: ignore[arg-type]
    assert isinstance(Runner.reached(on_gpu), Reached)  # type: ignore[arg-type]


def test_weights_are_there_before_another_thread_reads_them(fake: FakeCuda) -> None:
    engine = sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), shape=(1, 2, 2), device="cpu", backend="reference")
    runners, weights = engine.runners, object()

    def load() -> None:
        fake.use(weights)
        plan = SimpleNamespace(**{**vars(runners.plan), "device": CUDA, "captures": False, "ops": None})
        made.append(type(runners)(runners.spec, plan, runners.evaluator, ExecutionOptions(batch=1)))  # type: ignore[arg-type]

    made: list[Any] = []
    key = runners.key(engine.request(1, steps=1), 1)
    in_thread(on_a_stream(load))
    in_thread(on_a_stream(lambda: (made[0].make(key), fake.use(weights))))
    assert not fake.races


# Copies to the host


def source(values: torch.Tensor) -> Any:
    """A tensor that says it is on the device."""
    return SimpleNamespace(
        device=CUDA,
        shape=values.shape,
        dtype=values.dtype,
        values=values,
        record_stream=values.record_stream,
    )


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> list[int]:
    """Copies to pinned memory: the stream of each."""
    streams: list[int] = []
    empty = torch.empty

    class Host:
        def copy_(self, given: Any, non_blocking: bool) -> None:
            assert non_blocking
            fake.use(given)
            streams.append(fake.current_stream().cuda_stream)

    monkeypatch.setattr(
        torch, "empty", lambda *args, pin_memory=False, **rest: Host() if pin_memory else empty(*args, **rest)
    )
    return streams


def test_a_thread_has_one_stream_for_its_copies(pinned: list[int]) -> None:
    for _ in range(70):
        HostCopy(source(torch.zeros(2)))
    assert len(pinned) == 70
    assert len(set(pinned)) == 1


def test_a_copy_reads_what_was_written_before(fake: FakeCuda, pinned: list[int]) -> None:
    values = source(torch.zeros(2))
    fake.use(values)
    HostCopy(values).wait()
    fake.use(values)
    assert pinned
    assert not fake.races


@pytest.mark.parametrize("threads", [1, 40])
def test_no_copy_goes_into_the_graph_that_another_thread_captures(
    fake: FakeCuda, pinned: list[int], threads: int
) -> None:
    def body() -> None:
        if fake.is_current_stream_capturing():
            for _ in range(threads):
                in_thread(lambda: [HostCopy(source(torch.zeros(1))) for _ in range(40)])

    capture(body, CUDA)
    assert len(pinned) == 40 * threads
    assert capture_stream(CUDA).cuda_stream not in pinned


def test_a_new_stream_for_each_copy_is_sooner_or_later_the_one_that_captures(fake: FakeCuda) -> None:
    """The negative control: PyTorch hands out 32 streams in turn."""
    assert capture_stream(CPU) in [torch.cuda.Stream() for _ in range(40)]
    assert copy_stream(CPU) != capture_stream(CPU)


# A thing with one memory on all streams


def captured_with(fake: FakeCuda, context: object, turns: Turns | None) -> Any:
    """A graph whose replay uses the memory of a context."""

    class Replays:
        def replay(self) -> None:
            fake.use(context)

    return Replays() if turns is None else OrderedGraph(Replays(), turns)


@pytest.mark.parametrize("ordered", [True, False])
def test_replays_on_two_streams_take_turns(fake: FakeCuda, ordered: bool) -> None:
    """Without turns, the negative control, they are a race."""
    context, turns = object(), Turns(CPU) if ordered else None
    graphs = [captured_with(fake, context, turns) for _ in range(2)]
    for graph in graphs * 2:
        in_thread(on_a_stream(graph.replay))
    assert bool(fake.races) is not ordered


def test_calls_and_replays_take_turns(fake: FakeCuda) -> None:
    context, turns = object(), Turns(CPU)

    def call() -> None:
        with turns.take():
            fake.use(context)

    for work in (call, captured_with(fake, context, turns).replay, call):
        in_thread(on_a_stream(work))
    assert not fake.races


def test_a_capture_takes_no_turn(fake: FakeCuda) -> None:
    """An event that was recorded outside cannot be waited for inside."""
    turns = Turns(CPU)
    waited: list[bool] = []

    def call() -> None:
        with turns.take():
            waited.append(turns._last is not None)

    in_thread(on_a_stream(call))
    before = fake.clock(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        call()
        graph.capture_end()
    assert fake.clock(0) == before
    assert len(waited) == 2


def test_an_error_in_a_turn_ends_it(fake: FakeCuda) -> None:
    turns = Turns(CPU)
    with pytest.raises(ValueError, match="shape"), turns.take():
        raise ValueError("shape")
    with turns.take():
        pass


@pytest.mark.interpreter
def test_a_captured_tick_of_a_network_with_turns_takes_one_at_each_replay(
    fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exported:
        turns = Turns(CPU)

        def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return smooth(x, timesteps)

    taken: list[int] = []
    take = Turns.take

    def counted(self: Turns) -> Any:
        taken.append(1)
        return take(self)

    monkeypatch.setattr(Turns, "take", counted)
    monkeypatch.setattr(sf.execution.plan, "why_not_graph", lambda device: None)
    arguments: dict[str, Any] = {"shape": (2, 4, 4), "device": "cpu", "backend": "triton", "network": "graph"}
    for network, turns in ((Exported(), 3), (smooth, 0)):
        taken.clear()
        engine = sf.Engine(network, sf.NoiseSchedule.linear(), **arguments)
        in_thread(on_a_stream(lambda engine=engine: engine.sample(2, steps=3)))
        assert len(taken) == turns
    assert [graph.replays for graph in fake.graphs] == [3, 3]
