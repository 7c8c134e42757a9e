"""Which implementation of the fused sampling ops a test runs."""

from __future__ import annotations

import pytest

from stepfusion_testing.fused import FUSED, Fused, choose


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Fused:
    """Every fused implementation."""
    return choose(request.param, request)


@pytest.fixture(params=[*FUSED, "reference"])
def implementation(request: pytest.FixtureRequest) -> Fused:
    """Every implementation, the reference too."""
    return choose(request.param, request)
