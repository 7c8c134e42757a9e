"""`torch.cuda` for machines without a GPU: streams, events, captures, the allocator and the default generator.

It is a model of what PyTorch 2.11 to 2.13 and CUDA do, and as unforgiving: streams are handed out from 32 in turn; a
capture that CUDA refuses leaves allocator and generator where they were; what is launched on a stream that captures
goes into its graph, whichever thread launches; and two launches that write the same thing (:meth:`FakeCuda.use`) must
be ordered by events, or they are a race.

Operators run on CPU tensors at once. A graph replays them (:class:`stepfusion_testing.recorded_graph.RecordedGraph`).
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepfusion_testing.recorded_graph import WAITS, RecordedGraph

_STREAMS = 32  # for each device, handed out in turn
_MODES = {"default": 0, "warn": 1, "error": 2}
_NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be reported"
_INVALIDATED = "CUDA error: operation failed due to a previous error during capture\nCUDA kernel errors might be"
_SYNCHRONIZES = "called a synchronizing CUDA operation\nException raised from warn_or_error_on_sync"

Clock = Counter[int]
REPLAY = 20e-6  # seconds in which the host launches a graph


class FakeStream:
    """A stream: its handle is its identity."""

    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self._cuda, self.cuda_stream = cuda, handle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def wait_stream(self, other: FakeStream) -> None:
        self._cuda.order(self.cuda_stream, self._cuda.clock(other.cuda_stream))

    def wait_event(self, event: FakeEvent) -> None:
        assert event.clock is not None, "an event that was not recorded"
        self._cuda.order(self.cuda_stream, event.clock)


class FakeEvent:
    """A point in the work of a stream, and the second at which it was reached."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.clock: Clock | None = None
        self.reached = 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        self.clock = self._cuda.clock((stream or self._cuda.current_stream()).cuda_stream)
        self.reached = max(self._cuda.now, self._cuda.busy_until)

    def elapsed_time(self, after: FakeEvent) -> float:
        """Milliseconds."""
        return 1e3 * (after.reached - self.reached)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.clock is not None
        self._cuda.host_waits(self.clock)


class _Captured(RecordedGraph):
    """Operators in a graph; one that cannot be there breaks the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            self.broken = True
            raise RuntimeError(_NOT_PERMITTED)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Synchronizing(TorchDispatchMode):
    """The mode in which waiting for the device is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(_SYNCHRONIZES)
        return func(*args, **(kwargs or {}))


class FakeGraph:
    """A `torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.recorded = _Captured()
        self.pool_handle: tuple[int, int] | None = None
        self.stream: FakeStream | None = None
        self.ended = False
        self.replays = 0
        self.seconds = 0.0  # of its kernels

    def capture_begin(
        self,
        pool: tuple[int, int] | None = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,
    ) -> None:
        cuda = self._cuda
        self.stream = cuda.current_stream()
        assert self.stream.cuda_stream != 0, "CUDA graphs must be captured on a non-default stream"
        cuda.capture_modes.add(capture_error_mode)
        pool = pool or cuda.graph_pool_handle()
        if pool in cuda.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        cuda.generator_captures = True
        cuda.recording.append(pool)
        cuda.pools[pool] += 1
        self.pool_handle = pool
        cuda.capturing[self.stream.cuda_stream] = self
        self.recorded.__enter__()
        cuda.after_begin()

    def capture_end(self) -> None:
        cuda = self._cuda
        assert self.stream is not None
        if self._cuda.capturing.pop(self.stream.cuda_stream, None) is not self:
            raise RuntimeError("CUDA error: the operation cannot be performed in the present state")
        self.recorded.__exit__(None, None, None)
        if self.recorded.broken:
            raise RuntimeError(_INVALIDATED)
        assert self.pool_handle is not None
        cuda.recording.remove(self.pool_handle)
        cuda.generator_captures = False
        self.ended = True
        cuda.graphs.append(self)

    def replay(self) -> None:
        assert self.ended
        self.replays += 1
        self._cuda.use(self.pool_handle)
        self._cuda.launch(self.seconds, REPLAY)
        self.recorded.replay()

    def reset(self) -> None:
        if self.ended:
            assert self.pool_handle is not None
            self._cuda.release(self.pool_handle)
            self.ended = False


class _Within:
    """A block on another stream. As PyTorch's, it does nothing if it is dropped without being left."""

    def __init__(self, cuda: FakeCuda, stream: FakeStream) -> None:
        self._cuda, self._stream = cuda, stream
        self._before: FakeStream | None = None

    def __enter__(self) -> None:
        self._before = self._cuda.become(self._stream)

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        self._cuda.become(self._before)


