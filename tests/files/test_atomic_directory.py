"""A directory is replaced only if everything in it is ours, and removing removes nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepfusion.files import atomic
from stepfusion.files.atomic import atomic_directory, remove_leftovers
from stepfusion.files.removal import file_names, first_other, named, remove_folder


def fill(path: Path, *names: str, text: str = "ours") -> Path:
    """Files in a folder, and folders for names that end in a slash."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (path / name).mkdir(parents=True, exist_ok=True)
        else:
            (path / name).write_text(text)
    return path


def tree(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def replace(path: Path, *names: str) -> None:
    with atomic_directory(path, overwrite=True) as folder:
        fill(folder, *names, text="new")


def test_a_directory_of_the_same_names_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "out", "a", "in/b", "in/c")
    replace(tmp_path / "out", "a", "in/b", "in/c", "d")
    assert tree(tmp_path) == ["out", "out/a", "out/d", "out/in", "out/in/b", "out/in/c"]
    assert (tmp_path / "out/in/b").read_text() == "new"


@pytest.mark.parametrize("mine", ["thesis.txt", "in/thesis.txt", "in/deep/er/thesis.txt", ".hidden", "empty/"])
def test_what_others_put_there_is_never_deleted(mine: str, tmp_path: Path) -> None:
    fill(tmp_path / "out", "a", "in/b", mine)
    before = tree(tmp_path)
    sentence = f"out holds {mine}, which would be lost: give another directory, or move it away"
    with pytest.raises(FileExistsError, match=sentence):
        replace(tmp_path / "out", "a", "in/b")
    assert tree(tmp_path) == before
    assert (tmp_path / "out/a").read_text() == "ours"


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
@pytest.mark.parametrize("name", ["a", "in", "in/b"])
def test_a_link_in_the_directory_is_not_ours(name: str, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "b")
    fill(tmp_path / "out", "in/" if name == "in/b" else "a")
    (tmp_path / "out" / name).unlink(missing_ok=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=f"out holds {name}, which would be lost"):
        replace(tmp_path / "out", "a", "in/b")
    assert tree(tmp_path / "elsewhere") == ["b"]


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
@pytest.mark.parametrize("target", ["elsewhere", "empty", "nowhere"])
def test_a_link_is_not_followed(target: str, tmp_path: Path) -> None:
    """It would be another directory, that of somebody else, which is replaced."""
    fill(tmp_path / "elsewhere", "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(target)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="out is a symbolic link: name the directory itself"):
        replace(tmp_path / "out", "a")
    assert tree(tmp_path) == before


def test_the_working_directory_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "work", "thesis.txt", "run/state")
    monkeypatch.chdir(tmp_path / "work")
    for path in (".", "run/..", "../work", tmp_path / "work"):
        with pytest.raises(FileExistsError, match="work holds run/state, which would be lost"):
            replace(Path(path), "a")
    assert tree(tmp_path) == ["work", "work/run", "work/run/state", "work/thesis.txt"]


def test_ours_is_what_the_caller_says(tmp_path: Path) -> None:
    fill(tmp_path / "out", "a", "old")
    with (
        pytest.raises(FileExistsError, match="out holds old"),
        atomic_directory(tmp_path / "out", overwrite=True, ours=named("a")),
    ):
        pass
    with atomic_directory(tmp_path / "out", overwrite=True, ours=named(("a", "old"))):
        pass
    assert tree(tmp_path) == ["out"]


def test_what_comes_while_the_directory_steps_aside_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "a")
    check = atomic._refuse_others

    def check_and_add(path: Path, *rest: object) -> None:
        check(path, *rest)
        if path.name == "out":
            fill(path, "thesis.txt")

    monkeypatch.setattr(atomic, "_refuse_others", check_and_add)
    with pytest.raises(FileExistsError, match=r"out holds thesis\.txt"):
        replace(tmp_path / "out", "a")
    assert tree(tmp_path) == ["out", "out/a", "out/thesis.txt"]


def test_removing_a_folder_keeps_what_is_not_ours(tmp_path: Path) -> None:
    fill(tmp_path / "state", "a", "in/b", "in/mine", "all/c")
    remove_folder(tmp_path / "state", named(("a", "in/b", "all/c")))
    assert tree(tmp_path) == ["state", "state/in", "state/in/mine"]
    remove_folder(tmp_path / "state", lambda *_: True)
    assert tree(tmp_path) == []
    remove_folder(tmp_path / "state", lambda *_: True)  # which is not there


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_removing_follows_no_link(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "a")
    fill(tmp_path / "state", "a")
    (tmp_path / "state/link").symlink_to("../elsewhere")
    (tmp_path / "other").symlink_to("elsewhere")
    remove_folder(tmp_path / "state", lambda *_: True)
    remove_folder(tmp_path / "other", lambda *_: True)
    assert tree(tmp_path / "elsewhere") == ["a"]
    assert tree(tmp_path / "state") == ["link"]
    leftover = tmp_path / f".a.{'0' * 32}.tmp"
    leftover.symlink_to("elsewhere")
    remove_leftovers(tmp_path, lambda name: True)
    assert not leftover.is_symlink()
    assert tree(tmp_path / "elsewhere") == ["a"]


def test_names_in_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, "b", "in/a", "none/")
    assert sorted(file_names(tmp_path)) == ["b", "in/a"]
    assert first_other(tmp_path, lambda *_: True) == "none/"
    assert first_other(tmp_path / "in", named("a")) is None
