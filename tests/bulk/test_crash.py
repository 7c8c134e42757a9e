"""Processes that die at any moment: what they leave goes on, and becomes the bytes of a run that nobody stopped."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepfusion import bulk
from stepfusion.bulk.manifest import Manifest
from stepfusion.errors import BulkError
from stepfusion.files import atomic as files
from stepfusion_testing.bulk_jobs import (
    TINY,
    begun_by_another_version,
    die_at,
    finished,
    generate,
    run_in,
    run_limited,
    run_ranked,
    start,
    tree,
)

SMALL = "generate model --num 4 --unit 2 --steps 1 --batch 2 --threads 1 --quiet --npz --out"
MANY = "generate model --num 120 --unit 4 --steps 2 --batch 4 --threads 1 --quiet --format npz --out"


def wait_for(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def temporary() -> list[str]:
    """Half-written files in the directory ``out``."""
    return [path.name for path in Path("out").rglob(".*.tmp")]


@pytest.mark.parametrize(
    ("form", "stride"),
    [
        *(("webdataset", 3), ("png", 5)),
        *(pytest.param(form, 1, marks=pytest.mark.soak) for form in ("webdataset", "png")),
    ],
)
def test_dying_before_any_change_of_the_file_system(place: Path, form: str, stride: int) -> None:
    """Every single write, rename, link and fsync of a small job, or every third, or fifth."""
    command = f"{SMALL} out --format {form}"
    generate(f"{SMALL} whole --format {form}")
    whole = tree("whole")
    call, died = 1, 0
    while True:
        process = start(die_at, str(place), command, call)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        died += 1
        generate(command)
        assert tree("out") == whole, call
        assert temporary() == [], call
        subprocess.run(["rm", "-r", "out"], check=True)
        call += stride
    assert died * stride > 30


def killed_after(units: int, seconds: float, place: Path, command: str) -> None:
    """Run a command, and kill it so long after so many units are finished; it must not have ended before."""
    process = start(run_in, str(place), command)
    wait_for(lambda: finished() >= units or not process.is_alive(), 300)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_at_random_moments(place: Path) -> None:
    generate(f"{MANY} whole")
    moments = random.Random(6)
    for units in sorted(moments.sample(range(28), 8)):
        killed_after(units, moments.uniform(0, 0.03), place, f"{MANY} out")
    assert finished() < 30
    generate(f"{MANY} out")
    assert tree("out") == tree("whole")
    assert temporary() == []


@pytest.mark.soak
def test_two_thousand_bundled_images_killed_twenty_times(place: Path) -> None:
    command = "generate fashion-mnist --num 2000 --unit 50 --steps 1 --threads 1 --quiet --npz --out"
    generate(f"{command} whole")
    moments = random.Random(2000)
    for units in sorted(moments.sample(range(40), 20)):
        killed_after(units, moments.uniform(0, 0.6), place, f"{command} out")
    generate(f"{command} out")
    assert tree("out") == tree("whole")


def test_the_comparison_notices_one_other_bit() -> None:
    """The control of the tests above: an image of another seed is another tree."""
    generate(f"{SMALL} a")
    generate(f"{SMALL} b --seed 1")
    a, b = tree("a"), tree("b")
    assert a.keys() == b.keys()
    assert all(a[name] != b[name] for name in a if name.endswith((".tar", ".npz", "job.json", "manifest.jsonl")))


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly(place: Path, number: int, status: int) -> None:
    process = start(run_in, str(place), f"{MANY} out")
    wait_for(lambda: finished() >= 2)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == status
    assert 2 <= finished() < 30
    assert temporary() == []
    generate(f"{MANY} out")
    generate(f"{MANY} whole")
    assert tree("out") == tree("whole")


def test_a_signal_says_what_is_finished(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original, calls = Manifest.append, 0

    def append(self: Manifest, record: Any) -> None:
        nonlocal calls
        original(self, record)
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "append", append)
    generate(f"{TINY} --out out", status=130)
    assert "stepfusion: stopped: 8 of 22 images are finished in out\n" in capsys.readouterr().err


# Several writers


def test_a_second_writer_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(run_in, str(place), f"{MANY} out")
    wait_for(lambda: finished() >= 1)
    generate(f"{MANY} out", status=1)
    assert capsys.readouterr().err == f"stepfusion: {place / 'out'} is being written by another process\n"
    process.kill()
    process.join()
    generate(f"{MANY} out")  # the lock of a dead process is no obstacle


def test_several_processes_make_the_same_bytes_and_one_may_die(capfd: pytest.CaptureFixture[str]) -> None:
    command = MANY.replace("--num 120", "--num 400").replace("--steps 2", "--steps 4")
    killed = []

    def kill_one() -> None:
        wait_for(lambda: finished() >= 3)
        victim = multiprocessing.active_children()[0]
        victim.kill()
        killed.append(victim)

    killer = threading.Thread(target=kill_one)
    killer.start()
    generate(f"{command} out --devices cpu,cpu")
    killer.join()
    assert " (cpu) died of SIGKILL; its unit " in capfd.readouterr().err
    assert json.loads(Path("out/report.json").read_text())["processes"] == 2
    generate(f"{command} whole")
    assert tree("out") == tree("whole")
    assert multiprocessing.active_children() == []


def children_of(parent: int) -> list[int]:
    """The processes that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_their_parent(place: Path) -> None:
    command = MANY.replace("--num 120 --unit 4", "--num 90000 --unit 30000")  # units that take minutes
    process = start(run_in, str(place), f"{command} out --devices cpu,cpu")
    wait_for(Path("out/engine.json").exists)
    assert process.pid is not None
    children = children_of(process.pid)
    assert len(children) >= 2
    process.kill()
    process.join()
    wait_for(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children), 20)


