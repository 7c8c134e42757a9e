"""A forked child of a process that computed with several threads says so, where it waited for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepfusion_testing.tiny_model import save_tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

#: Does what it is told, one after the other: ``generate`` or ``read`` itself, or ``fork`` a child that does it.
#: Its last line is each child's exit status and what it wrote on standard error.
SCRIPT = """
import json, os, sys
import torch
from stepfusion.bulk.checkpoint import read_checkpoint
from stepfusion.commands.main import main

def generate(out):
    return main(f"generate model --num 4 --unit 4 --steps 1 --batch 4 --quiet --out {out}".split())

def read(out):
    read_checkpoint("model")
    return 0

def alone(out):
    torch.set_num_threads(1)
    return generate(out)

def fork(name):
    pid = os.fork()
    if pid == 0:
        status = 1
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT), 2)
        try:
            status = globals()[name](f"{name}.out")
        except RuntimeError as error:
            print(error, file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), open(f"{name}.txt").read()

threads, *steps = sys.argv[1:]
torch.set_num_threads(int(threads))
children = []
for step in steps:
    does, _, what = step.rpartition(" ")
    if does == "fork":
        children.append(fork(what))
    else:
        assert globals()[what]("parent") == 0
print(json.dumps(children))
"""


def run(place: Path, threads: int, *steps: str) -> list[tuple[int, str]]:
    """A process that does such steps; its children may not wait for ever."""
    save_tiny_model(place / "model")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(threads), *steps]
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done
    return [(status, said) for status, said in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize("parent", ["generate", "read"])
def test_children_of_several_threads_are_refused_and_those_of_one_work(parent: str, tmp_path: Path) -> None:
    *refused, (status, said) = run(tmp_path, 2, parent, "fork generate", "fork read", "fork alone")
    assert len(refused) == 2
    for failed, sentence in refused:
        assert failed == 1
        lines = [line for line in sentence.splitlines() if "forked" in line]
        assert len(lines) == 1
        assert "this process was forked from one that had computed with several threads" in lines[0]
        assert "Traceback" not in sentence
    assert not (tmp_path / "generate.out").exists()
    assert status == 0, said
    assert (tmp_path / "alone.out" / "report.json").exists()


@pytest.mark.parametrize(("parent", "threads"), [("generate", 1), (None, 2)])
def test_a_child_whose_parent_computed_with_one_thread_or_not_at_all_works(
    parent: str | None, threads: int, tmp_path: Path
) -> None:
    steps = ["fork generate"] if parent is None else [parent, "fork generate"]
    ((status, said),) = run(tmp_path, threads, *steps)
    assert status == 0, said
    assert (tmp_path / "generate.out" / "report.json").exists()
