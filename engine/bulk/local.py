"""Units on this machine: in this process, or in one process for each device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from stepfusion.bulk.manifest import Record
from stepfusion.bulk.messages import failure, record_of, success
from stepfusion.bulk.worker import Order, Worker
from stepfusion.errors import BulkError

_PATIENCE = 5.0  # seconds that a process has to end


def make_here(order: Order, device: str, units: Sequence[int]) -> Generator[Record, None, None]:
    """Make the units one after the other on one device, in this process."""
    worker = Worker(order, device)
    for unit in units:
        yield worker.make(unit)


def make_in_processes(order: Order, devices: Sequence[str], units: Sequence[int]) -> Generator[Record, None, None]:
    """Make the units with one process a device; each takes the next when it is done.

    A process that dies is reported on stderr, and its unit goes back to the others.

    Raises:
        BulkError: what went wrong in a process, or that none is left.
    """
    waiting = deque(units)
    crew = [_Member(order, number, device) for number, device in enumerate(devices[: len(units)])]
    try:
        for member in crew:
            member.take(waiting)
        while any(member.unit is not None for member in crew):
            busy = {member.pipe: member for member in crew if member.unit is not None}
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                record = busy[pipe].result()
                if record is None:
                    crew = _without(crew, busy[pipe], waiting)
                else:
                    yield record
                for member in crew:
                    member.take(waiting)
    finally:
        for member in crew:
            member.end()


class _Member:
    """One process, and the unit that it is making."""

    def __init__(self, order: Order, number: int, device: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name = f"worker {number} ({device})"
        self.pipe, theirs = spawn.Pipe()
        self.process: SpawnProcess = spawn.Process(target=_serve, args=(theirs, order, device), daemon=True)
        self.process.start()
        theirs.close()
        self.unit: int | None = None

    def take(self, waiting: deque[int]) -> None:
        """Start the next unit, unless this one is busy or nothing waits."""
        if self.unit is None and waiting:
            self.unit = waiting.popleft()
            with suppress(OSError):  # it died: result() says so
                self.pipe.send_bytes(str(self.unit).encode())

    def result(self) -> Record | None:
        """What the process sent: a finished unit, or None where it died. BulkError where it sent an error."""
        try:
            answer = self.pipe.recv_bytes()
        except (EOFError, OSError):
            return None
        record = record_of(answer, self.name)
        self.unit = None
        return record

    def end(self) -> None:
        """Let an idle process go, and stop a busy one."""
        self.pipe.close()
        if self.unit is not None:
            self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _without(crew: list[_Member], dead: _Member, waiting: deque[int]) -> list[_Member]:
    """The crew without a member that died, whose unit goes back to the others."""
    assert dead.unit is not None
    unit = dead.unit
    dead.end()
    code = dead.process.exitcode or 0
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    rest = [member for member in crew if member is not dead]
    if not rest:
        raise BulkError(f"{dead.name} {how} in unit {unit}, and no other worker is left")
    waiting.appendleft(unit)
    print(f"stepfusion: {dead.name} {how}; its unit {unit} goes to the others", file=sys.stderr)
    return rest


def _serve(pipe: Connection, order: Order, device: str) -> None:
    """The life of a process: make the units that come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the first process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = Worker(order, device)
        while True:
            try:
                unit = int(pipe.recv_bytes())
            except EOFError:
                return
            pipe.send_bytes(success(worker.make(unit)).encode())
    except Exception as error:
        pipe.send_bytes(failure(error).encode())


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
