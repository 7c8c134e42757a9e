"""Runners that nobody has: lent to one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from stepfusion.execution.streams import Reached
from stepfusion.lanes.runner import Runner, RunnerKey


@dataclass(frozen=True)
class _Idle:
    """A runner that nobody has, and the end of what was launched on it."""

    key: RunnerKey
    runner: Runner
    reached: Reached | None  # None on a device without streams


class RunnerPool:
    """Idle runners by what they are made for: a request borrows one, requests of other threads get their own.

    At most ``keep`` runners stay idle; the one that was idle longest goes first.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []

    @property
    def idle(self) -> list[Runner]:
        """The idle runners, the one that was idle longest first."""
        with self._lock:
            return [idle.runner for idle in self._idle]

    def take(self, key: RunnerKey, make: Callable[[RunnerKey], Runner]) -> Runner:
        """An idle runner with this key, or a new one."""
        found = self._find(key)
        if found is None:
            return make(key)
        if found.reached is not None:
            # Its last user may have launched on another stream, and its launches may still be under way.
            found.reached.wait(found.runner.buffers)
        return found.runner

    def give(self, key: RunnerKey, runner: Runner) -> None:
        """Bring a runner back, its lanes in whatever state."""
        runner.park()
        idle = _Idle(key, runner, runner.reached())
        with self._lock:
            self._idle.append(idle)
            del self._idle[: -self._keep]

    def clear(self) -> None:
        """Drop every idle runner, and the memory it holds."""
        with self._lock:
            self._idle.clear()

    def _find(self, key: RunnerKey) -> _Idle | None:
        with self._lock:
            for position in reversed(range(len(self._idle))):
                if self._idle[position].key == key:
                    return self._idle.pop(position)
        return None
