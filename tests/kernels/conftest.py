"""Which implementation of the fused sampling ops a test runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepfusion_testing.aarch64 import build, why_not_emulated
from stepfusion_testing.fused import FUSED, Fused, choose


@pytest.fixture(scope="session")
def aarch64_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ sampling kernels as a program for AArch64."""
    if (reason := why_not_emulated()) is not None:
        pytest.skip(reason)
    return build(tmp_path_factory.mktemp("aarch64"))


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Fused:
    """Every fused implementation."""
    return choose(request.param, request)


@pytest.fixture(params=[*FUSED, "reference"])
def implementation(request: pytest.FixtureRequest) -> Fused:
    """Every implementation, the reference too."""
    return choose(request.param, request)
