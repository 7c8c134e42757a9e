"""A model small enough to be served in a test, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import stepfusion as sf
from stepfusion.serving import AsyncEngine

NAMES = ("Cat", "Dog", "Owl")
NAN_LABEL, NULL_LABEL = 2, 3
JSON = {"Content-Type": "application/json"}


class Gate:
    """A network that holds every evaluation while it is shut. ``Owl`` breaks an image."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.opened.set()

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert self.opened.wait(60)
        out = 0.1 * x + 0.01 * labels.view(-1, 1, 1, 1)
        return torch.where((labels == NAN_LABEL).view(-1, 1, 1, 1), torch.nan, out)


def gated_engine(shape: tuple[int, int, int] = (1, 8, 8), **arguments: Any) -> tuple[Gate, sf.Engine]:
    """An invariant engine of four lanes, and the gate in it."""
    gate = Gate()
    given = {"num_classes": 4, "null_label": NULL_LABEL, "class_names": NAMES, "batch": 4, "invariant": True}
    schedule = sf.NoiseSchedule.linear(100)
    return gate, sf.Engine(gate, schedule, shape=shape, device="cpu", **{**given, **arguments})


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for it; AssertionError where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def idle(service: AsyncEngine) -> bool:
    """Whether no lane is taken and nothing waits."""
    status = service.status
    return status.busy == 0 and status.waiting == 0


@dataclass(frozen=True)
class Served:
    """A server in a process of its own: what was started, and where it answers."""

    process: subprocess.Popen[str]
    url: str


@contextmanager
def served(*arguments: str, under: tuple[str, ...] = ()) -> Iterator[Served]:
    """``stepfusion serve`` with these arguments; ``under``: a command that starts it. Killed at the end."""
    command = [*under, sys.executable, "-P", "-m", "stepfusion", "serve", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        command, env={**env, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at http://" in line, line
            yield Served(process, line.split()[-1])
        finally:
            process.kill()