class FakeCuda:
    """The state of a device.

    Attributes:
        graphs: that were captured to their end. recording: memory pools that the allocator takes from.
        pools: how many hold each. generator_captures: whether the default generator is in a capture.
        now, busy_until: seconds of the host, and at which the device has done what it was given (:meth:`launch`).
        modes: every mode of synchronizing that was set. races: pairs of launches without an order.
    """

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.recording: list[tuple[int, int]] = []
        self.pools: Counter[tuple[int, int]] = Counter()
        self.capturing: dict[int, FakeGraph] = {}
        self.generator_captures = False
        self.mode, self.modes = 0, list[int]()
        self.races: list[str] = []
        self.recorded_streams: list[FakeStream] = []
        self.capturable = True
        self.capture_modes: set[str] = set()
        self.now = self.busy_until = 0.0
        self._uses: dict[int, list[tuple[int, int, str]]] = {}
        self._things: list[object] = []  # kept, so that no other gets the same id
        self._clocks: dict[int, Clock] = {}
        self._thread = threading.local()
        self._handles, self._pool_ids = itertools.count(), itertools.count(1)
        self._lock = threading.RLock()
        self._waits: _Synchronizing | None = None

    # What PyTorch offers

    def make_stream(self, device: object = None, priority: int = 0) -> FakeStream:
        return FakeStream(self, 1 + next(self._handles) % _STREAMS)

    def make_event(self, *_: object, **__: object) -> FakeEvent:
        return FakeEvent(self)

    def make_graph(self) -> FakeGraph:
        return FakeGraph(self)

    def current_stream(self, device: object = None) -> FakeStream:
        stream: FakeStream = self._thread.__dict__.setdefault("stream", FakeStream(self, 0))
        return stream

    def stream(self, stream: FakeStream) -> _Within:
        return _Within(self, stream)

    def become(self, stream: FakeStream) -> FakeStream:
        """Make a stream this thread's current one; returns the one before."""
        before = self.current_stream()
        self._thread.stream = stream
        return before

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, next(self._pool_ids))

    def set_sync_debug_mode(self, mode: str | int) -> None:
        self.mode = _MODES[mode] if isinstance(mode, str) else mode
        self.modes.append(self.mode)
        if len(self.modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)
        if self._waits is not None:
            self._waits.__exit__(None, None, None)
            self._waits = None
        if self.mode == 2:
            self._waits = _Synchronizing()
            self._waits.__enter__()

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def is_current_stream_capturing(self) -> bool:
        return self.current_stream().cuda_stream in self.capturing

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, pool: tuple[int, int]) -> None:
        self.pools[pool] -= 1
        assert self.pools[pool] >= 0, "released twice, which aborts the process"

    def after_begin(self) -> None:
        """Called once a capture has begun."""
        if not self.capturable:
            raise RuntimeError("CUDA error: out of luck")

    # What tests ask

    def random(self) -> None:
        """A random number from the default generator, as PyTorch 2.11 makes it."""
        if self.generator_captures and not self.is_current_stream_capturing():
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def launch(self, seconds: float, host: float) -> None:
        """A kernel that takes so long, and whose launch takes the host so long; in a capture, a node of the graph."""
        graph = self.capturing.get(self.current_stream().cuda_stream)
        if graph is not None:
            graph.seconds += seconds
            return
        self.now += host
        self.busy_until = max(self.busy_until, self.now) + seconds

    def synchronize(self, device: object = None) -> None:
        """Wait for the device."""
        self.now = max(self.now, self.busy_until)

    def sleep(self, cycles: int) -> None:
        """Keep the device busy; of 1 GHz, the slowest there is."""
        self.busy_until = max(self.busy_until, self.now) + cycles / 1e9

    def synchronizes(self) -> None:
        """An operation that waits for the device."""
        graph = self.capturing.get(self.current_stream().cuda_stream)
        if graph is not None:
            graph.recorded.broken = True
            raise RuntimeError(_NOT_PERMITTED)
        if self.mode == 2:
            raise RuntimeError(_SYNCHRONIZES)

    def is_clean(self) -> bool:
        """Whether the thread, the allocator and the generator are as if no capture had been tried."""
        return (
            self.current_stream().cuda_stream == 0
            and not self.recording
            and not self.capturing
            and not self.generator_captures
            and self.mode == 0
        )

    def use(self, thing: object) -> None:
        """A launch on the current stream that writes a thing; a race if nothing orders it behind the one before."""
        with self._lock:
            stream = self.current_stream().cuda_stream
            name = threading.current_thread().name
            self._things.append(thing)
            clock = self.clock(stream)
            for other, place, by in self._uses.get(id(thing), []):
                if clock[other] < place and other != stream:
                    self.races.append(f"{name} on stream {stream} and {by} on stream {other}")
            clock[stream] += 1
            self._clocks[stream] = clock
            self._uses.setdefault(id(thing), []).append((stream, clock[stream], name))

    # The order of launches

    def clock(self, stream: int) -> Clock:
        """How much of each stream's work is done when what comes next on this stream begins."""
        with self._lock:
            host: Clock = self._thread.__dict__.get("clock", Counter())
            return Counter(self._clocks.get(stream, Counter()) | host)

    def order(self, stream: int, clock: Clock) -> None:
        """What comes next on a stream begins after this."""
        with self._lock:
            self._clocks[stream] = self.clock(stream) | clock

    def host_waits(self, clock: Clock) -> None:
        """This thread goes on after this."""
        self._thread.clock = self._thread.__dict__.get("clock", Counter()) | clock


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Put a fake device in the place of `torch.cuda`, and forget the streams of other tests."""
    from stepfusion.execution import cuda_graph, streams

    fake, empty = FakeCuda(), torch.empty

    def empty_here(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        where = None if device is None or torch.device(device).type == "cuda" else device
        made: torch.Tensor = empty(*size, device=where, **options)
        return made

    monkeypatch.setattr(torch, "empty", empty_here)
    for name, value in {
        "Stream": fake.make_stream,
        "Event": fake.make_event,
        "CUDAGraph": fake.make_graph,
        "current_stream": fake.current_stream,
        "stream": fake.stream,
        "device": fake.device,
        "current_device": lambda: 0,
        "graph_pool_handle": fake.graph_pool_handle,
        "set_sync_debug_mode": fake.set_sync_debug_mode,
        "get_sync_debug_mode": fake.get_sync_debug_mode,
        "is_current_stream_capturing": fake.is_current_stream_capturing,
        "synchronize": fake.synchronize,
        "_sleep": fake.sleep,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: fake.release(pool), raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: fake.recorded_streams.append(stream))
    monkeypatch.setattr(streams, "_CAPTURE", {})
    monkeypatch.setattr(streams, "_THREAD", threading.local())
    monkeypatch.setattr(cuda_graph, "_BROKEN", [])
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return fake
