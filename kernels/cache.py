"""Where stepfusion keeps what took long to make: compiled kernels and networks, for the user's next process.

The directory is ``$STEPFUSION_CACHE`` or else the platform's place for caches: ``$XDG_CACHE_HOME/stepfusion`` or
``~/.cache/stepfusion`` on Linux, ``~/Library/Caches/stepfusion`` on macOS, ``%LOCALAPPDATA%\\stepfusion\\Cache`` on
Windows. It may be deleted at any time. What lies in it is executed, so it is made readable by its owner alone.
"""

from __future__ import annotations

import os
import sys
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


def make_cache_directory(name: str) -> Path | None:
    """Create the sub-directory ``name`` of :func:`cache_directory`; None if nothing can be written there."""
    try:
        directory = cache_directory() / name
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # read-only, a file in the way; RuntimeError: the user has no home directory
        return None
    return directory if os.access(directory, os.W_OK) else None