def test_what_goes_wrong_in_a_process_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{SMALL} out")
    begun_by_another_version()
    Path("out/manifest.jsonl").unlink()
    generate(f"{SMALL} out --devices cpu,cpu", status=1)
    error = capsys.readouterr().err
    assert "(cpu): " in error
    assert "was started with other settings: the version of stepfusion was '0.0.9' and is " in error
    assert error.count("\n") == 1


def test_the_ranks_of_a_launcher(place: Path) -> None:
    generate(f"{TINY} --out whole --npz")
    for ranks in [(1,), (0, 1, 2)]:  # the first launch loses the others; then all come, and one has nothing to do
        processes = [start(run_ranked, str(place), f"{TINY} --out out --npz", rank) for rank in ranks]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert Path("out/report.json").exists() == (len(ranks) == 3)
    assert tree("out") == tree("whole")


# Disks


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{TINY} --out whole")
    original, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        generate(f"{TINY} --out out", status=1)
    error = capsys.readouterr().err
    assert "No space left on device; " in error
    assert error.endswith("of 22 images are finished, and the same command goes on\n")
    assert temporary() == []
    generate(f"{TINY} --out out")
    assert tree("out") == tree("whole")


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE as Linux has it")
def test_a_file_system_that_takes_no_more_bytes(place: Path) -> None:
    process = start(run_limited, str(place), f"{TINY} --out out --npz")
    process.join(60)
    assert process.exitcode == 1
    assert "File too large; 0 of 22 images are finished, and the same command goes on" in Path("error").read_text()
    assert temporary() == []
    generate(f"{TINY} --out out --npz")
    generate(f"{TINY} --out whole --npz")
    assert tree("out") == tree("whole")


def test_a_read_only_directory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{TINY} --out out")
    original = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return original(path, flags, *rest, **options)

    before = tree()
    monkeypatch.setattr(os, "open", refuse)
    generate(f"{TINY} --out out", status=1)
    assert (
        capsys.readouterr().err == f"stepfusion: {Path('out').absolute()} cannot be written: Read-only file system\n"
    )
    assert tree() == before


def again(job: bulk.Job, request: bulk.TableRequest) -> bulk.WorkerConfig:
    """The same job in the directory ``again``."""
    out = Path("again").absolute()
    return bulk.WorkerConfig(job, out, "model", request, bulk.ExecutionOptions(batch=4), threads=1)


def test_bulk_is_a_library_too() -> None:
    """What the command calls, and the directory says: the same job again."""
    generate(f"{TINY} --out out")
    job = bulk.verify(Path("out"))
    config = again(job, bulk.TableRequest(steps=2))
    report = bulk.run(config, bulk.Placement(("cpu",)), quiet=True)
    assert report is not None
    assert tree("out") == tree("again")


@pytest.mark.parametrize(
    "request_", [bulk.TableRequest(steps=3), bulk.TableRequest(steps=2, spacing="trailing")], ids=str
)
def test_a_library_call_with_another_table_makes_nothing(request_: bulk.TableRequest) -> None:
    generate(f"{TINY} --out out")
    job = bulk.verify(Path("out"))
    config = again(job, request_)
    with pytest.raises(BulkError, match="is not the one that this job was begun with: ddim, eta 0, 2 steps; 0 of 22"):
        bulk.run(config, bulk.Placement(("cpu",)), quiet=True)
    assert list(Path("again/images").iterdir()) == []
