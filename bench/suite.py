"""All parts, one process each, so that none takes the others with it: not by an error, a crash, or a hang.

What a part measured before it failed or ran out of time is kept. A part that is done is not measured again.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from stepfusion.bench.report import read, replace_part, write
from stepfusion.bench.rows import End, Record, Row, from_line, latest

#: Seconds that a part may take on a GPU; together less than ten minutes.
LIMITS = {
    "kernels": 120.0,
    "latency": 140.0,
    "throughput": 120.0,
    "compare": 80.0,
    "exports": 60.0,
    "headline": 40.0,
    "host": 30.0,
}
CPU_FACTOR = 15.0  # loops that a GPU runs in a second take minutes there
_GRACE = 5.0  # seconds between asking a process to stop and making it

Command = Callable[[str], Sequence[str]]


def run_suite(
    folder: Path, parts: Sequence[str], command: Command, limits: dict[str, float], *, force: bool = False
) -> list[End]:
    """Measure the parts that are not done yet, and write the report after each.

    Args:
        folder: of the results. command: what measures a part and prints its records, a line each.
        limits: seconds, by part. force: measure parts that are done, too.

    Returns:
        How each part ended, this time or before.
    """
    records = read(folder)
    for part in parts:
        if not force and any(isinstance(r, End) and r.part == part and r.status == "done" for r in records):
            print(f"{part}: done before", file=sys.stderr, flush=True)
            continue
        print(f"{part}: at most {limits[part]:.0f} s", file=sys.stderr, flush=True)
        measured: list[Record] = []
        started = time.monotonic()
        try:
            measured = run_part(part, command(part), limits[part], measured)
        except (KeyboardInterrupt, SystemExit):
            measured = latest(measured)
            if any(isinstance(record, Row) for record in measured):
                end = End(part, "stopped", time.monotonic() - started, "It was ended before it was done.")
                write(folder, replace_part(records, part, [*measured, end]))
            raise
        records = replace_part(records, part, measured)
        write(folder, records)
    return [record for record in records if isinstance(record, End) and record.part in parts]


def run_part(part: str, command: Sequence[str], limit: float, records: list[Record] | None = None) -> list[Record]:
    """The records that a process prints within ``limit`` seconds, and how it ended.

    ``records`` gets each as it comes: what is known if this is interrupted.
    """
    started = time.monotonic()
    records = [] if records is None else records
    broken: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, encoding="utf-8"
        )
        assert process.stdout is not None
        stopped = True
        try:
            for line in _lines(process.stdout, started + limit):
                try:
                    records.append(from_line(line))
                except ValueError as error:
                    broken.append(str(error))
            process.wait(max(0.1, started + limit - time.monotonic()))
            stopped = False
        except (TimeoutError, subprocess.TimeoutExpired):
            print(f"{part}: stopped at its limit", file=sys.stderr, flush=True)
        finally:
            _end(process)
        errors.seek(0)
        said = errors.read()
    seconds = time.monotonic() - started
    records = latest(records)
    if any(isinstance(record, End) for record in records):
        return records
    if stopped:
        records.append(End(part, "stopped", seconds, f"It was stopped at its limit of {limit:.0f} s."))
    else:
        why = broken[0] if broken else _last_line(said)
        records.append(End(part, "failed", seconds, f"Exit status {process.returncode}: {why}"))
    return records


def _lines(stream: IO[str], deadline: float) -> Iterator[str]:
    """Whole lines as they come, until the stream ends; TimeoutError at the deadline."""
    received: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        with stream:
            for line in stream:
                if line.endswith("\n"):  # what a killed process left of a line is no line
                    received.put(line)
        received.put(None)

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            line = received.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield line


def _end(process: subprocess.Popen[str]) -> None:
    """Stop a process and everything it started; nothing if it has ended."""
    for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
