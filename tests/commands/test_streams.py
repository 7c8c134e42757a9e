"""Commands whose standard streams are closed, full or gone: they work, and end as they would otherwise."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepfusion.commands import train as train_cli
from stepfusion.commands.main import main
from stepfusion.commands.streams import standard_streams, tell
from stepfusion_testing.tiny_model import SIZE, save_tiny_model

DATA = Path(__file__).parents[1] / "data" / "fashion-mnist-slice"
TRAIN = (
    *(str(DATA), "--out", "run", "--steps", "1", "--batch-size", "4", "--channels", "8", "--norm-groups", "4"),
    *("--head-dim", "8", "--precision", "float32", "--workers", "1"),
)
COMMANDS = [
    "sample ../model -n 2 --steps 2 --device cpu --animate a.gif",
    "sample ../model -n 2 --steps 2 --device cpu --single",
    "generate ../model -n 3 --unit 2 --steps 1 --devices cpu --out shards",
    "generate ../model -n 2 --unit 1 --steps 1 --devices cpu,cpu --out shards",
    f"train {' '.join(TRAIN)}",
    "show steps ../model --steps 2 --eta 0 -n 1 --device cpu",
    "encode ../model ../a.png --steps 2 --device cpu --noise n.safetensors",
    "reconstruct ../model ../a.png --steps 2 --device cpu",
    "interpolate ../model --seeds 1,2 --steps 2 --device cpu",
    "env --device cpu --json",
    "sample ../model --stepz 3",
    "sample ../nowhere",
    "--help",
]
# The same, with the images of every job made in one process: to start others takes seconds.
OPEN = [command.replace("--devices cpu,cpu", "--devices cpu") for command in COMMANDS]
# Runs every command in a folder of its own, and writes down how each ended.
SCRIPT = """
import json, os, sys
from stepfusion.commands.main import main
if __name__ == "__main__":
    ended = []
    for number, command in enumerate(json.loads(sys.argv[1])):
        os.mkdir(str(number))
        os.chdir(str(number))
        try:
            ended.append(main(command.split()))
        except SystemExit as exit_:
            ended.append(exit_.code)
        os.chdir("..")
    with open("ended.json", "w") as file:
        json.dump(ended, file)
"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    save_tiny_model(tmp_path / "model")
    values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(values).save("a.png")


def run(
    commands: list[str], closed: str, folder: Path
) -> tuple[list[int], dict[str, bytes], subprocess.CompletedProcess[bytes]]:
    """All commands in one process, whose streams a shell has closed: how they ended, and the files they wrote."""
    folder.mkdir()
    save_tiny_model(folder / "model")
    (folder / "a.png").write_bytes(Path("a.png").read_bytes())
    (folder / "commands.py").write_text(SCRIPT)
    command = ["/bin/sh", "-c", f'exec "$0" -P commands.py "$1" {closed}', sys.executable, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=500, check=True)
    files = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    timed = (".json", ".jsonl")  # durations and speeds differ from run to run
    written = {str(f.relative_to(folder)): b"" if f.suffix in timed else f.read_bytes() for f in files}
    return json.loads((folder / "ended.json").read_text()), written, done


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="closed descriptors as a shell has them")
def test_every_command_works_with_its_streams_closed(tmp_path: Path) -> None:
    """The same ends, the same files, and on an open stdout the same words, as with all streams open."""
    ended, written, expected = run(OPEN, "", tmp_path / "open")
    assert ended == [0] * 10 + [2, 1, 0]
    without_stderr = run(COMMANDS, "2>&-", tmp_path / "no stderr")
    assert without_stderr[:2] == (ended, written)
    assert len(without_stderr[2].stdout.splitlines()) == len(expected.stdout.splitlines())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that takes no byte")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stderr_does_not_change_how_a_command_ends(unbuffered: str) -> None:
    script = (
        "import os, sys\nfrom stepfusion.commands.main import main\n"
        "for command in sys.argv[1:]:\n"
        "    if os.fork() == 0: sys.exit(main(command.split()))\n"  # each ends as a program does
        "    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)\n"
    )
    commands = ["sample nowhere", "sample model --stepz"]
    shell = ["/bin/sh", "-c", 'exec "$0" -P "$@" 2>/dev/full', sys.executable]
    done = subprocess.run(
        [*shell, "-c", script, *commands],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        timeout=120,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert done.stdout.split() == [b"1", b"2"]


def test_without_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """``pythonw`` has no streams at all."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["sample", "model", "-n", "2", "--steps", "2", "--device", "cpu"]) == 0
    assert main(["sample", "nowhere"]) == 1
    assert train_cli.main([*TRAIN]) == 0
    assert train_cli.main(["nowhere", "--out", "run"]) == 2
    assert (sys.stdout, sys.stderr) == (None, None)
    assert Path("samples.png").exists()
    assert Path("run/model").is_dir()


def test_streams_that_python_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    monkeypatch.setattr(sys, "stdout", closed)
    assert main(["env", "--device", "cpu"]) == 0
    assert main(["sample", "nowhere"]) == 1


def test_open_streams_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with standard_streams():
        assert (sys.stdout, sys.stderr) == before
        tell("a line")
        print("another")
    assert capsys.readouterr() == ("another\n", "a line\n")


@pytest.mark.skipif(os.name != "posix", reason="closed descriptors as a shell has them")
def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """Else what a library prints would go into a file."""
    script = (
        "import json, os, sys\nfrom stepfusion.commands.streams import standard_streams\n"
        "with standard_streams():\n"
        "    with open('data', 'wb') as file: number = file.fileno()\n"
        "    os.write(2, b'a message of a library')\n"
        "    json.dump([number, *map(os.get_inheritable, range(3))], open('found', 'w'))\n"
    )
    command = ["/bin/sh", "-c", 'exec "$0" -P -c "$1" <&- >&- 2>&-', sys.executable, script]
    subprocess.run(command, check=True, timeout=120)
    assert Path("data").read_bytes() == b""
    number, *inheritable = json.loads(Path("found").read_text())
    assert number > 2
    assert inheritable == [True, True, True]
