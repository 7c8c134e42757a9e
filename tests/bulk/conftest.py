"""A working directory with a small class-conditional model, and one thread."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepfusion_testing.tiny_model import save_tiny_model


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """The directory, in which a test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STEPFUSION_BACKEND", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_tiny_model(tmp_path / "model")
    return tmp_path
