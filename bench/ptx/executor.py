"""Launches of the real launchers, executed on the CPU tensors that they were given.

The launchers run as they are; Triton compiles for the target as it would on a machine with that GPU, and what it
would launch is interpreted. Tensors that a launcher allocates are known to be empty until a kernel writes them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from stepfusion.bench.offline import TARGETS, Launch, offline
from stepfusion.bench.ptx.coverage import Coverage
from stepfusion.bench.ptx.launch import Execution, Options, execute
from stepfusion.bench.ptx.memory import FRESH, OUTSIDE, WRITTEN, Extent, GlobalMemory
from stepfusion.bench.ptx.program import parse
from stepfusion.bench.ptx.races import races
from stepfusion.bench.ptx.types import Array, Fault

#: Targets whose code is PTX.
NVIDIA = tuple(name for name, (backend, *_) in TARGETS.items() if backend == "cuda")
#: Parameters of kernels in which threads write and read without an order, and why nothing comes of it: every thread
#: that finds a lane's flag unset writes the same row, and one that finds it set leaves it.
_MEANT_TO_RACE = ("flag_ptr",)


class Executor:
    """Executes launches, in several orders of warps if asked, and notes what they reached.

    Args:
        target: one of :data:`NVIDIA`. orders: of :data:`stepfusion.bench.ptx.machine.ORDERS`; what a launch writes
            must be the same in each. check_races: look for accesses that nothing orders. edit: changes the PTX before
            it runs. worst: approximate instructions err by all that PTX allows.

    Attributes:
        case: a name for what is being run, kept with the programs it compiles. launches, elements: by kernel; the
            elements are those of a launch's largest tensor. programs: what was executed, by the kernel's name and a
            digest of its text.
    """

    def __init__(
        self,
        target: str = "sm_90",
        *,
        orders: Sequence[str] = ("together",),
        check_races: bool = False,
        edit: Callable[[str], str] | None = None,
        worst: bool = True,
    ) -> None:
        if target not in NVIDIA:
            raise ValueError(f"target must be one of {', '.join(NVIDIA)}, whose code is PTX, got {target!r}")
        self.target, self.case = target, ""
        self.launches, self.elements = Counter[str](), Counter[str]()
        self.programs: dict[tuple[str, str], Coverage] = {}
        self._orders, self._check_races, self._edit, self._worst = tuple(orders), check_races, edit, worst
        self._fresh = _FreshMemory()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, kernels run on CPU tensors. Nothing else should: a tensor made here counts as empty.

        Raises:
            Fault: a launch did what a GPU would trap on or leave undefined, or depends on the order of its warps.
        """
        try:
            with offline(self.target, self._launch), self._fresh.noticed():
                yield
        finally:
            self._fresh.forget()

    def _launch(self, launch: Launch) -> None:
        values, extents = self._arguments(launch)
        text = launch.kernel.asm["ptx"]
        text = text if self._edit is None else self._edit(text)
        values += [0] * _scratch_pointers(text, values)
        memory = GlobalMemory(list(extents.values()))
        try:
            execution = self._execute(text, launch, values, memory, extents)
        except Fault as error:
            raise Fault(f"{launch.name} on {self.target}: {error}") from error
        self._fresh.update(memory, extents.values())
        self._note(launch, text, execution)

    def _arguments(self, launch: Launch) -> tuple[list[Any], dict[str, Extent]]:
        """The values of the kernel's parameters, and the memory of those that are tensors."""
        values, extents = [], {}
        for name, kind in launch.kernel.src.signature.items():
            if kind == "constexpr":
                continue
            value = launch.arguments[name]
            if isinstance(value, torch.Tensor):
                extents[name] = self._fresh.extent(value)
                value = value.data_ptr()
            values.append(value)
        return values, extents

    def _execute(
        self, text: str, launch: Launch, values: list[Any], memory: GlobalMemory, extents: dict[str, Extent]
    ) -> Execution:
        ignored = [(e.address, e.size) for name, e in extents.items() if name in _MEANT_TO_RACE]
        shared = launch.kernel.metadata.shared
        before = memory.snapshot() if len(self._orders) > 1 else []
        after = None
        for order in self._orders:
            if after is not None:
                memory.restore(before)
            options = Options(order, self._worst, [] if self._check_races and after is None else None)
            execution = execute(text, launch.grid, values, memory, shared, options)
            if options.log is not None and (found := races(options.log, ignored)):
                space, lines = next(iter(found))
                raise Fault(f"{sum(found.values())} bytes of races, first in {space} memory: {', '.join(lines)}")
            if len(self._orders) > 1:
                after = _compared(after, memory, order)
        return execution

    def _note(self, launch: Launch, text: str, execution: Execution) -> None:
        tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        self.launches[launch.name] += 1
        self.elements[launch.name] += max((tensor.numel() for tensor in tensors), default=0)
        key = (launch.name, hashlib.sha256(text.encode()).hexdigest())
        if key in self.programs:
            self.programs[key].add(execution)
        else:
            self.programs[key] = Coverage.of(launch.name, self.target, self.case, execution)


