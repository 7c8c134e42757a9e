"""Copies between host and device that do not stop the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepfusion.execution.streams import copy_stream


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Host values on a device; on CUDA the host goes on at once, through pinned memory."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class HostCopy:
    """A copy of a tensor to the host, under way beside whatever the device computes next.

    Args:
        source: the tensor; on CUDA it may be dropped, but not written to, before :meth:`wait`.
    """

    def __init__(self, source: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if source.device.type != "cuda":
            self._host = source.cpu()
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        stream = copy_stream(source.device)
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            self._host.copy_(source, non_blocking=True)
            source.record_stream(stream)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(stream)

    @property
    def ready(self) -> bool:
        """True once the values are there."""
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """The values, on the host, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


class Pace:
    """Keeps the host from running ahead of a CUDA device by more than one stretch of work; nothing elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: torch.cuda.Event | None = None

    def step(self) -> None:
        """What was launched since the last call is one stretch; waits until the one before it is done."""
        if self._device.type != "cuda":
            return
        reached = torch.cuda.Event()  # type: ignore[no-untyped-call]
        reached.record(torch.cuda.current_stream(self._device))
        if self._before is not None:
            self._before.synchronize()
        self._before = reached


def as_index(positions: Sequence[int], device: torch.device) -> slice | Tensor:
    """What indexes a dimension at these positions: a slice if they are consecutive, which needs no copy."""
    first = positions[0]
    if list(positions) == list(range(first, first + len(positions))):
        return slice(first, first + len(positions))
    return upload(torch.tensor(positions, dtype=torch.int64), device)
