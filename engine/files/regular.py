"""Files that are opened only if they are regular files, in the folder where they are looked for.

A directory that a program goes on with may have been changed by others since: a file may be a link to somewhere else,
a pipe that nobody writes to, or a device. Such a thing is neither followed, nor waited for, nor written to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path, PurePosixPath

# Windows has none of these: there, what is not a regular file is told by a look at it before it is opened.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # the opening of a pipe waits for its other end without this
_FOLDER = getattr(os, "O_DIRECTORY", 0)
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_LOOKS_UP_IN_FOLDERS = os.open in os.supports_dir_fd and bool(_NO_FOLLOW and _FOLDER)

_KINDS = (
    (stat.S_ISLNK, "a symbolic link, which is not followed"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotARegularFileError(OSError):
    """A link, a folder, a pipe, a socket or a device stands where a regular file was to be opened."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(errno.EINVAL, f"it is {what}; accepted is a regular file", os.fspath(path))


def open_regular(path: str | os.PathLike[str], *, follow: bool = False) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: the file. Folders on its way may be links.
        follow: also follow a link at `path` itself: right for what a user names, wrong for what a program wrote.

    Raises:
        NotARegularFileError: something else is there.
        OSError: nothing is there, or it may not be read.
    """
    return os.fdopen(_open(path, os.O_RDONLY, follow=follow), "rb")


def append_regular(path: str | os.PathLike[str]) -> BufferedWriter:
    """Open a regular file to add to its end; it is made if nothing is there, and links are not followed.

    Raises:
        NotARegularFileError: something else is there.
        OSError: the file may not be written.
    """
    return os.fdopen(_open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "ab")


def read_regular(path: str | os.PathLike[str], most: int, *, follow: bool = False) -> bytes:
    """Read a whole regular file of at most `most` bytes.

    Raises:
        NotARegularFileError: something else is there.
        OSError: it cannot be read, or is larger.
    """
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, most) + 1)  # as many bytes as that are set aside before they are read
    if max(size, len(data)) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes", os.fspath(path))
    return data


def create_in(folder: Folder, name: str) -> BufferedWriter:
    """Create a file of a new name in an open folder, for writing; FileExistsError if anything has that name."""
    return os.fdopen(_open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder=folder), "wb")


def check_replaceable(folder: Folder, name: str) -> None:
    """NotARegularFileError if something that is no regular file has this name in an open folder."""
    _refuse_unless_regular(os.fspath(folder.path / name), folder.at(name), folder.descriptor, follow=False)


def open_below(root: str | os.PathLike[str], name: str) -> BufferedReader:
    """Open the regular file ``root/name`` for reading; no part of `name` may be a link.

    Args:
        root: a directory, which may be reached by links.
        name: of the file, with ``/`` between folders, none of which is ``..``.

    Raises:
        NotARegularFileError: a part of the name is a link, or the file is no regular file.
        OSError: it cannot be read.
    """
    with parent_below(root, name) as (folder, last):
        return os.fdopen(_open(last, os.O_RDONLY, folder=folder), "rb")


class Folder:
    """A directory that is held open, so that names are looked up in it even if its path comes to mean another.

    Attributes:
        path: for messages, and for systems that cannot look up names in an open directory.
        descriptor: of the open directory; None on such systems.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self.descriptor = path, descriptor

    def at(self, name: str) -> str:
        """What to hand to functions of ``os`` together with ``dir_fd=descriptor``."""
        return os.fspath(self.path / name) if self.descriptor is None else name


@contextmanager
def folder_below(root: str | os.PathLike[str], name: str = ".") -> Iterator[Folder]:
    """Hold the folder ``root/name`` open; no part of `name` may be a link.

    Raises:
        NotARegularFileError: a part of the name is a link or no folder.
        OSError: the folder is missing, or may not be opened.
        ValueError: `name` leads out of `root`.
    """
    parts = _parts(root, name)
    path = Path(root)
    if not _LOOKS_UP_IN_FOLDERS:
        for part in parts:
            path = path / part
            _refuse_unless_folder(path, os.lstat(path))
        yield Folder(path, None)
        return
    descriptor = os.open(path, os.O_RDONLY | _FOLDER | _PLAIN)
    try:
        for part in parts:
            path = path / part
            inner = _open_folder(path, part, descriptor)
            os.close(descriptor)
            descriptor = inner
        yield Folder(path, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def parent_below(root: str | os.PathLike[str], name: str) -> Iterator[tuple[Folder, str]]:
    """Hold the folder of the file ``root/name`` open, as :func:`folder_below` does; yields it and the file's name."""
    parts = _parts(root, name)
    if not parts:
        raise ValueError(f"{name!r} is not the name of a file below {os.fspath(root)}")
    with folder_below(root, "/".join(parts[:-1])) as folder:
        yield folder, parts[-1]


def _parts(root: str | os.PathLike[str], name: str) -> tuple[str, ...]:
    """The parts of a name that stays below `root`, on every system."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of something below {os.fspath(root)}")
    return path.parts


def _open_folder(path: Path, name: str, parent: int) -> int:
    try:
        return os.open(name, os.O_RDONLY | _FOLDER | _NO_FOLLOW | _PLAIN, dir_fd=parent)
    except OSError:
        _refuse_unless_folder(path, os.stat(name, dir_fd=parent, follow_symlinks=False))
        raise


def _refuse_unless_folder(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise NotARegularFileError(path, f"{_kind(found.st_mode)}, and no folder")


def _open(path: str | os.PathLike[str], flags: int, *, follow: bool = False, folder: Folder | None = None) -> int:
    """A descriptor of a regular file; with `folder`, `path` is a name in it."""
    shown = os.fspath(path) if folder is None else os.fspath(folder.path / path)
    where = os.fspath(path) if folder is None else folder.at(os.fspath(path))
    parent = None if folder is None else folder.descriptor
    if not follow and not _NO_FOLLOW and os.path.islink(where):
        raise NotARegularFileError(shown, _kind(stat.S_IFLNK))
    try:
        descriptor = os.open(where, flags | _NO_WAIT | _PLAIN | (0 if follow else _NO_FOLLOW), 0o666, dir_fd=parent)
    except OSError as error:
        _refuse_unless_regular(shown, where, parent, follow)
        raise OSError(error.errno, error.strerror, shown) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise NotARegularFileError(shown, _kind(mode))


def _refuse_unless_regular(shown: str, where: str, parent: int | None, follow: bool) -> None:
    """Say what kept a file from being opened, if that is what it is: systems have many error numbers for it."""
    try:
        mode = os.stat(where, dir_fd=parent, follow_symlinks=follow).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise NotARegularFileError(shown, _kind(mode)) from None


def _kind(mode: int) -> str:
    return next((text for test, text in _KINDS if test(mode)), "no file")
