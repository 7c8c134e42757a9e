"""A training run deletes and overwrites what it wrote itself, and nothing else; two runs never share a directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from stepfusion.commands import train as train_cli
from stepfusion.commands.main import main
from stepfusion.training.metrics import plot_loss, read_metrics
from stepfusion.training.run import LOCK

pytestmark = pytest.mark.usefixtures("one_thread")
SLICE = Path(__file__).parents[1] / "data" / "fashion-mnist-slice"
TINY = (
    *("--steps", "2", "--batch-size", "4", "--microbatch", "4", "--channels", "8", "--norm-groups", "4"),
    *("--head-dim", "8", "--precision", "float32", "--save-every", "1", "--log-every", "1", "--workers", "1"),
)
MODEL = {"model_index.json", "scheduler", "stepfusion.json", "unet"}
posix = pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(*arguments: str, out: str = "run") -> int:
    return main(["train", str(SLICE), "--out", out, *TINY, *arguments])


def tree(path: str | Path = ".") -> dict[str, bytes | None]:
    """Every file with its content, and every other thing with none."""
    found = sorted(Path(path).rglob("*"))
    return {str(f.relative_to(path)): f.read_bytes() if f.is_file() and not f.is_symlink() else None for f in found}


def write(path: str, text: str = "mine") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


# Exports


@pytest.mark.parametrize(
    "mine",
    ["thesis.txt", "unet/notes.txt", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", ".git/HEAD"],
)
def test_an_export_deletes_and_overwrites_nothing_of_others(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(f"model/{mine}")
    before = tree()
    assert train("--export", "model") == 1
    sentence = f"--export model holds {mine}, which this run did not write: give a directory that is new or empty"
    assert capsys.readouterr().err == f"stepfusion: {sentence}\n"
    assert tree() == before  # not a step was made


@pytest.mark.parametrize("export", [".", "..", "run", "run/.", "../work", "run/state-00000002"])
def test_an_export_over_the_run_itself(
    export: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("work/run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert train("--export", export) == 1
    assert f"--export {export.removesuffix('/.')} holds the run itself" in capsys.readouterr().err
    write("thesis.txt")
    before = tree(tmp_path)
    assert train("--export", export) == 1
    assert tree(tmp_path) == before


def test_an_export_of_this_run_is_replaced() -> None:
    assert train("--export", "model") == 0
    first = tree("model")
    assert set(os.listdir("model")) == MODEL
    assert train("--export", "model", "--steps", "3") == 0
    assert tree("model").keys() == first.keys()
    assert tree("model") != first
    assert train("--export", "other", "--export-only") == 0
    assert train("--export", "model", "--export-only") == 0  # an export before the last one
    assert tree("model") == tree("other")
    assert train() == 0  # into run/model
    assert train() == 0
    written = sorted(json.loads(line)["directory"] for line in Path("run/exports.jsonl").read_text().splitlines())
    assert written == [
        str(Path(name).absolute()) for name in ("model", "model", "model", "other", *["run/model"] * 2)
    ]


def change_weights(model: Path) -> None:
    with (model / "unet/diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is added": (lambda model: (model / "README.md").write_text("mine"), "README.md"),
    "a file is changed": (change_weights, "unet/diffusion_pytorch_model.safetensors"),
    "a folder is added": (lambda model: (model / "samples").mkdir(), "samples/"),
    "a file is renamed": (lambda model: (model / "stepfusion.json").rename(model / "a.json"), "a.json"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("export", [(), ("--export", "model")])
def test_an_export_that_was_changed_since_is_kept(
    change: str, export: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*export) == 0
    model = Path("model" if export else "run/model")
    edit, name = CHANGES[change]
    edit(model)
    before = tree()
    capsys.readouterr()
    for command in ((*export, "--steps", "3"), (*export, "--export-only")):
        assert train(*command) == 1
        assert f"--export {model} holds {name}, which this run did not write" in capsys.readouterr().err
        assert tree() == before


def test_what_comes_while_training_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    original = train_cli.train

    def slow(*arguments: object, **options: object) -> object:
        trainer = original(*arguments, **options)
        write("model/thesis.txt")
        return trainer

    monkeypatch.setattr(train_cli, "train", slow)
    assert train("--export", "model") == 1
    assert "model holds thesis.txt, which would be lost" in capsys.readouterr().err
    assert tree("model") == {"thesis.txt": b"mine"}
    assert train("--export", "elsewhere") == 0  # and nothing of the training is lost


@posix
@pytest.mark.parametrize("target", ["elsewhere", "empty", "nowhere"])
def test_an_export_to_a_link_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("elsewhere/thesis.txt")
    Path("empty").mkdir()
    Path("model").symlink_to(target)
    before = tree()
    assert train("--export", "model") == 1
    assert "--export model is a symbolic link: name the directory itself" in capsys.readouterr().err
    assert tree() == before


# The run's own directory


@posix
@pytest.mark.parametrize("name", ["state-00000001", "state-00000002"])
def test_a_state_that_is_a_link_is_not_followed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("elsewhere/state.json")
    write("elsewhere/thesis.txt")
    Path("run").mkdir()
    Path("run", name).symlink_to("../elsewhere")
    assert train() == 1
    assert f"run/{name} is no state of this run, and has the name of one: move it away" in capsys.readouterr().err
    assert tree("elsewhere") == {"state.json": b"mine", "thesis.txt": b"mine"}
    assert train("--export-only", "--export", "model") == 1  # it is no state to export either
    assert "run has no saved state to export" in capsys.readouterr().err


@posix
def test_files_that_are_links_are_not_written_through(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", ".train.lock", "exports.jsonl", "loss.png"):
        write("thesis.txt")
        Path("run").mkdir(exist_ok=True)
        Path("run", name).unlink(missing_ok=True)
        Path("run", name).symlink_to("../thesis.txt")
        status = train()
        assert status == (0 if name == "loss.png" else 1), name
        assert Path("thesis.txt").read_text() == "mine"
        error = capsys.readouterr().err
        assert "loss.png is not of this program" in error if name == "loss.png" else "a symbolic link" in error
        Path("run", name).unlink()


@posix
def test_a_pipe_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    for name in ("metrics.jsonl", ".train.lock", "exports.jsonl", "state-00000002/state.json"):
        Path("run", name).rename("kept")
        os.mkfifo(Path("run", name))
        assert train("--steps", "3") == 1, name
        assert "it is a pipe" in capsys.readouterr().err
        Path("kept").replace(Path("run", name))
    Path("run/state-00000002/state.safetensors").rename("kept")
    os.mkfifo("run/state-00000002/state.safetensors")
    assert train("--steps", "3") == 1
    assert "state.safetensors: it is a pipe" in capsys.readouterr().err


@posix
def test_a_backup_by_hard_links_stays_as_it_was() -> None:
    assert train() == 0
    Path("backup").mkdir()
    os.link("run/metrics.jsonl", "backup/metrics.jsonl")
    before = tree("backup")
    assert train("--steps", "4") == 0
    assert tree("backup") == before
    assert [row["step"] for row in read_metrics("run/metrics.jsonl")] == [1, 2, 3, 4]


def test_folders_that_look_like_states_are_kept() -> None:
    mine = {"run/state-of-the-art/thesis.txt", "run/state-1/state.json", "run/.state-mine.tmp/state.json"}
    mine |= {"run/.state-00000001.0123.tmp/thesis.txt", "run/state-00000002/thesis.txt"}
    assert train() == 0
    for name in mine:
        write(name)
    for steps in ("5", "6"):
        assert train("--steps", steps) == 0
        assert {name for name in mine if Path(name).read_text() == "mine"} == mine
        assert os.listdir("run/state-00000002") == ["thesis.txt"]
    assert not Path("run/state-00000003").exists()


@pytest.mark.parametrize("name", ["state-00000001", "state-00000002", "state-12345678"])
def test_what_is_in_the_way_of_a_state_is_said_at_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(f"run/{name}/thesis.txt")
    assert train() == 1
    assert f"run/{name} is no state of this run, and has the name of one: move it away" in capsys.readouterr().err
    assert not Path("run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "text", ["my own notes\n", '{"epoch": 1, "loss": 0.5}\n', '{"step": 1, "loss": 0.5, "accuracy": 1}\n', "[1]\n"]
)
def test_metrics_of_another_program_are_kept(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("run/metrics.jsonl", text)
    assert train() == 1
    assert "run/metrics.jsonl, line 1: " in capsys.readouterr().err
    assert Path("run/metrics.jsonl").read_text() == text
    assert not list(Path("run").glob("state-*"))


def test_a_figure_of_another_program_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Image.new("L", (3, 3)).save("run/loss.png")
    before = Path("run/loss.png").read_bytes()
    assert train() == 0
    assert Path("run/loss.png").read_bytes() == before
    assert "run/loss.png is not of this program, and stays" in capsys.readouterr().err
    Path("run/loss.png").unlink()
    for steps in (3, 4):
        assert train("--steps", str(steps)) == 0
        assert Path("run/loss.png").stat().st_size > 1000
    write("run/loss.png", "no picture")
    plot_loss(Path("run"))
    assert Path("run/loss.png").read_text() == "no picture"


def test_a_line_that_a_crash_cut_short_costs_no_other() -> None:
    assert train() == 0
    for name in ("metrics.jsonl", "exports.jsonl"):
        with Path("run", name).open("ab") as file:
            file.write(b'{"step": 3, "lo')
    assert train("--steps", "4") == 0
    assert train("--steps", "5") == 0
    assert [row["step"] for row in read_metrics("run/metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert len(Path("run/exports.jsonl").read_text().splitlines()) == 3


# Two trainers


def test_two_trainers_lock_each_other_out(capsys: pytest.CaptureFixture[str]) -> None:
    """The second one touches nothing; the lock of one that was killed is free."""
    arguments = ["--out", "run", *TINY]
    arguments[arguments.index("--steps") + 1] = "1000000"
    command = [sys.executable, "-P", "-m", "stepfusion", "train", str(SLICE), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not Path("run/metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert train() == 1
            assert capsys.readouterr().err == "stepfusion: run is in use by another training process\n"
            assert process.poll() is None
            if os.name == "posix":
                process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
    steps = str(read_metrics("run/metrics.jsonl")[-1]["step"] + 2)
    assert train("--steps", steps) == 0


def test_the_lock_is_taken_before_anything_is_read() -> None:
    write("run/metrics.jsonl", "never looked at\n")
    with FileLock(Path("run", LOCK)):
        assert train() == 1
    assert Path("run/metrics.jsonl").read_text() == "never looked at\n"


def test_another_directory_is_not_locked() -> None:
    Path("run").mkdir()
    with FileLock(Path("run", LOCK)):
        assert train(out="other") == 0


def test_a_file_with_the_locks_name_is_not_emptied(capsys: pytest.CaptureFixture[str]) -> None:
    write("run/.train.lock")
    assert train() == 1
    assert "run/.train.lock is not the lock of a training run" in capsys.readouterr().err
    assert Path("run/.train.lock").read_text() == "mine"
