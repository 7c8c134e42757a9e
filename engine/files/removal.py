"""Removing what a program wrote, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

#: Says of a folder and the name of a file in it, with ``/`` between folders, whether the program wrote that file.
Ours = Callable[[Path, str], bool]


def named(names: Iterable[str]) -> Ours:
    """What is ours by its name alone."""
    known = frozenset(names)
    return lambda _, name: name in known


def file_names(folder: Path) -> Iterator[str]:
    """The names of all regular files in a folder and its sub-folders, with ``/`` between folders."""
    return (name for name, regular in _entries(folder, "") if regular)


def first_other(folder: Path, ours: Ours) -> str | None:
    """The first name in a folder that is not a regular file accepted by `ours`; None if there is no such name."""
    others = (name for name, regular in _entries(folder, "") if not (regular and ours(folder, name)))
    return min(others, default=None)


def remove_folder(folder: Path, ours: Ours) -> None:
    """Remove the regular files of a folder that `ours` accepts, and every folder that becomes empty by it.

    A link is not followed. What is not ours stays, with the folders around it.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in [name for name, regular in _entries(folder, "") if regular and ours(folder, name)]:
        (folder / name).unlink(missing_ok=True)
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it is not empty, and so not ours alone
            os.rmdir(path)


def _entries(folder: Path, prefix: str) -> Iterator[tuple[str, bool]]:
    """Names below a folder, and whether each is a regular file; of folders, only those that are empty."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        name = prefix + entry.name
        if not entry.is_dir(follow_symlinks=False):
            yield name, entry.is_file(follow_symlinks=False)
        elif inner := list(_entries(folder / entry.name, f"{name}/")):
            yield from inner
        else:
            yield f"{name}/", False
