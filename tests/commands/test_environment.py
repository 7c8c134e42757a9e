"""Defaults of options from the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepfusion.commands.environment import PREFIX, RESERVED
from stepfusion.commands.main import main
from stepfusion.files.png_text import read_texts
from stepfusion_testing.tiny_model import save_tiny_model


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)


def test_a_variable_is_a_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"STEPS": "3", "DEVICE": "cpu", "NUM": "2", "NO_METADATA": "0", "FIRST_INDEX": "7"}.items():
        monkeypatch.setenv(f"STEPFUSION_{name}", value)
    assert main(["sample", "model"]) == 0
    assert main(["sample", "model", "--steps", "2"]) == 0  # what is typed goes before
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("again: ")]
    wanted = "again: stepfusion sample model --num 2 --seed 0 --first-index 7 --steps {} --device cpu"
    assert again == [wanted.format(3), wanted.format(2)]
    monkeypatch.setenv("STEPFUSION_QUIET", "yes")
    monkeypatch.setenv("STEPFUSION_NO_METADATA", "1")
    assert main(["sample", "model"]) == 0
    assert capsys.readouterr().out == ""
    assert read_texts(Path("samples.png").read_bytes()) == {}


def test_a_figures_command_holds_what_came_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_STEPS", "2")
    monkeypatch.setenv("STEPFUSION_SEED", "4")
    monkeypatch.setenv("STEPFUSION_QUIET", "1")
    assert main(["show", "noise", "model", "-n", "1", "--device", "cpu", "--seed", "5"]) == 0
    command = read_texts(Path("noise.png").read_bytes())["stepfusion.command"]
    assert command == "stepfusion show noise model -n 1 --device cpu --seed 5 --steps 2 --quiet"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("STEPS", "many", "argument --steps: invalid int value: 'many'"),
        ("SAMPLER", "magic", "STEPFUSION_SAMPLER must be one of ddim"),
        ("QUIET", "maybe", "STEPFUSION_QUIET must be 1 or 0, got 'maybe'"),
    ],
)
def test_a_wrong_variable_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"STEPFUSION_{name}", value)
    with pytest.raises(SystemExit) as caught:
        main(["sample", "model"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_variable_stands_for_an_option_that_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPFUSION_OUT", "run")
    assert main(["train", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_variables_of_other_meanings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_CACHE", "/nonexistent")
    monkeypatch.setenv("STEPFUSION_HELP", "1")
    assert (
        main(
            [
                "sample",
                "model",
                "-n",
                "1",
                "--steps",
                "1",
                "--device",
                "cpu",
                "--backend",
                "reference",
                "--network",
                "eager",
            ]
        )
        == 0
    )


def test_the_page_names_every_variable_with_a_meaning_of_its_own() -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    named = {name.removeprefix(PREFIX) for name in re.findall(r"^\| `(STEPFUSION_\w+)`", page, re.MULTILINE)}
    assert named == RESERVED - {"PYTRITON"}, "of the tests alone"
