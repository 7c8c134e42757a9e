"""What stands in the directory of a job: files and folders under this program's names, which must be what it writes.

Others may have put a link, a pipe or a folder of their own in the place of one. It is then neither followed, nor
waited for, nor replaced: the job is refused until they have moved it away.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from stepfusion.bulk.job import ENGINE, IMAGES, JOB, LABELS, PROMPTS, SUFFIXES, read_job
from stepfusion.errors import BulkError
from stepfusion.files.regular import Folder, folder_below

REPORT, METADATA = "report.json", "metadata.csv"
LOCK, FINISH_LOCK = ".lock", ".finish.lock"

_FILE, _FOLDER = "a file", "a folder"
_FILES = re.compile(
    rf"{'|'.join(map(re.escape, (JOB, ENGINE, LABELS, PROMPTS, REPORT)))}"
    r"|manifest(-\d+)?\.jsonl|samples_\d+(x\d+){3}\.npz"
)
_LOCKS = re.compile(rf"{re.escape(LOCK)}(-\d+)?|{re.escape(FINISH_LOCK)}")
_SHARDS = re.compile(rf"\d{{6}}({'|'.join(map(re.escape, SUFFIXES.values()))})")
_IN_A_FOLDER = re.compile(rf"\d{{10}}\.png|{re.escape(METADATA)}")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")
_KINDS = (
    (stat.S_ISREG, _FILE),
    (stat.S_ISDIR, _FOLDER),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a pipe"),
)


def is_file_of_job(name: str) -> bool:
    """Whether a file in the directory of a job is this program's, by its name; its locks are not meant."""
    return _FILES.fullmatch(name) is not None


def is_shard(name: str) -> bool:
    """Whether a shard may have this name."""
    return _SHARDS.fullmatch(name) is not None


def is_in_a_folder(name: str) -> bool:
    """Whether a file in a shard that is a folder is this program's, by its name."""
    return _IN_A_FOLDER.fullmatch(name) is not None


def check_out(out: Path) -> None:
    """Check that ``out`` is, or can become, the directory of a job, and that nobody has put anything else into it.

    Raises:
        ValueError: it is a file, cannot be made, or holds other files and no job.
        BulkError: it holds a job that is damaged, or something else in place of one of a job's files.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file; it must be a directory")
    if not out.exists():
        if not out.absolute().parent.is_dir():
            raise ValueError(f"out {out} cannot be made: {out.absolute().parent} is not a directory")
        return
    if not os.path.lexists(out / JOB):
        others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
        if others:
            raise ValueError(
                f"out {out} holds {others[0]} and no {JOB}: name a new directory, or one of this command"
            )
    refuse_others(out)
    if os.path.lexists(out / JOB):
        read_job(out)


def refuse_others(out: Path) -> None:
    """BulkError if something that this program does not write stands under one of its names in ``out``."""
    with folder_below(out) as folder:
        for name, status in _refuse(folder, _kind_in_job):
            if _LOCKS.fullmatch(name) and status.st_size:
                raise BulkError(f"{out / name} is not empty, as the lock of a job is: move it away")
    if (out / IMAGES).is_dir():
        with folder_below(out, IMAGES) as images:
            list(_refuse(images, _kind_in_images))


def refuse_other_shard(out: Path, name: str) -> None:
    """BulkError if something that this program does not write stands where it is to write a shard."""
    with folder_below(out, IMAGES) as images:
        try:
            found = os.stat(images.at(name), dir_fd=images.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return
        _refuse_kind(out / IMAGES / name, found.st_mode, _kind_of_shard(name))
    if stat.S_ISDIR(found.st_mode):
        with folder_below(out, f"{IMAGES}/{name}") as folder:
            for name, _ in _refuse(folder, lambda _: _FILE):
                if not is_in_a_folder(name):
                    raise BulkError(f"{folder.path / name} is not of this job, and would be lost: move it away")


def entries_of(folder: Folder) -> list[os.DirEntry[str]]:
    """What is in a folder."""
    with os.scandir(folder.path if folder.descriptor is None else folder.descriptor) as found:
        return list(found)


def _refuse(folder: Folder, kind_of: Callable[[str], str | None]) -> Iterator[tuple[str, os.stat_result]]:
    """Refuse entries that are of another kind than their names say; yields the others that ``kind_of`` knows."""
    for entry in entries_of(folder):
        wanted = kind_of(entry.name)
        if wanted is None:
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # another process finished writing it, and gave it its name
            continue
        _refuse_kind(folder.path / entry.name, status.st_mode, wanted)
        yield entry.name, status


def _refuse_kind(path: Path, mode: int, wanted: str) -> None:
    kind = next((text for test, text in _KINDS if test(mode)), "a device or socket")
    if kind != wanted:
        raise BulkError(f"{path} is {kind}, and a job has {wanted} there: move it away")


def _kind_in_job(name: str) -> str | None:
    if name == IMAGES:
        return _FOLDER
    of = _TEMPORARY.fullmatch(name)
    ours = is_file_of_job(of["name"] if of else name) or _LOCKS.fullmatch(name)
    return _FILE if ours else None


def _kind_in_images(name: str) -> str | None:
    of = _TEMPORARY.fullmatch(name)
    shard = of["name"] if of else name
    return _kind_of_shard(shard) if is_shard(shard) else None


def _kind_of_shard(name: str) -> str:
    return _FILE if Path(name).suffix else _FOLDER
