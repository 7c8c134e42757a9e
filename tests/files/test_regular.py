"""What is opened is a regular file: links, pipes, devices and folders are refused at once, and by name."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from stepfusion.files import regular
from stepfusion.files.atomic import atomic_write_below
from stepfusion.files.regular import (
    NotARegularFileError,
    append_regular,
    folder_below,
    open_below,
    open_regular,
    read_regular,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fspath(path))


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to a file": (lambda path: path.symlink_to("thesis.txt"), "a symbolic link, which is not followed"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "a symbolic link, which is not followed"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "a symbolic link, which is not followed"),
    "a pipe": (os.mkfifo, "a pipe"),
    "a folder": (Path.mkdir, "a folder"),
    "a socket": (make_socket, "a socket"),
}


def content(file: IO[bytes]) -> bytes:
    with file:
        return file.read()


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Something that is no regular file, beside a file of the user's; and what it is."""
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    (tmp_path / "thesis.txt").write_text("mine")
    make, what = OTHERS[request.param]
    make(Path("data.bin"))
    return Path("data.bin"), what


@pytest.mark.parametrize("open_file", [open_regular, append_regular, lambda path: open_below(".", str(path))])
def test_what_is_no_regular_file_is_refused(other: tuple[Path, str], open_file: Callable[[Path], object]) -> None:
    path, what = other
    with pytest.raises(NotARegularFileError) as caught:
        open_file(path)
    assert caught.value.strerror == f"it is {what}; accepted is a regular file"
    assert caught.value.filename == "data.bin"
    assert Path("thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("found", ["a link to a file", "a pipe", "a folder"])
def test_the_check_before_opening_tells_the_same(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows cannot refuse links while it opens a file, nor look up a name in an open folder."""
    monkeypatch.setattr(regular, "_NO_FOLLOW", 0)
    monkeypatch.setattr(regular, "_LOOKS_UP_IN_FOLDERS", False)
    make, what = OTHERS[found]
    make(tmp_path / "data.bin")
    (tmp_path / "thesis.txt").write_text("mine")
    for open_file in (open_regular, lambda path: open_below(path.parent, path.name)):
        with pytest.raises(NotARegularFileError, match=what):
            open_file(tmp_path / "data.bin")
    (tmp_path / "in").mkdir()
    atomic_write_below(tmp_path, "in/a", b"new")
    assert content(open_below(tmp_path, "in/a")) == b"new"
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(NotARegularFileError, match="a symbolic link, which is not followed, and no folder"):
        atomic_write_below(tmp_path, "link/a", b"never")


def test_a_user_may_name_a_link(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"pixels")
    (tmp_path / "link").symlink_to("picture")
    assert content(open_regular(tmp_path / "link", follow=True)) == b"pixels"
    (tmp_path / "to a pipe").symlink_to("pipe")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotARegularFileError, match="it is a pipe"):
        open_regular(tmp_path / "to a pipe", follow=True)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    for open_file in (open_regular, lambda path: open_below(tmp_path, "no/file"), lambda path: read_regular(path, 9)):
        with pytest.raises(FileNotFoundError):
            open_file(tmp_path / "file")


def test_a_file_is_read_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes") as caught:
        read_regular(tmp_path / "a", 4)
    assert caught.value.errno == errno.EFBIG


def test_appending_makes_a_file_and_adds_to_it(tmp_path: Path) -> None:
    for line in (b"1\n", b"2\n"):
        with append_regular(tmp_path / "log") as file:
            file.write(line)
    assert (tmp_path / "log").read_bytes() == b"1\n2\n"


def test_no_folder_on_the_way_is_a_link(tmp_path: Path) -> None:
    """What a name means is looked up below the root and nowhere else."""
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/file").write_text("mine")
    (tmp_path / "root/real").mkdir(parents=True)
    (tmp_path / "root/link").symlink_to("../elsewhere")
    (tmp_path / "root/real/link").symlink_to("../../elsewhere/deep")
    for name in ("link/deep/file", "real/link/file"):
        with pytest.raises(NotARegularFileError, match="a symbolic link, which is not followed, and no folder"):
            open_below(tmp_path / "root", name)
        with pytest.raises(NotARegularFileError, match="a symbolic link, which is not followed, and no folder"):
            atomic_write_below(tmp_path / "root", name, b"never")
    assert (tmp_path / "elsewhere/deep/file").read_text() == "mine"
    (tmp_path / "way").symlink_to("root")  # the root itself is the user's to name
    atomic_write_below(tmp_path / "way", "real/file", b"ours")
    assert content(open_below(tmp_path / "way", "real/file")) == b"ours"
    assert sorted(os.listdir(tmp_path / "root/real")) == ["file", "link"]


@pytest.mark.parametrize("name", ["../file", "real/../../file", "/etc/passwd", "real\\..\\file", "c:file", "", "."])
def test_a_name_does_not_lead_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "root/real").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    for use in (open_below, lambda root, name: atomic_write_below(root, name, b"never")):
        with pytest.raises(ValueError, match=r"is not the name of (something|a file) below"):
            use(tmp_path / "root", name)
    assert (tmp_path / "file").read_text() == "mine"


def test_names_are_looked_up_in_the_folder_that_was_opened(tmp_path: Path) -> None:
    """Negative control: the path comes to mean another folder while it is held open."""
    (tmp_path / "root/in").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    with folder_below(tmp_path / "root", "in") as folder:
        (tmp_path / "root/in").rename(tmp_path / "root/was in")
        (tmp_path / "root/in").symlink_to("../elsewhere")
        assert folder.path == tmp_path / "root/in"
        with regular.create_in(folder, "file") as file:
            file.write(b"ours")
    assert (tmp_path / "root/was in/file").read_bytes() == b"ours"
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("found", OTHERS)
def test_writing_below_replaces_regular_files_alone(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("thesis.txt").write_text("mine")
    OTHERS[found][0](Path("data.bin"))
    before = sorted(os.listdir())
    with pytest.raises(NotARegularFileError):
        atomic_write_below(".", "data.bin", b"never")
    assert sorted(os.listdir()) == before
    assert Path("thesis.txt").read_text() == "mine"


def test_a_failed_write_below_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_below(tmp_path, "a", b"old")

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, no_space)
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                atomic_write_below(tmp_path, "a", b"never")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
