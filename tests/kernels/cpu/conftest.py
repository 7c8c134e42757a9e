"""The libraries of the C++ kernels through which their tests run."""

from __future__ import annotations

import pytest
import torch

from stepfusion_testing.cpu_kernels import VARIANTS, use_variant


@pytest.fixture(params=VARIANTS)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of images and weights, in each instruction set that this processor has."""
    return use_variant(request.param, monkeypatch)
