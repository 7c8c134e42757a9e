"""Where stepfusion keeps what took long to compute: compiled networks, for the next process of the same user.

The directory is ``$STEPFUSION_CACHE`` or else the platform's place for caches: ``$XDG_CACHE_HOME/stepfusion`` or
``~/.cache/stepfusion`` on Linux, ``~/Library/Caches/stepfusion`` on macOS, ``%LOCALAPPDATA%\\stepfusion\\Cache`` on
Windows. It may be deleted at any time. What lies in it is executed, so it is made readable by its owner alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_LOCK = threading.RLock()


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
    """Create the sub-directory ``name`` of :func:`cache_directory`; None where nothing can be written there."""
    try:
        directory = cache_directory() / name
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # read-only, a file in the way; RuntimeError: the user has no home directory
        return None
    return directory if os.access(directory, os.W_OK) else None


@contextmanager
def compiler_cache() -> Iterator[None]:
    """Let Inductor keep what it compiles in this block in stepfusion's cache, one thread at a time.

    ``TORCHINDUCTOR_CACHE_DIR`` set by the user wins, and is as before after the block. Inductor itself sets it to its
    default in a temporary directory, when it is first used: that is not a user's choice. Where nothing can be
    written, Inductor's default remains.
    """
    with _LOCK:
        previous = os.environ.get(_VARIABLE)  # before the import, which can set it
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        chosen_by_user = previous is not None and previous != os.path.abspath(default_cache_dir())
        directory = None if chosen_by_user else make_cache_directory("inductor")
        if directory is None:
            yield
            return
        os.environ[_VARIABLE] = str(directory)
        try:
            yield
        finally:
            if previous is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = previous
