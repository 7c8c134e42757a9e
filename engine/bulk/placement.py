"""Where the units are made: devices of this machine, one rank of a launcher, or a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Self

from stepfusion.bulk.checkpoint import Checkpoint
from stepfusion.bulk.local import make_here, make_in_processes
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.ray_data import make_with_ray
from stepfusion.bulk.worker import WorkerConfig


@dataclass(frozen=True)
class Placement:
    """Which machines and devices make the units.

    Attributes:
        devices: one process each; one device alone runs in this process. "auto" is the device that the worker's
            execution options name.
        rank, world: this process and their number, if a launcher such as ``torchrun`` started several: each makes
            every ``world``-th unit, into a manifest of its own, and whoever ends last checks all.
        ray: address of a Ray cluster; ``workers`` actors make the units then, each on ``devices[0]``.
    """

    devices: tuple[str, ...] = ("auto",)
    rank: int = 0
    world: int = 1
    ray: str | None = None
    workers: int | None = None

    def make(
        self, config: WorkerConfig, units: list[int], checkpoint: Checkpoint | None = None
    ) -> Generator[Record, None, None]:
        """Make the units; yields the records of finished ones.

        ``checkpoint`` is the model, if this process has read it; other processes read it themselves.
        """
        if self.ray is not None:
            return make_with_ray(config, self.ray, self.workers, self.devices[0], units)
        if len(self.devices) == 1:
            return make_here(config.on(self.devices[0]), units, checkpoint)
        return make_in_processes(config, self.devices, units)

    def mine(self, unit: int) -> bool:
        """Whether this process makes the unit."""
        return unit % self.world == self.rank


@dataclass(frozen=True)
class Launch:
    """What a launcher such as ``torchrun`` says to each process that it starts.

    Attributes:
        rank, world: the process and their number, on all machines.
        local_rank, local_world: the same on this machine.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """What RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say; None for a process that is alone."""
        rank, world, local = (environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if rank is None or world is None or local is None or world == "1":
            return None
        return cls(int(rank), int(world), int(local), int(environment.get("LOCAL_WORLD_SIZE", "1")))
