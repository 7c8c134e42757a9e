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

torch.set_num_threads(int(sys.argv[1]))
engine = sf.Engine(lambda x, t: 0.5 * x, sf.NoiseSchedule.linear(100), shape=(1, 64, 64), device="cpu", batch=4)
engine.sample(4, steps=2)

def in_a_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            print("done", flush=True)
        except (RuntimeError, TimeoutError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)

in_a_child(lambda: engine.sample(4, steps=2))
service = sf.serving.AsyncEngine(engine).start()
in_a_child(lambda: service.submit(1, steps=1).result(20))
service.close()
"""
FORKED = "RuntimeError: this process was forked from one that had computed with"
REFUSED = "EngineClosed: the engine takes no requests: its thread is in the process that forked this one"


def said(threads: int) -> tuple[str, str]:
    """What a child says that samples with the engine, and one that asks the service."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    sampling, asking = done.stdout.splitlines()
    return sampling, asking


def test_sampling_and_requests_in_a_forked_child_are_refused() -> None:
    sampling, asking = said(2)
    assert sampling.startswith(FORKED)
    assert asking == REFUSED


def test_with_one_thread_it_samples() -> None:
    assert said(1) == ("done", REFUSED)
