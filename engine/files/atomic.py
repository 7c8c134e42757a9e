"""Files and directories that are there whole or not at all, and that replace nothing which others have put there."""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stepfusion.files.json_files import read_json as read_json
from stepfusion.files.regular import check_replaceable, create_in, parent_below
from stepfusion.files.removal import Ours, file_names, first_other, named, remove_folder

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")


def write_synced(path: str | os.PathLike[str], data: bytes) -> None:
    """Create `path`, which must not exist, with `data`, and wait until it and its directory entry are on disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(Path(path).parent)


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, replacing what is there; a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the file cannot be written; `path` is unchanged and no temporary file is left.
    """
    with atomic_file(path) as file:
        file.write(data)


def atomic_write_below(root: str | os.PathLike[str], name: str, data: bytes) -> None:
    """Write `data` to the file ``root/name``, as :func:`atomic_write` does, and to nowhere else.

    Args:
        root: a directory, which may be reached by links.
        name: of the file, with ``/`` between folders, which exist and are no links.
        data: what the file will hold.

    Raises:
        NotARegularFileError: a folder of the name is a link, or something stands at the name that is no regular file.
        OSError: the file cannot be written; it is unchanged and no temporary file is left.
    """
    with parent_below(root, name) as (folder, last):
        temporary = _sibling(Path(last)).name
        check_replaceable(folder, last)
        try:
            with create_in(folder, temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            at, fd = folder.at, folder.descriptor
            os.replace(at(temporary), at(last), src_dir_fd=fd, dst_dir_fd=fd)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(folder.at(temporary), dir_fd=folder.descriptor)
            raise
        if folder.descriptor is not None:
            os.fsync(folder.descriptor)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a new binary file that becomes `path` when the block ends, on disk, and is removed if anything fails.

    Raises:
        OSError: the file cannot be written; `path` is unchanged and no temporary file is left.
    """
    path = Path(path)
    temporary = _sibling(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def publish_once(path: str | os.PathLike[str], data: bytes) -> bool:
    """Write `data` to `path` if nothing is there, whole or not at all; returns False if something is.

    Of several processes that publish at once, one wins.
    """
    path = Path(path)
    temporary = _sibling(path)
    try:
        write_synced(temporary, data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)
    return True


def remove_leftovers(directory: Path, of: Callable[[str], bool]) -> None:
    """Remove what killed processes were writing in `directory`, if `of` accepts the name that it was to get."""
    for path in directory.glob(".*.tmp"):
        name = _TEMPORARY.fullmatch(path.name)
        if name is None or not of(name["name"]):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, overwrite: bool = False, ours: Ours | None = None
) -> Iterator[Path]:
    """Yield a new empty directory that becomes `path` when the block ends, and is removed if anything fails.

    Args:
        path: where the directory will be; its parent exists. An empty directory there is replaced.
        overwrite: replace a directory with content too, if all of it is ours; it stays untouched until the new one is
            complete.
        ours: says of a folder and the name of a file in it, with ``/`` between folders, whether that file may be
            lost; by default the files may whose names the new directory has.

    Raises:
        FileExistsError: `path` is something that may not be replaced: a file, a link, or a directory with content
            that is not ours.
        OSError: the directory cannot be written; `path` is unchanged and no temporary directory is left.
    """
    path = _with_real_parent(Path(path))
    if path.is_symlink():
        raise FileExistsError(f"{path} is a symbolic link: name the directory itself")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is not a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} is not empty; give another directory, or overwrite=True")
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_directory(temporary)
        _move_into_place(temporary, path, ours or named(file_names(temporary)))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent)


def _with_real_parent(path: Path) -> Path:
    """`path` without links on its way; a link at `path` itself stays one."""
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _move_into_place(temporary: Path, path: Path, ours: Ours) -> None:
    """Rename `temporary` to `path`; a directory already there steps aside, and comes back if the rename fails.

    What stepped aside is looked at again before it is removed: others may have added to it a moment ago.
    """
    if not path.exists():
        os.rename(temporary, path)
        return
    _refuse_others(path, path, ours)
    previous = _sibling(path)
    os.rename(path, previous)
    try:
        _refuse_others(previous, path, ours)
        os.rename(temporary, path)
    except BaseException:
        os.rename(previous, path)
        raise
    remove_folder(previous, ours)


def _refuse_others(path: Path, shown: Path, ours: Ours) -> None:
    other = first_other(path, ours)
    if other is not None:
        raise FileExistsError(f"{shown} holds {other}, which would be lost: give another directory, or move it away")


def _sibling(path: Path) -> Path:
    """Return an unused hidden name beside `path`, so that a rename between the two stays on one file system."""
    return path.parent / f".{path.name[:100]}.{uuid.uuid4().hex}.tmp"


def _sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk (POSIX only: elsewhere a directory cannot be opened)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
