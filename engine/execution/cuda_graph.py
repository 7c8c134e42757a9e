"""A tick as one CUDA graph: captured by hand, once, over buffers that stay where they are.

CUDA-graph trees (``torch.compile(mode="reduce-overhead")``) overwrite outputs and assert across threads; a graph of
our own over static buffers does neither, and holds the fused step and the row increment too.

`torch.cuda.graph` is not used either. If a capture fails, it leaves the thread on the stream that captures, the
allocator in the graph's memory and, in PyTorch 2.11, the default generator without random numbers; and the error that
it shows is not the one that was the cause.
"""

from __future__ import annotations

import gc
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import TMonitor

from stepfusion.execution.streams import Turns, capture_stream

_WARM_UP = 3  # calls before capture: libraries choose algorithms, compilers compile, allocators fill
_CAPTURING = threading.Lock()  # one capture at a time in a process
_SYNCHRONIZING = "called a synchronizing CUDA operation"  # PyTorch's words
_PYTORCH = str(Path(torch.__file__).parent)
_MODES = ("__torch_dispatch__", "__torch_function__")  # of those who watch PyTorch's operators

#: Graphs whose capture failed. PyTorch's allocator of pinned memory goes on asking them whether they capture, and
#: nothing but the end of a capture can tell it not to.
_BROKEN: list[torch.cuda.CUDAGraph] = []


class Graph(Protocol):
    """Something that was captured; a :class:`torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Launch it on the current stream."""


class CaptureError(RuntimeError):
    """A tick cannot be captured; the message says why."""


class GraphPool:
    """Memory for what captured ticks compute on the way, one for all ticks that never run at the same time."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """PyTorch's name for it, two integers."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def renew(self) -> None:
        """Take other memory for the captures to come: PyTorch refuses memory in which a capture failed."""
        self._handle = None


def why_not_graph(device: torch.device) -> str | None:
    """The reason why ticks cannot be captured on ``device``; None if they can."""
    if device.type == "cuda":
        return None
    return f"CUDA graphs need a CUDA device, and the device is {device}"


def capture(body: Callable[[], None], device: torch.device, pool: GraphPool | None = None) -> Graph:
    """Run ``body`` a few times, then capture it; it must leave everything as it found it, as a tick of parked lanes
    does.

    Whatever happens, the current stream, the allocator and the generators are as before.

    Args:
        pool: where the graph has its memory; by default in memory of its own.

    Raises:
        CaptureError: ``body`` does what a graph cannot hold, for instance it waits for the device. Its cause is the
            error that was raised there.
        torch.OutOfMemoryError: there is no room for it.
    """
    with _CAPTURING, torch.cuda.device(device):
        outside = torch.cuda.current_stream(device)
        stream = capture_stream(device)
        stream.wait_stream(outside)  # what was launched before wrote the buffers that the body reads
        try:
            with torch.cuda.stream(stream):
                _warm_up(body)
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()  # what the warm-up used belongs to this stream, and no other can use it
                with _no_collection():
                    return _capture(body, device, GraphPool() if pool is None else pool)
        finally:
            outside.wait_stream(stream)  # the first replay must not overtake the warm-up


