"""Small pictures of images on their way, kept for a reader within a bound, the latest ones if not all."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, replace

import torch

from stepfusion.lanes.request import Event

_LONGER_SIDE = 64  # pixels of a preview, at most
_BYTES_KEPT = 1 << 20  # of a reader who is slower than the lanes


@dataclass(frozen=True, eq=False)
class Preview:
    """What a step predicted some images to become.

    Attributes:
        step: from 1 to ``steps``.
        steps: of each of these images.
        timestep: the training timestep that the step started from, or what else the network was told there.
        images: their places in the request.
        x0: float32 [k, C, h, w] on the host, the predictions; every so many pixels of them.
    """

    step: int
    steps: int
    timestep: int | float
    images: tuple[int, ...]
    x0: torch.Tensor

    @classmethod
    def of_event(cls, event: Event) -> Preview:
        """The preview of an event, whose larger tensors it does not hold; of latents, their first three channels."""
        stride, channels = math.ceil(max(event.x0.shape[2:]) / _LONGER_SIDE), event.x0.shape[1]
        shown = channels if channels in (1, 3) else 3 if channels > 3 else 1
        small = event.x0[:, :shown, ::stride, ::stride].clone(memory_format=torch.contiguous_format)
        return cls(event.step + 1, event.steps, event.timestep, event.images, small)

    def without(self, images: set[int]) -> Preview | None:
        """The preview of those that are not among ``images``; None if there are none."""
        kept = [i for i, image in enumerate(self.images) if image not in images]
        if len(kept) == len(self.images):
            return self
        return replace(self, images=tuple(self.images[i] for i in kept), x0=self.x0[kept]) if kept else None


class PreviewBuffer:
    """Previews that one thread puts in and another takes out.

    While they are small together, all are kept. Beyond that only the latest of each image is, so that a reader who
    reads nothing costs no more, and one who is slow sees how far the images are now.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._previews: deque[Preview] = deque()
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Bytes of all previews that wait."""
        return sum(preview.x0.nbytes for preview in self._previews)

    def put(self, event: Event) -> None:
        """Let the preview of an event wait."""
        self.put_preview(Preview.of_event(event))

    def put_preview(self, preview: Preview) -> None:
        """Let a preview wait."""
        with self._lock:
            if self._closed:
                return
            self._previews.append(preview)
            if self.nbytes > _BYTES_KEPT:
                self._keep_latest()

    def take(self) -> Preview | None:
        """The oldest preview that waits; None if there is none."""
        with self._lock:
            return self._previews.popleft() if self._previews else None

    def close(self) -> None:
        """Forget all previews, and those that still come."""
        with self._lock:
            self._closed = True
            self._previews.clear()

    def _keep_latest(self) -> None:
        seen: set[int] = set()
        latest: deque[Preview] = deque()
        for preview in reversed(self._previews):
            if (kept := preview.without(seen)) is not None:
                latest.appendleft(kept)
                seen.update(kept.images)
        self._previews = latest
