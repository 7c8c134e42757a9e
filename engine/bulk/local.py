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

from stepfusion.bulk.checkpoint import Checkpoint
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.messages import failure_message, finished_message, read_message
from stepfusion.bulk.worker import Worker, WorkerConfig
from stepfusion.errors import BulkError

_PATIENCE = 5.0  # seconds that a process has to end


def make_here(
    config: WorkerConfig, units: Sequence[int], checkpoint: Checkpoint | None = None
) -> Generator[Record, None, None]:
    """Make the units one after the other in this process, with a checkpoint that it has read, if it has."""
    worker = Worker(config, checkpoint)
    for unit in units:
        yield worker.make(unit)


def make_in_processes(
    config: WorkerConfig, devices: Sequence[str], units: Sequence[int]
) -> Generator[Record, None, None]:
    """Make the units with one process a device; each takes the next when it is done.

    A process that dies is reported on stderr, and its unit goes back to the others.

    Raises:
        BulkError: what went wrong in a process, or that none is left.
    """
    waiting = deque(units)
    workers = [_WorkerProcess(config, number, device) for number, device in enumerate(devices[: len(units)])]
    try:
        for worker in workers:
            worker.take(waiting)
        while any(worker.unit is not None for worker in workers):
            busy = {worker.pipe: worker for worker in workers if worker.unit is not None}
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                record = busy[pipe].result()
                if record is None:
                    workers = _without(workers, busy[pipe], waiting)
                else:
                    yield record
                for worker in workers:
                    worker.take(waiting)
    finally:
        for worker in workers:
            worker.end()


class _WorkerProcess:
    """One process, and the unit that it is making."""

    def __init__(self, config: WorkerConfig, number: int, device: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name = f"worker {number} ({device})"
        self.pipe, theirs = spawn.Pipe()
        self.process: SpawnProcess = spawn.Process(target=_serve, args=(theirs, config.on(device)), daemon=True)
        self.process.start()
        theirs.close()
        self.unit: int | None = None

    def take(self, waiting: deque[int]) -> None:
        """Start the next unit, unless this process is busy or nothing waits."""
        if self.unit is None and waiting:
            self.unit = waiting.popleft()
            with suppress(OSError):  # it died: result() says so
                self.pipe.send_bytes(str(self.unit).encode())

    def result(self) -> Record | None:
        """The unit that the process finished; None if it died. BulkError if it sent an error."""
        try:
            message = self.pipe.recv_bytes()
        except (EOFError, OSError):
            return None
        record = read_message(message, self.name)
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


def _without(workers: list[_WorkerProcess], dead: _WorkerProcess, waiting: deque[int]) -> list[_WorkerProcess]:
    """The workers without one that died, whose unit goes back to the others."""
    assert dead.unit is not None
    unit = dead.unit
    dead.end()
    code = dead.process.exitcode or 0
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    rest = [worker for worker in workers if worker is not dead]
    if not rest:
        raise BulkError(f"{dead.name} {how} in unit {unit}, and no other worker is left")
    waiting.appendleft(unit)
    print(f"stepfusion: {dead.name} {how}; its unit {unit} goes to the others", file=sys.stderr)
    return rest


def _serve(pipe: Connection, config: WorkerConfig) -> None:
    """The life of a process: make the units that come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the first process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = Worker(config)
        while True:
            try:
                unit = int(pipe.recv_bytes())
            except EOFError:
                return
            pipe.send_bytes(finished_message(worker.make(unit)).encode())
    except Exception as error:
        pipe.send_bytes(failure_message(error).encode())


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
