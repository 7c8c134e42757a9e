"""A forked child of a process that computed with several threads says so, where it waited for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepfusion_testing.tiny_model import save_tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SCRIPT = """
import os, sys
import torch
from stepfusion.bulk.checkpoint import read_checkpoint
from stepfusion.commands.main import main

def generate(out):
    return main(f"generate model --num 4 --unit 4 --steps 1 --batch 4 --quiet --out {out}".split())

def used():
    assert generate("parent") == 0

def read():
    read_checkpoint("model")

def nothing():
    pass

def as_it_is():
    return generate("child")

def alone():
    torch.set_num_threads(1)
    return generate("child")

def reading():
    read_checkpoint("model")
    return 0

parent, threads, child = sys.argv[1:]
torch.set_num_threads(int(threads))
globals()[parent]()
pid = os.fork()
if pid == 0:
    status = 1
    try:
        status = globals()[child]()
    except RuntimeError as error:
        print(error, file=sys.stderr)
    finally:
        os._exit(status)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run(place: Path, parent: str, threads: int, child: str) -> subprocess.CompletedProcess[str]:
    """A process that does something and forks a child that does something; they may not wait for ever."""
    save_tiny_model(place / "model")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, parent, str(threads), child]
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("parent", ["used", "read"])
@pytest.mark.parametrize("child", ["as_it_is", "reading"])
def test_a_child_of_several_threads_is_refused(parent: str, child: str, tmp_path: Path) -> None:
    done = run(tmp_path, parent, 2, child)
    assert done.returncode == 1, done
    lines = [line for line in done.stderr.splitlines() if "forked" in line]
    assert len(lines) == 1
    assert "this process was forked from one that had computed with several threads" in lines[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize(
    ("parent", "threads", "child"),
    [("used", 1, "as_it_is"), ("used", 2, "alone"), ("nothing", 2, "as_it_is"), ("read", 2, "alone")],
)
def test_a_child_that_needs_no_threads_of_its_parent_works(
    parent: str, threads: int, child: str, tmp_path: Path
) -> None:
    done = run(tmp_path, parent, threads, child)
    assert done.returncode == 0, done
    assert (tmp_path / "child" / "report.json").exists()
