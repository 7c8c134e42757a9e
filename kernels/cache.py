"""Where stepfusion keeps what took long to make: compiled kernels and networks, for the user's next process.

The directory is ``$STEPFUSION_CACHE`` or else the platform's place for caches: ``$XDG_CACHE_HOME/stepfusion`` or
``~/.cache/stepfusion`` on Linux, ``~/Library/Caches/stepfusion`` on macOS, ``%LOCALAPPDATA%\\stepfusion\\Cache`` on
Windows. It may be deleted at any time. What lies in it is executed, so it is made readable by its owner alone, and
is not used if others could have written to it.

A cache that this process cannot write to, as one in a container's image, is read: what it lacks is compiled for this
process alone.
"""

from __future__ import annotations

import os
import stat
import sys
import warnings
from pathlib import Path


def cache_directory() -> Path:
    """The directory for caches; it need not exist yet."""
    chosen = os.environ.get("STEPFUSION_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "stepfusion" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "stepfusion"
    root = os.environ.get("XDG_CACHE_HOME") or ""
    # The XDG specification: a relative path is invalid and is to be ignored.
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "stepfusion"


_COMPILED: list[str] = []  # what this process had to compile, for no cache had it


def make_cache_directory(name: str) -> Path | None:
    """Create the sub-directory ``name`` of :func:`cache_directory`.

    Returns:
        the directory; None if nothing can be written there, or if others could write there too, which is a warning.
    """
    try:
        directory = cache_directory() / name
        directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.mkdir(exist_ok=True, mode=0o700)
        return directory if os.access(directory, os.W_OK) and _is_private(directory) else None
    except (OSError, RuntimeError):  # read-only, a file in the way; RuntimeError: the user has no home directory
        return None


def shipped_directory(name: str) -> Path | None:
    """The sub-directory ``name`` of a cache that this process can read and not write to.

    Returns:
        the directory; None if it is not there, if it can be written to, or if others could write to it, which is a
        warning.
    """
    try:
        directory = cache_directory() / name
        found = directory.is_dir() and os.access(directory, os.R_OK | os.X_OK) and not os.access(directory, os.W_OK)
        return directory if found and _is_private(directory) else None
    except (OSError, RuntimeError):
        return None


def note_compiled(what: str) -> None:
    """Remember that this process compiled something which no cache had."""
    _COMPILED.append(what)


def compiled_anew() -> tuple[str, ...]:
    """What this process compiled, for no cache had it, in order."""
    return tuple(_COMPILED)


def _is_private(directory: Path) -> bool:
    """Whether a directory may be used; if not, a warning says why. OSError if it cannot be looked at."""
    reason = why_not_private(directory)
    if reason is not None:
        message = f"the cache {directory} is not used, for code in it would be run: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return reason is None


def why_not_private(directory: Path) -> str | None:
    """The reason why somebody beside this user and root could change what a directory holds; None if nobody could.

    The folders around it count as well: who may rename a folder may put another in its place. A folder with the
    sticky bit, such as /tmp, lets nobody rename what belongs to others. On Windows nothing is checked.
    """
    if not hasattr(os, "geteuid"):
        return None
    user = os.geteuid()
    places = dict.fromkeys((directory, directory.resolve()))
    for place in dict.fromkeys(folder for path in places for folder in (path, *path.parents)):
        status = place.stat()
        if status.st_uid not in (user, 0):
            return f"{place} belongs to another user"
        if (place in places or not status.st_mode & stat.S_ISVTX) and _others_may_write(status, user):
            return f"others may write to {place} (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _others_may_write(status: os.stat_result, user: int) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid, user)


def _is_own_group(group: int, user: int) -> bool:
    """Whether a group has no other member, as the one that many systems make for each user."""
    import grp
    import pwd

    try:
        name, found = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}
