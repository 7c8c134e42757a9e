"""PyTorch's archives (``.pt2``, ``.ep``): looked at before anything of them is unpacked.

A ``.pt2`` file is a zip archive, and PyTorch unpacks an entry to wherever its name leads: a name with ``..`` in it is
written outside the folder that it is unpacked into. What PyTorch itself writes has plain names and is not compressed,
so whatever is otherwise was made by somebody else.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path

from stepfusion.errors import ExportError

_MOST_ENTRIES = 1 << 16
_ENCRYPTED = 1  # the bit of an entry's flags


def check_archive(path: Path) -> None:
    """Refuse a file that is no archive as PyTorch writes it.

    Raises:
        ExportError: it is no zip archive; an entry's name leads out of it, stands twice, or is another in the entry's
            own header; an entry is a link, compressed or encrypted; or the entries claim more bytes than there are.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for fault in (_fault_of_all(entries, path.stat().st_size), *map(_fault_of, entries)):
                if fault is not None:
                    raise ExportError(f"{path.name} is no archive that PyTorch wrote: {fault}")
            for entry in entries:
                archive.open(entry).close()  # compares the name with that in the entry's own header
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ExportError(f"{path.name} is no archive that PyTorch wrote: {error}") from None


def has_entries(path: Path, folder: str) -> bool:
    """Whether a checked archive has an entry in a folder, which stands below the one folder of the whole archive."""
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2].startswith(folder) for name in archive.namelist())


def _fault_of_all(entries: Sequence[zipfile.ZipInfo], size: int) -> str | None:
    """What is wrong with the entries taken together; None if nothing is."""
    if len(entries) > _MOST_ENTRIES:
        return f"it has {len(entries)} entries, and at most {_MOST_ENTRIES} are accepted"
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size:
        return f"its entries claim {claimed} bytes, and the file has {size}"
    names = [entry.orig_filename for entry in entries]
    if len(set(names)) < len(names):
        return f"it has two entries {next(name for name in names if names.count(name) > 1)!r}"
    return None


def _fault_of(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with an entry; None if nothing is."""
    name = entry.orig_filename  # ``filename`` ends at the first NUL
    if not _is_plain(name):
        return f"its entry {name!r} is not the name of a file inside it"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return f"its entry {name!r} is a link"
    if entry.flag_bits & _ENCRYPTED:
        return f"its entry {name!r} is encrypted"
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        return f"its entry {name!r} is compressed"
    return None


def _is_plain(name: str) -> bool:
    """True if a name is that of a file below the folder that it is unpacked into, on every system."""
    parts = name.split("/")
    return name.isprintable() and not any(mark in name for mark in "\\:") and not {"", ".", ".."} & {*parts}
