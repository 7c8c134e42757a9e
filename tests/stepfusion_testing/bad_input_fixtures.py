"""Fixtures of the tests of bad input: a folder with a good model, and a watch over the network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepfusion.networks import UNet2D
from stepfusion_testing.bad_input import (
    CALLS,
    network,
)
from stepfusion_testing.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, the same for all tests."""
    return save_tiny_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def bad_input_workspace(good_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory that holds a copy of the good model directory."""
    shutil.copytree(good_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_network_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network is called."""
    monkeypatch.setattr(UNet2D, "forward", network)
    CALLS.clear()
    yield
    assert not CALLS
