"""A forked child that uses its parent's engine is told so; it waited for threads that it has not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SCRIPT = """
import os, sys
import torch
import stepfusion as sf

torch.set_num_threads(int(sys.argv[2]))
engine = sf.Engine(lambda x, t: 0.5 * x, sf.NoiseSchedule.linear(100), shape=(1, 64, 64), device="cpu", batch=4)
engine.sample(4, steps=2)
service = sf.serving.AsyncEngine(engine).start() if sys.argv[1] == "submit" else None
pid = os.fork()
if pid == 0:
    try:
        service.submit(1, steps=1).result(20) if service else engine.sample(4, steps=2)
        print("done", flush=True)
    except (RuntimeError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
if service is not None:
    service.close()
"""


def said(*arguments: str) -> str:
    command = [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_sampling_in_a_forked_child_is_refused() -> None:
    assert said("sample", "2").startswith("RuntimeError: this process was forked from one that had computed with")


def test_with_one_thread_it_samples() -> None:
    assert said("sample", "1") == "done\n"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_request_in_a_forked_child_is_refused(threads: str) -> None:
    assert said("submit", threads) == (
        "EngineClosed: the engine takes no requests: its thread is in the process that forked this one\n"
    )