def _warm_up(body: Callable[[], None]) -> None:
    """Call ``body``, the last time so that waiting for the device is an error; what is done once is done by then."""
    for _ in range(_WARM_UP - 1):
        body()
    with _no_waiting():
        body()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise CaptureError if the host waits for the device in this block.

    The mode holds for all threads of a process, and would break what others do meanwhile. So it is used only if no
    other thread can be hit; otherwise the capture itself finds out, which costs more to clean up.
    """
    if not _alone():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        if _SYNCHRONIZING not in str(error):
            raise
        raise CaptureError(
            f"the network waits for the device, which a CUDA graph cannot hold ({_place(error)})"
        ) from error
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: str | int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says once that the mode is a prototype, after it has set it
        torch.cuda.set_sync_debug_mode(mode)


def _alone() -> bool:
    """Whether no other thread of this process can use a device; those of progress bars do not."""
    others = (thread for thread in threading.enumerate() if thread is not threading.current_thread())
    return all(isinstance(thread, TMonitor) for thread in others)


def _sentence(error: BaseException) -> str:
    """The first line of what an error says."""
    return " ".join(str(error).split("\n")[0].split())


def _place(error: BaseException) -> str:
    """The line outside PyTorch that an error comes from: function, file and number."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_PYTORCH) and frame.name not in _MODES]
    frame = own[-1]
    return f"{frame.name}, {Path(frame.filename).name}:{frame.lineno}"


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running: what it frees on a device would become part of the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _capture(body: Callable[[], None], device: torch.device, pool: GraphPool) -> Graph:
    """Capture ``body`` on the current stream."""
    graph = torch.cuda.CUDAGraph()
    ended = False
    try:
        # thread_local: what other threads do meanwhile does not break the capture
        graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
        body()
        ended = True
        graph.capture_end()
    except BaseException as error:
        if ended or not _ends(graph):
            _clean_up(graph, device, pool, error)
        graph.reset()
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
            raise
        raise CaptureError(_sentence(error)) from error
    return graph


def _ends(graph: torch.cuda.CUDAGraph) -> bool:
    """End a capture that is of no use; True if CUDA found nothing wrong with it, so that it ended as any other."""
    try:
        graph.capture_end()
    except RuntimeError:  # its cause is the error that is being handled
        return False
    return True


def _clean_up(graph: torch.cuda.CUDAGraph, device: torch.device, pool: GraphPool, error: BaseException) -> None:
    """Do what :meth:`torch.cuda.CUDAGraph.capture_end` leaves out if CUDA refuses the capture.

    What goes wrong here is noted with the error, which remains the one to show.
    """
    _BROKEN.append(graph)
    index, handle = torch.cuda.current_device(), pool.handle
    pool.renew()
    try:
        torch._C._cuda_endAllocateToPool(index, handle)
    except RuntimeError as other:  # capture_end came further than that, and reset() releases the memory
        error.add_note(f"the allocator had left the capture: {_sentence(other)}")
    else:
        torch._C._cuda_releasePool(index, handle)
    try:
        _capture_nothing(device)
    except RuntimeError as other:
        error.add_note(f"no capture works any more: {_sentence(other)}")


def _capture_nothing(device: torch.device) -> None:
    """A capture that ends well, which takes the default generator out of the state of one that did not.

    PyTorch 2.11 refuses random numbers on the device in that state.
    """
    value = torch.empty(1, device=device)  # without a launch, PyTorch warns of an empty graph
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
    value.zero_()
    graph.capture_end()
    graph.reset()


class OrderedGraph:
    """A graph that uses a thing which other graphs use too: its replays take turns with theirs."""

    def __init__(self, graph: Graph, turns: Turns) -> None:
        self._graph, self._turns = graph, turns

    def replay(self) -> None:
        """Launch it on the current stream, behind what uses the same thing."""
        with self._turns.take():
            self._graph.replay()


class CapturePolicy:
    """Which ticks of an engine are captured, if its plan has CUDA graphs: the one place that says so.

    Attributes:
        failure: why a capture failed; ticks run eagerly from then on. None if none failed.
    """

    def __init__(self) -> None:
        self.failure: str | None = None

    def captures(self, *, whole_image: bool) -> bool:
        """Whether ticks are captured; rows that need a whole image are not: their step waits for the device."""
        return self.failure is None and not whole_image

    def capture(self, body: Callable[[], None], device: torch.device, pool: GraphPool | None = None) -> Graph | None:
        """The captured ``body`` (:func:`capture`), or None if it cannot be captured, which is warned of once."""
        try:
            return capture(body, device, pool)
        except CaptureError as error:
            if self.failure is None:
                self.failure = str(error)
                warnings.warn(
                    f"the tick cannot be captured as a CUDA graph, and runs eagerly: {self.failure}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return None
