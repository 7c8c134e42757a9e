"""How a command uses the processor: its threads, how they wait, what a busy machine is told, and what it imports."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest
import torch

import stepfusion as sf
from stepfusion.commands import threads
from stepfusion.commands.main import main

PROGRAM = """
import os, sys
from stepfusion.commands.main import main
{before}
try: main(sys.argv[1:])
except SystemExit: pass
print("torch" in sys.modules, *(os.environ.get(n) for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")), file=sys.stderr)
"""


BUSY = "stepfusion: the load of this machine is 9.0, on 4 cores: on a CPU --threads 1 may be faster\n"


def run(before: str = "", *arguments: str, **variables: str) -> str:
    """Whether a process loaded PyTorch for a command, and what it has in its environment then."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-P", "-c", PROGRAM.format(before=before), *arguments]
    done = subprocess.run(command, env=given | variables, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


def test_help_waits_for_no_import() -> None:
    assert run("", "--help") == "False PASSIVE 1000"
    assert run("", "sample", "--help") == "True PASSIVE 1000"


@pytest.mark.parametrize("choice", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_user_decides_how_threads_wait(choice: str) -> None:
    said = run("", "--help", **{choice: "7"})
    assert said.split()[1:] == ["7" if name == choice else "None" for name in threads.WAITING]


def test_a_program_that_has_loaded_pytorch_keeps_its_environment() -> None:
    assert run("import torch", "--help") == "True None None"


def options(count: int | None, *, quiet: bool = False) -> argparse.Namespace:
    return argparse.Namespace(threads=count, quiet=quiet)


@pytest.mark.usefixtures("one_thread")
def test_threads_are_those_that_were_asked_for() -> None:
    threads.use_threads(options(3))
    assert torch.get_num_threads() == 3
    threads.use_threads(options(None))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("words", [["sample", "fashion-mnist", "-n", "1"], ["show", "noise", "fashion-mnist"]])
def test_a_wrong_number_of_threads_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--threads", "0"]) == 1
    assert capsys.readouterr().err == "stepfusion: --threads must be in [1, 1024], got 0\n"


@pytest.mark.parametrize(("load", "quiet", "terminal", "said"), [
    (9.0, False, True, BUSY),
    (3.0, False, True, ""),
    (9.0, True, True, ""),
    (9.0, False, False, ""),
])  # fmt: skip
def test_a_busy_machine_is_named_on_a_terminal(
    load: float,
    quiet: bool,
    terminal: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    threads.use_threads(options(None, quiet=quiet))
    assert capsys.readouterr().err == said


def test_every_public_name_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, stepfusion as sf\nassert 'torch' not in sys.modules\n"
        "assert set(sf.__all__) <= set(dir(sf))\n"
        "assert all(getattr(sf, name) is getattr(sf, name) for name in sf.__all__)\n"
        "print(sf.samplers.__name__, sf.Engine.__name__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "stepfusion.samplers Engine\n"
    with pytest.raises(AttributeError, match="module 'stepfusion' has no attribute 'Engin'"):
        sf.Engin  # type: ignore[attr-defined]  # noqa: B018


def test_a_model_is_read_and_sampled_without_the_compiler() -> None:
    """PyTorch's own, whose import takes longer than an image."""
    code = (
        "import sys, torch, stepfusion as sf\ntorch.set_num_threads(1)\n"
        "engine = sf.Engine.from_pretrained('fashion-mnist', device='cpu', backend='reference')\n"
        "engine.sample(1, steps=1)\nprint(engine.plan.network.value, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
