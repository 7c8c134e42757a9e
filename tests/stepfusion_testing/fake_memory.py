"""A CPU whose tensors are counted, so that it runs out of memory as a GPU does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepfusion.lanes import runners


class FakeMemory(TorchDispatchMode):
    """While it is on, ``used`` counts the bytes of tensors that were made and are alive, and ``peak`` their most.

    torch.OutOfMemoryError if they are more than ``limit``, with which it behaves as a device with so much memory.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit, self.used, self.peak = limit, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and not any(value is given for given in args):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := id(storage)) in self._known:
            return
        self._known.add(key)
        self.used += storage.nbytes()
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._freed, key, storage.nbytes())
        if self.limit is not None and self.used > self.limit:
            raise torch.OutOfMemoryError(f"{self.used} bytes are in use, and there are {self.limit}")

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.used -= size

    def peak_bytes(self, run: Callable[[], object], _: torch.device) -> int:
        """What ``run()`` needs at its peak, above what is used before it."""
        self.peak = before = self.used
        run()
        return self.peak - before

    def decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have engines on the CPU find their batch by what is free here, as those on a GPU do."""
        monkeypatch.setattr(runners, "default_batch", lambda options, device: options.batch)
        monkeypatch.setattr(runners, "peak_bytes", self.peak_bytes)
        monkeypatch.setattr(runners, "free_bytes", lambda _: (self.limit or 0) - self.used)
