"""Ray Data on this machine's CPUs: the same manifest, and the same bytes whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from stepfusion_testing.bulk_jobs import begun_by_another_version, finished, generate, tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install stepfusion[ray]"),
]

COMMAND = "generate model --num 60 --unit 2 --steps 100 --batch 2 --threads 1 --quiet --format npz --out"


def ray_run() -> subprocess.Popen[str]:
    """The command on a Ray of its own."""
    command = [sys.executable, "-m", "stepfusion", *f"{COMMAND} out --ray local --workers 1".split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(true: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def actors_of(driver: int) -> list[int]:
    """The engine actors among the descendants of a process."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes()
        except OSError:
            continue

    def descends(process: int) -> bool:
        while process in parents and process != driver:
            process = parents[process]
        return process == driver

    return [process for process, name in names.items() if b"MapBatches(EngineActor)" in name and descends(process)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_and_the_driver_die() -> None:
    generate(f"{COMMAND} whole")
    driver = ray_run()
    wait_for(lambda: finished() >= 2 or driver.poll() is not None)
    (actor,) = actors_of(driver.pid)
    os.kill(actor, signal.SIGKILL)
    before = finished()
    wait_for(lambda: finished() >= before + 3 or driver.poll() is not None)  # Ray started another one
    driver.kill()
    driver.communicate()
    assert before + 3 <= finished() < 30
    assert driver.returncode == -signal.SIGKILL
    again = ray_run()
    output = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert tree("out") == tree("whole")


def test_what_goes_wrong_in_an_actor_is_one_sentence() -> None:
    generate(f"{COMMAND} out")
    begun_by_another_version()
    Path("out/manifest.jsonl").unlink()
    run = ray_run()
    _, error = run.communicate(timeout=240)
    assert run.returncode == 1
    (line,) = (line for line in error.splitlines() if line.startswith("stepfusion: "))
    assert line.startswith(f"stepfusion: a Ray worker: {Path('out').absolute()} was started with other settings: ")
    assert line.endswith("; 0 of 60 images are finished, and the same command goes on")
