"""A newcomer's walk: a clone, the demo, and then the quick start page from its first command to its last.

Everything that is run comes from the README's first block and the page; what stands between their lines is a shell,
a second terminal, and patience. The virtual environment is this one, for nothing is installed again.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import stepfusion as sf
from stepfusion_testing.snippets import ROOT, Snippet, commands, run_python, snippets

PAGE = "docs/quick_start.md"
INSTALLS = ("python -m venv", ". .venv", "pip install")
#: What would take minutes is done in seconds: fewer steps, fewer images.
QUICK = (("--steps 500", "--steps 4"), ("--num 1000", "--num 8"), ("sample(64", "sample(16"))
pytestmark = pytest.mark.soak


def quick(text: str) -> str:
    for old, new in QUICK:
        text = text.replace(old, new)
    return text


class Walk:
    """A clone of the repository, a folder in it, and what was run there."""

    def __init__(self, clone: Path, port: int) -> None:
        self.clone, self.port = clone, port
        self.names: dict[str, Any] = {"__name__": "__main__"}
        bin_folder = str(Path(sys.executable).parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STEPFUSION_", "TRITON_"))}
        self.environment = {**kept, "PATH": f"{bin_folder}:{kept['PATH']}", "PYTHONSAFEPATH": "1"}
        self.environment["STEPFUSION_STEPS"] = "4"  # of commands that do not say how many

    def moved(self, text: str) -> str:
        """With a port that is free here."""
        return quick(text).replace("8000", str(self.port))

    def shell(self, command: str) -> str:
        """Run one command, as a shell does, in the clone; it must succeed."""
        done = subprocess.run(
            ["sh", "-c", self.moved(command)],
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def server(self, command: str) -> Iterator[subprocess.Popen[str]]:
        """The command in a terminal of its own, until Ctrl-C; it must then end with 0."""
        process = subprocess.Popen(
            ["sh", "-c", f"exec {self.moved(command)}"],
            cwd=self.clone,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
        finally:
            process.kill()
            process.communicate()


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Walk:
    """At the first step: git clone. The package is the one of this checkout, which is installed."""
    clone = tmp_path / "stepfusion"
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
    monkeypatch.chdir(clone)
    return Walk(clone, free_port())


def picture(path: Path) -> tuple[int, int]:
    """The size of a picture that is not flat."""
    with Image.open(path) as image:
        low, high = image.convert("L").getextrema()
        assert high > low, path
        return image.size


def sections() -> dict[str, list[Snippet]]:
    """The snippets of the page, by their headings."""
    text = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Snippet]] = {}
    for snippet in snippets(PAGE):
        heading = next(line for line in reversed(text[: snippet.line]) if line.startswith("## "))
        found.setdefault(heading.removeprefix("## "), []).append(snippet)
    return found


def test_a_newcomer_gets_from_a_clone_to_an_export(walk: Walk) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("uvicorn")
    page, done = sections(), list[str]()

    def take(heading: str, check: Callable[[str], None] = lambda said: None) -> None:
        said = ""
        for snippet in page[heading]:
            if snippet.language == "python":
                run_python(walk.moved(snippet.text), walk.names, str(snippet))
                continue
            said += "".join(walk.shell(one) for one in commands(snippet) if not one.startswith(INSTALLS))
        check(said)
        done.append(heading)

    (demo, *_) = commands(snippets("README.md")[0])
    (recipe,) = re.findall(r"^demo:.*\n\t@\$\(BIN\)/(.*)$", (walk.clone / "Makefile").read_text(), re.MULTILINE)
    assert demo == "make demo"
    walk.shell(f"{recipe} --steps 4")
    assert min(picture(walk.clone / "samples.png")) >= 200

    take("Install", lambda said: _says(said, "stepfusion", "torch"))
    take("The first picture", lambda said: _says(said, "Sneaker", "--labels 7 --seed 7"))
    assert picture(walk.clone / "sneaker.png") == (28, 28)
    take("The same in Python")
    assert walk.names["pixels"].shape == (8, 28, 28, 1)
    take("A model of your own")
    picture(walk.clone / "mine.png")
    assert (walk.clone / "run" / "model" / "model_index.json").is_file()

    start, requests = page["A server"]
    (command,) = commands(start)
    with walk.server(command):
        for request in commands(requests):
            walk.shell(request.replace("'>'", ">"))
    picture(walk.clone / "bags.png")
    done.append("A server")

    take("An export")
    assert isinstance(walk.names["exported"], sf.Engine)
    take("In bulk")
    assert (walk.clone / "images" / "samples_8x28x28x1.npz").is_file()
    assert done == list(page), "a part of the page was left out"


def _says(said: str, *wanted: str) -> None:
    for text in wanted:
        assert text in said
