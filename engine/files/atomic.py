"""Files that are there whole or not at all, and files that are read only if they are what they should be."""

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new empty directory that becomes `path` when the block ends, and is removed if anything fails.

    Args:
        path: where the directory will be; its parent exists. An empty directory there is replaced.
        overwrite: replace a directory with content too; it stays untouched until the new one is complete.

    Raises:
        FileExistsError: `path` is something that may not be replaced.
        OSError: the directory cannot be written; `path` is unchanged and no temporary directory is left.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is not a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} is not empty; give another directory, or overwrite=True")
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_directory(temporary)
        _move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_directory(path.parent)


def read_json(path: Path, error: type[Exception], most: int) -> dict[str, Any]:
    """Read a JSON object of finite numbers, at most `most` bytes long; `error` names the file if it is none."""
    if not path.is_file():
        raise error(f"{path} is missing")
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    if len(data) > most:
        raise error(f"{path} is larger than {most} bytes")
    try:
        value = json.loads(data.decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON: {str(problem)[:200]}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}; accepted is an object")
    return value


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is not a finite number")
    return value


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a directory already there steps aside, and comes back if the rename fails."""
    if not path.exists():
        os.rename(temporary, path)
        return
    previous = _sibling(path)
    os.rename(path, previous)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(previous, path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


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
