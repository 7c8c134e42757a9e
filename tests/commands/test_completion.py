"""The scripts by which shells complete, and what bash makes of one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("shtab", reason="completion needs the extra 'completion'")

from stepfusion.commands.completion import SHELLS
from stepfusion.commands.main import main, whole_parser
from stepfusion.samplers.registry import OFFERED

#: Completes the last of the words that are its arguments, as bash does when Tab is pressed.
PRESS_TAB = """
source ./script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
function_of() { complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/'; }
"$(function_of stepfusion)" stepfusion "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bash's script, written once, and a picture."""
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch, (folder / "script").open("w") as script:
        patch.setattr("sys.stdout", script)
        assert main(["completion", "bash"]) == 0
    (folder / "shoe.png").touch()
    return folder


def completed(folder: Path, *words: str) -> list[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    command = [bash, "--norc", "-c", PRESS_TAB, "bash", "stepfusion", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_values(folder: Path) -> None:
    assert set(completed(folder, "")) >= {"sample", "serve", "warm", "completion"}
    assert completed(folder, "sam") == ["sample"]
    assert completed(folder, "sample", "fash") == ["fashion-mnist"]
    assert completed(folder, "sample", "fashion-mnist", "--samp") == ["--sampler"]
    assert set(completed(folder, "sample", "fashion-mnist", "--sampler", "dpmpp")) == {
        name for name in OFFERED if name.startswith("dpmpp")
    }
    assert completed(folder, "sample", "fashion-mnist", "--image", "sh") == ["shoe.png"]
    assert set(completed(folder, "show", "m")) == {"metadata", "model"}
    assert "--num" not in completed(folder, "serve", "fashion-mnist", "--n")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_of_every_command_is_in_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    commands = whole_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert len(commands) > 10
    for name, command in commands.items():  # type: ignore[union-attr]
        assert name in script
        for action in command._actions:
            longs = [option for option in action.option_strings if option.startswith("--")]
            wanted = [option.removeprefix("--") if shell == "fish" else option for option in longs]
            assert all(option in script for option in wanted), (name, wanted)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "csh"])
    assert "invalid choice: 'csh'" in capsys.readouterr().err


def test_without_shtab_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == (
        "stepfusion: stepfusion completion needs shtab: pip install 'stepfusion[completion]'\n"
    )
