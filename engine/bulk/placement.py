"""Where the units are made: devices of this machine, one rank of a launcher, or a Ray cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Self

from stepfusion import _checks
from stepfusion.bulk.checkpoint import Checkpoint
from stepfusion.bulk.local import make_here, make_in_processes
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.ray_data import make_with_ray
from stepfusion.bulk.worker import WorkerConfig

MOST_WORKERS = 1 << 16

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_INTEGER = re.compile(r"-?\d{1,9}", re.ASCII)


@dataclass(frozen=True)
class Placement:
    """Which machines and devices make the units.

    Attributes:
        devices: one process each; one device alone runs in this process. "auto" is the device that the worker's
            execution options name.
        rank, world: this process and their number, if a launcher such as ``torchrun`` started several: each makes
            every ``world``-th unit, into a manifest of its own, and whoever ends last checks all.
        ray: address of a Ray cluster; ``workers`` actors make the units then, each on ``devices[0]``.

    Raises:
        TypeError, ValueError: naming the field.
    """

    devices: tuple[str, ...] = ("auto",)
    rank: int = 0
    world: int = 1
    ray: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        devices = self.devices
        if isinstance(devices, str) or not devices or not all(isinstance(name, str) and name for name in devices):
            raise ValueError(f"devices must be a sequence of names of devices, got {devices!r}")
        _checks.integer("world", self.world, 1, MOST_WORKERS)
        _checks.integer("rank", self.rank, 0, self.world - 1)
        if self.workers is not None:
            _checks.integer("workers", self.workers, 1, MOST_WORKERS)
        if self.ray is not None and (not self.ray or len(devices) > 1 or self.world > 1):
            raise ValueError(
                f"ray must be the address of a cluster, with one kind of device and one process; got {self.ray!r}, "
                f"{len(devices)} devices and {self.world} processes"
            )

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
        """What RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say; None for a process that is alone.

        Raises:
            ValueError: one of them is missing, is no number, or does not fit another.
        """
        if environment.get("WORLD_SIZE", "1") == "1" and environment.get("RANK", "0") == "0":
            return None
        world = _number(environment, "WORLD_SIZE", 1, MOST_WORKERS)
        rank = _number(environment, "RANK", 0, world - 1)
        told = "LOCAL_WORLD_SIZE" in environment
        local_world = _number(environment, "LOCAL_WORLD_SIZE", 1, world) if told else 1
        local_rank = _number(environment, "LOCAL_RANK", 0, (local_world if told else world) - 1)
        return cls(rank, world, local_rank, local_world)


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    """An integer in [low, high] of the environment."""
    text = environment.get(name)
    if text is None:
        raise ValueError(f"{name} is not set: a launcher sets {', '.join(_LAUNCHED)} together")
    if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {text!r}")
    return int(text)
