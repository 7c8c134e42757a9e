"""A tick as one CUDA graph: captured by hand, once, over buffers that stay where they are.

CUDA-graph trees (``torch.compile(mode="reduce-overhead")``) overwrite outputs and assert across threads; a graph of
our own over static buffers does neither, and holds the fused step and the row increment too.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Protocol

import torch

_WARM_UP = 3  # calls before capture: libraries choose algorithms, compilers compile, allocators fill
_CAPTURING = threading.Lock()  # one capture at a time in a process


class Graph(Protocol):
    """Something that was captured; a :class:`torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Launch it on the current stream."""


class CaptureError(RuntimeError):
    """A tick cannot be captured; the message says why."""


def why_not_graph(device: torch.device) -> str | None:
    """The reason why ticks cannot be captured on ``device``; None if they can."""
    if device.type == "cuda":
        return None
    return f"CUDA graphs need a CUDA device, and the device is {device}"


def capture(body: Callable[[], None], device: torch.device) -> Graph:
    """Run ``body`` a few times, then capture it; it must leave everything as it found it, as a tick of parked lanes
    does.

    The graph has a private memory pool: what it allocates stays its own.

    Raises:
        CaptureError: ``body`` does what a graph cannot hold, for instance it waits for the device.
        torch.OutOfMemoryError: there is no room for it.
    """
    with _CAPTURING, torch.cuda.device(device):
        outside = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(outside)  # what was launched before wrote the buffers that the body reads
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                body()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do meanwhile does not break the capture
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                body()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(" ".join(str(error).split("\n")[0].split())) from error
        outside.wait_stream(stream)  # and the first replay must not overtake the warm-up
    return graph


class CapturePolicy:
    """Which ticks of an engine are captured, if its plan has CUDA graphs: the one place that says so.

    Attributes:
        failure: why a capture failed; ticks run eagerly from then on. None if none failed.
    """

    def __init__(self) -> None:
        self.failure: str | None = None

    def captures(self, *, threshold: bool) -> bool:
        """Whether ticks are captured; those with dynamic thresholding are not: their step waits for the device."""
        return self.failure is None and not threshold

    def capture(self, body: Callable[[], None], device: torch.device) -> Graph | None:
        """The captured ``body`` (:func:`capture`), or None if it cannot be captured, which is warned of once."""
        try:
            return capture(body, device)
        except CaptureError as error:
            if self.failure is None:
                self.failure = str(error)
                warnings.warn(
                    f"the tick cannot be captured as a CUDA graph, and runs eagerly: {self.failure}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return None
