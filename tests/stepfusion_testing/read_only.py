"""Directories that cannot be written to, whoever runs the tests."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

import pytest

_DROP, _OVERRIDES_MODES = 24, 1  # PR_CAPBSET_DROP and CAP_DAC_OVERRIDE of Linux
#: Runs the command that follows without root's right to write whatever the modes say.
_OBEDIENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({_DROP}, {_OVERRIDES_MODES}, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def ship(cache: Path, to: Path) -> Path:
    """Move a cache to another path, and let nobody write to it."""
    shutil.copytree(cache, to)
    shutil.rmtree(cache)
    for path in (*to.rglob("*"), to):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return to


def obedient_python() -> list[str]:
    """The command of a Python that cannot write where modes forbid it; the test is skipped if root cannot do that."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return [sys.executable]
    if sys.platform != "linux" or ctypes.CDLL(None).prctl(23, _OVERRIDES_MODES, 0, 0, 0) != 1:  # PR_CAPBSET_READ
        pytest.skip("root writes everywhere here")
    return [sys.executable, "-c", _OBEDIENT, sys.executable]


def pretend_read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let this process take everything in a folder for what it cannot write to."""
    access = os.access

    def readable(path: str | os.PathLike[str], mode: int) -> bool:
        return not (mode & os.W_OK and Path(path).is_relative_to(folder)) and access(path, mode)

    monkeypatch.setattr("stepfusion.kernels.cache.os.access", readable)
