"""Device time of short calls, without the host's.

Python takes longer to launch a short kernel than the device to run it. Between two events around such launches lies
the host's time. So calls that can be captured are captured, a whole rotation through their inputs, and replayed; and
a device is given something to do first, so that what is timed is launched by the time it is reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from stepfusion.execution.cuda_graph import CaptureError, Graph, capture

#: Seconds: calls that take longer need no backlog.
SHORT = 100e-6
_CLOCK = 2e9  # cycles a second of a device, at most
_MOST_BACKLOG = 0.05  # seconds


class Rotation:
    """So many calls, once through all inputs, as one CUDA graph if they can be captured.

    Attributes:
        calls: in one launch.
        why_not: the reason why they are launched one by one; None if they are captured.
    """

    def __init__(self, call: Callable[[], object], calls: int, device: torch.device) -> None:
        self.calls, self._call = calls, call
        self.why_not: str | None = None
        self._graph: Graph | None = None
        try:
            self._graph = capture(self._launch_each, device)
        except (CaptureError, torch.OutOfMemoryError) as error:
            self.why_not = " ".join(str(error).split())

    def launch(self) -> None:
        """Launch all calls on the current stream."""
        if self._graph is None:
            self._launch_each()
        else:
            self._graph.replay()

    def _launch_each(self) -> None:
        for _ in range(self.calls):
            self._call()


def between_events(
    launch: Callable[[], object], device: torch.device, *, backlog: float = 0.0
) -> tuple[float, float]:
    """Seconds of what ``launch`` launches: on the wall until it is done, and on the device between two events.

    Args:
        backlog: seconds for which the device is given something else to do first.
    """
    with torch.cuda.device(device):
        before, after = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        torch.cuda.synchronize()
        started = time.perf_counter()
        _occupy(backlog)
        before.record()
        launch()
        after.record()
        torch.cuda.synchronize()
        return time.perf_counter() - started, before.elapsed_time(after) / 1e3


def device_seconds(launch: Callable[[], object], device: torch.device) -> float:
    """Device seconds of what ``launch`` launches, with all of it waiting in the queue before the first begins."""
    launching_and_running, _ = between_events(launch, device)
    return between_events(launch, device, backlog=2 * launching_and_running)[1]


def _occupy(seconds: float) -> None:
    """Keep the current stream busy for about so long."""
    if seconds > 0:
        torch.cuda._sleep(int(_CLOCK * min(seconds, _MOST_BACKLOG)))  # type: ignore[no-untyped-call]