def _scratch_pointers(text: str, values: Sequence[Any]) -> int:
    """How many pointers Triton adds for scratch memory, which our kernels do not use: an access to 0 is a fault."""
    added = parse(text).parameters[len(values) :]
    if any(kind not in ("u64", "b64") for _, kind in added):
        raise Fault(f"parameters that no argument is known for: {added}")
    return len(added)


def _compared(
    first: list[tuple[Array, Array | None]] | None, memory: GlobalMemory, order: str
) -> list[tuple[Array, Array | None]]:
    """What the first order left in memory; another order must leave the same."""
    now = memory.snapshot()
    if first is None:
        return now
    differ = sum(int((a != b).sum()) for (a, _), (b, _) in zip(first, now, strict=True))
    if differ:
        raise Fault(f"{differ} bytes are other ones if the order of the warps is '{order}'")
    return first


class _FreshMemory:
    """Storages that a launcher allocated, and which of their bytes a kernel has written."""

    def __init__(self) -> None:
        self._states: dict[int, Array] = {}  # address of a storage -> a state for each byte
        self._alive: list[torch.Tensor] = []  # so that no address is given out twice

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Inside, ``torch.empty``, ``empty_like`` and ``new_empty`` make memory that is known to be empty."""

        def noticing(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
                tensor = make(*args, **kwargs)
                storage = tensor.untyped_storage()
                if tensor.device.type == "cpu" and storage.nbytes():
                    self._alive.append(tensor)
                    self._states[storage.data_ptr()] = np.full(storage.nbytes(), FRESH, np.uint8)
                return tensor

            return empty

        with (
            mock.patch.object(torch, "empty", noticing(torch.empty)),
            mock.patch.object(torch, "empty_like", noticing(torch.empty_like)),
            mock.patch.object(torch.Tensor, "new_empty", noticing(torch.Tensor.new_empty)),
        ):
            yield

    def forget(self) -> None:
        """Let go of all of them."""
        self._states.clear()
        self._alive.clear()

    def extent(self, tensor: torch.Tensor) -> Extent:
        """The memory from a tensor's first element to its last, without what lies between its elements."""
        if tensor.numel() == 0:
            return Extent(tensor.data_ptr(), 0)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = (sum((n - 1) * stride for n, stride in steps) + 1) * tensor.element_size()
        address = tensor.data_ptr()
        storage = tensor.untyped_storage().data_ptr()
        states = None
        if storage in self._states:
            states = self._states[storage][address - storage :][:size]
        if size != tensor.numel() * tensor.element_size():
            everywhere = np.full(size, WRITTEN, np.uint8) if states is None else states
            states = np.where(_elements(tensor, size), everywhere, OUTSIDE).astype(np.uint8)
        return Extent(address, size, states)

    def update(self, memory: GlobalMemory, extents: Iterable[Extent]) -> None:
        """Note what a launch has written."""
        for extent in extents:
            for storage, states in self._states.items():
                if storage <= extent.address < storage + len(states):
                    part = states[extent.address - storage :][: extent.size]
                    np.maximum(part, memory.states(extent.address, extent.size), out=part)


def _elements(tensor: torch.Tensor, size: int) -> Array:
    """Which of the ``size`` bytes from the first element on belong to an element."""
    covered, width = np.zeros(size, bool), tensor.element_size()
    strides = (*(stride * width for stride in tensor.stride()), 1)
    np.lib.stride_tricks.as_strided(covered, (*tensor.shape, width), strides)[...] = True
    return covered
