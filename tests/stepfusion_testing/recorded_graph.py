"""A CUDA graph for machines without one: what was launched during capture is launched again, on the same memory.

It is as strict as the real thing. A replay runs no Python of the body, so that branches, numbers and buffers are
those of the capture; what waits for the device cannot be captured; and a capture must change nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepfusion.execution.cuda_graph import CaptureError, GraphPool

INTERPRETER = threading.RLock()  # Triton's interpreter has global state
WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2")


class RecordedGraph(TorchDispatchMode):
    """The launches of one capture."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nand a second line")
        with INTERPRETER:
            out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not fresh or func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in inputs for t in fresh):
            self._launches.append((func, args, kwargs or {}, fresh))  # anything but a view
        return out

    def replay(self) -> None:
        """Launch everything again; what was allocated in the capture is written in place."""
        self.replays += 1
        for func, args, kwargs, outputs in self._launches:
            with INTERPRETER:
                results = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for output, result in zip(outputs, results, strict=True):
                if output.data_ptr() != result.data_ptr():
                    output.copy_(result)


class Captures:
    """Stands for :func:`stepfusion.execution.cuda_graph.capture`, and remembers what it captured."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []
        self.failure: Callable[[], None] = lambda: None  # called before each capture; may raise
        self._lock = threading.Lock()

    def __call__(
        self, body: Callable[[], None], device: torch.device, pool: GraphPool | None = None
    ) -> RecordedGraph:
        self.failure()
        for _ in range(3):
            body()
        graph = RecordedGraph()
        try:
            with self._lock, graph:
                body()
        except RuntimeError as error:
            raise CaptureError(str(error).split("\n")[0]) from error
        self.graphs.append(graph)
        return graph
