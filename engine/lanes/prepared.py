"""Conditions as a network's lanes hold them: on its device, in its dtype, and prepared once for many images."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stepfusion.execution.evaluator import Evaluator
from stepfusion.execution.streams import Reached
from stepfusion.lanes.conditions import ConditionSet
from stepfusion.networks.conditioned import ConditionSpec

_KEPT_BYTES = 256 << 20  # of prepared conditions, for requests with the same prompt

#: Shape and dtype of one image's prepared tensors.
Layout = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class _Entry:
    tensors: tuple[Tensor, ...]
    reached: Reached | None  # None on a device without streams


class PreparedConditions:
    """Prepares conditions, one image's at a time, and keeps the latest.

    One at a time, so that the bits of an image do not depend on the conditions beside it.

    Args:
        evaluator, specs, device, dtype: the network, what it is conditioned on, where it runs, and in what.
        kept_bytes: how much of what was prepared is kept; one set is, whatever its size.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        specs: Sequence[ConditionSpec],
        device: torch.device,
        dtype: torch.dtype,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        self._evaluator, self._specs, self._device, self._dtype = evaluator, tuple(specs), device, dtype
        self._limit = kept_bytes
        self._bytes = 0
        self._kept: OrderedDict[tuple[Hashable, ...], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def layout(self) -> Layout:
        """Of what is prepared of one image's conditions, found by preparing zeros."""
        zeros = {s.name: torch.zeros(s.shape, dtype=torch.int64 if s.integer else self._dtype) for s in self._specs}
        return tuple((tuple(one.shape), one.dtype) for one in self._prepare(zeros))

    def of(self, conditions: ConditionSet) -> tuple[Tensor, ...]:
        """The prepared tensors of one image's conditions; nobody may write to them."""
        with self._lock:
            entry = self._kept.get(conditions.key)
            if entry is not None:
                self._kept.move_to_end(conditions.key)
        if entry is None:
            tensors = self._prepare(conditions.load())
            entry = _Entry(tensors, Reached(self._device) if self._device.type == "cuda" else None)
            self._keep(conditions.key, entry)
        elif entry.reached is not None:  # another stream may have prepared them
            entry.reached.wait(entry.tensors)
        return entry.tensors

    def _prepare(self, conditions: dict[str, Tensor]) -> tuple[Tensor, ...]:
        batch = {}
        for spec in self._specs:
            dtype = torch.int64 if spec.integer else self._dtype
            batch[spec.name] = conditions[spec.name].detach().to(self._device, dtype)[None]
        return tuple(one[0] for one in self._evaluator.prepare(batch))

    def _keep(self, key: tuple[Hashable, ...], entry: _Entry) -> None:
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = entry
            self._bytes += _bytes(entry)
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(entry: _Entry) -> int:
    return sum(one.nbytes for one in entry.tensors)
