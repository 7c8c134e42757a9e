"""Tables on a device, several at a time, in buffers that stay where they are.

Lanes of one batch walk different tables, captured ticks read all of them by address, and requests bring new ones
while lanes run. So a table gets a range of consecutive rows, for as long as somebody holds it and, beyond that, until
the room is needed: the one that was held longest ago goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stepfusion.execution.cuda_graph import GraphPool
from stepfusion.execution.evaluator import Evaluator
from stepfusion.kernels import COLUMNS, PARKED
from stepfusion.samplers.table import StepTable


@dataclass
class _Place:
    """The rows of one table, and how many hold it."""

    first: int
    rows: int
    holders: int = 0


class DeviceTables:
    """Room for the rows of tables: what a tick reads of them.

    ``coefficients`` float32 [R, 21], ``timesteps`` and ``next_row`` int64 [R], ``reuses`` bool [R], ``features``
    [R, ...] of the network, and if asked for ``transitions`` float64 [R, 2].
    The last row is no table's: parked lanes, whose row is -1, read it.

    Args:
        evaluator: the network, whose features are computed once for each row that is placed.
        rows: of all tables together; :meth:`grow` makes more.
        transitions: keep what log-probabilities of steps need as well.
    """

    def __init__(self, evaluator: Evaluator, device: torch.device, rows: int, *, transitions: bool = False) -> None:
        self._evaluator, self._device = evaluator, device
        self.transitions = torch.zeros((0, 2), dtype=torch.float64, device=device) if transitions else None
        self._places: dict[bytes, _Place] = {}  # in the order in which they were last held
        self.grow(rows)

    @property
    def capacity(self) -> int:
        """How many rows there are for tables."""
        return len(self.timesteps) - 1

    @cached_property
    def graph_pool(self) -> GraphPool:
        """The memory of captured ticks that walk these tables.

        One thread moves all lanes that walk them, so that no two of these ticks run at the same time.
        """
        return GraphPool()

    @property
    def features(self) -> Tensor:
        """What the network makes of what it is told at each row, [R, ...]."""
        if self._features is None:
            self._allocate(self._evaluator.features(self.timesteps[:1].to(self._evaluator.told)))
        assert self._features is not None
        return self._features

    @property
    def buffers(self) -> list[Tensor]:
        """Every tensor that a tick reads of them."""
        features = () if self._features is None else (self._features,)
        transitions = () if self.transitions is None else (self.transitions,)
        return [self.coefficients, self.timesteps, self.next_row, self.reuses, *features, *transitions]

    @property
    def held(self) -> int:
        """How many tables somebody holds."""
        return sum(place.holders > 0 for place in self._places.values())

    def grow(self, rows: int) -> None:
        """Make new buffers for at least so many rows, and forget every table; nobody must be walking one."""
        # One row more than asked for, rounded up: the last row stays free for parked lanes.
        size = 1 << rows.bit_length()
        self._places.clear()
        self.coefficients = torch.zeros((size, len(COLUMNS)), dtype=torch.float32, device=self._device)
        self.timesteps = torch.zeros(size, dtype=torch.int64, device=self._device)
        self.next_row = torch.full_like(self.timesteps, PARKED)
        self.reuses = torch.zeros(size, dtype=torch.bool, device=self._device)
        if self.transitions is not None:
            self.transitions = self.transitions.new_zeros((size, 2))
        self._features: Tensor | None = None  # their shape is not known before the network is asked

    def hold(self, table: StepTable) -> int | None:
        """The first row of ``table``, which stays there until it is released; None if there is no room now."""
        place = self._places.pop(table.digest, None)
        if place is None:
            first = self._make_room(len(table))
            if first is None:
                return None
            place = _Place(first, len(table))
            self._write(table, first)
        place.holders += 1
        self._places[table.digest] = place
        return place.first

    def release(self, table: StepTable) -> None:
        """Let go of a table that was held."""
        self._places[table.digest].holders -= 1

    def release_all(self) -> None:
        """Let go of every table."""
        for place in self._places.values():
            place.holders = 0

    def _make_room(self, rows: int) -> int | None:
        """Where so many rows fit, once enough tables that nobody holds are gone; None if they never do."""
        if rows > self.capacity:
            return None
        idle = [digest for digest, place in self._places.items() if place.holders == 0]
        while (first := self._gap(rows)) is None:
            if not idle:
                return None
            del self._places[idle.pop(0)]
        return first

    def _gap(self, rows: int) -> int | None:
        first = 0
        for place in sorted(self._places.values(), key=lambda place: place.first):
            if place.first - first >= rows:
                return first
            first = place.first + place.rows
        return first if self.capacity - first >= rows else None

    def _write(self, table: StepTable, first: int) -> None:
        values, where = table.on(self._device), slice(first, first + len(table))
        self.coefficients[where] = values.coefficients
        self.timesteps[where] = values.timesteps
        self.next_row[where] = torch.where(values.next_row == PARKED, PARKED, values.next_row + first)
        self.reuses[where] = False if table.reuses is None else torch.from_numpy(table.reuses.copy()).to(self._device)
        if self.transitions is not None:
            self.transitions[where] = table.transitions.to(self._device)
        # Here, once for each row: of the 356 operators of the CIFAR-10 UNet some 55 depend on the timestep alone.
        features = self._evaluator.features(values.told)
        if self._features is None:
            self._allocate(features)
        self.features[where] = features

    def _allocate(self, like: Tensor) -> None:
        self._features = like.new_zeros((len(self.timesteps), *like.shape[1:]))
