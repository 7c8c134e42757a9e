"""Benchmarks run when they are asked for, and tests of the benchmarks on one thread."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only measures, unless ``--benchmark-only`` asks for it."""
    if config.getoption("benchmark_only", default=False):
        return
    for item in items:
        if item.path.name.startswith("test_speed_"):
            item.add_marker(pytest.mark.skip(reason="measures: run with --benchmark-only, and without xdist"))


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> None:
    """Benchmarks keep what is set."""
    if not request.path.name.startswith("test_speed_"):
        request.getfixturevalue("one_thread")
