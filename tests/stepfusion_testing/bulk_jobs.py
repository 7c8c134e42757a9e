"""Runs of ``stepfusion generate`` for tests: in this process, in one that can be killed, and what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from stepfusion.bulk import WorkerConfig, local
from stepfusion.commands.main import main

TINY = "generate model --num 22 --unit 8 --steps 2 --batch 4 --threads 1 --quiet"  # units of 8, 8 and 6


def generate(arguments: str, status: int = 0, extra: Sequence[str] = ()) -> None:
    """Run a command, with ``extra`` arguments as they are, in this process; it must end with this status."""
    given = main([*arguments.split(), *extra])
    assert given == status, given


def tree(out: Path | str = "out") -> dict[str, bytes]:
    """Every byte that a job leaves, but for its report, which has times, and its locks."""
    out = Path(out)
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "report.json")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in files
        if not path.name.startswith((".lock", ".finish"))
    }


def finished(out: Path | str = "out") -> int:
    """How many lines the manifest has."""
    path = Path(out) / "manifest.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begun_by_another_version(out: Path | str = "out") -> None:
    """Let the job in a directory have been begun by another version of this package."""
    path = Path(out, "engine.json")
    settings = json.loads(path.read_text())
    settings["versions"]["stepfusion"] = "0.0.9"
    path.write_text(json.dumps(settings))


def start(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call a function in a process of its own, which is there in milliseconds: its parent has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stepfusion_testing.bulk_warm", "stepfusion_testing.bulk_jobs"])
    path = os.environ.get("PYTHONPATH")
    tests = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (tests, path)))  # for the preloading
    try:
        process = context.Process(target=function, args=arguments)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return process


def run_in(folder: str, arguments: str) -> None:
    """The body of a process: the command in a folder; ends with its status."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.exit(main(arguments.split()))


def die_at(folder: str, arguments: str, call: int) -> None:
    """The body of a process that runs a command and kills itself before the ``call``-th change of the file system."""
    count = 0

    def count_down(event: str, given: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            if str(given[0]).startswith(("/dev/", "/proc/")):
                return
            count += 1
            if count == call:
                os._exit(9)

    sys.addaudithook(count_down)
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        count_down("os.rename", ("fsync",))
        fsync(descriptor)

    os.fsync = synced
    run_in(folder, arguments)


def count_reads(of: str) -> list[str]:
    """From now on, whatever this process opens under such a name is entered into the list."""
    opened: list[str] = []

    def note(event: str, given: tuple[object, ...]) -> None:
        if event == "open" and str(given[0]).endswith(of):
            opened.append(str(given[0]))

    sys.addaudithook(note)
    return opened


def run_counting_reads(folder: str, arguments: str, of: str) -> None:
    """The body of a process that runs a command, and writes how often it opened a file into ``reads-PID``."""
    opened = count_reads(of)
    try:
        run_in(folder, arguments)
    finally:
        Path(folder, f"reads-{os.getpid()}").write_text(str(len(opened)))


_serve = local._serve


def serve_counting_reads(pipe: Connection, config: WorkerConfig) -> None:
    """The life of a worker's process, which writes how often it opened the model's config into ``reads-PID``."""
    opened = count_reads("unet/config.json")
    try:
        _serve(pipe, config)
    finally:
        Path(config.out.parent, f"reads-{os.getpid()}").write_text(str(len(opened)))


def run_ranked(folder: str, arguments: str, rank: int) -> None:
    """The body of a process as ``torchrun`` would start it: one of three ranks."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
    run_in(folder, arguments)


def run_limited(folder: str, arguments: str) -> None:
    """The body of a process whose files may have 4,000 bytes; what it says goes into the file ``error``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    with open(Path(folder, "error"), "w", buffering=1) as sys.stderr:
        run_in(folder, arguments)
