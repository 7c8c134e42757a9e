"""CUDA streams of ours, and the order between the streams of several threads.

PyTorch hands out 32 streams for each device and priority in turn, so that two streams that were asked for can be one.
What runs on a stream while it captures becomes part of the graph: the stream that captures is asked for once, and no
other stream of ours is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LOCK = threading.Lock()
_CAPTURE: dict[torch.device, torch.cuda.Stream] = {}
_THREAD = threading.local()


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs are captured on this device, the same at every call."""
    with _LOCK:
        if device not in _CAPTURE:
            _CAPTURE[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return _CAPTURE[device]


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's stream for copies to the host, the same at every call, and never the one that captures."""
    streams: dict[torch.device, torch.cuda.Stream] = _THREAD.__dict__.setdefault("copies", {})
    if device not in streams:
        captures = capture_stream(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        while stream == captures:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams[device] = stream
    return streams[device]


class Reached:
    """A point in the work of a CUDA device: what was launched on the current stream before this object was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(self._stream)

    def wait(self, tensors: Iterable[Tensor] = ()) -> None:
        """Have the current stream wait for that work. The host goes on.

        Args:
            tensors: what was written before and is used on the current stream from now on; its memory is not given
                to others while that lasts.
        """
        stream = torch.cuda.current_stream(self._device)
        if stream == self._stream:
            return
        stream.wait_event(self._event)
        for tensor in tensors:
            tensor.record_stream(stream)


class Turns:
    """Lets work that several CUDA streams launch on one thing run in the order in which it was launched.

    A TensorRT context is such a thing: its memory is its own, and the same on every stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._last: Reached | None = None

    @contextmanager
    def take(self) -> Iterator[None]:
        """What is launched in this block runs after that of the block before, whatever the streams.

        A capture takes no turn, for it runs nothing; the replays of its graph do.
        """
        with self._lock:
            if torch.cuda.is_current_stream_capturing():
                yield
                return
            if self._last is not None:
                self._last.wait()
            try:
                yield
            finally:
                self._last = Reached(self._device)
