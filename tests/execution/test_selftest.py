"""The self-test of ``stepfusion env``: it passes, and it can fail."""

import math
import subprocess
from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.execution import selftest
from stepfusion.kernels import backend, reference
from stepfusion.kernels.cpu.sampling_library import why_not_sampling_kernels

CPU = torch.device("cpu")


@pytest.mark.interpreter
def test_fused_equals_reference_here() -> None:
    plain, *fused = selftest.self_test(CPU)
    assert plain.passed
    assert plain.error > 0
    product = fused.pop(-2)
    assert product.name == "fused product of a shortcut against float64"
    assert 0 < product.error <= product.allowed < 1
    wanted = ["C++ step against reference"] if why_not_sampling_kernels() is None else []
    wanted.append("fused step against reference")
    assert fused == [selftest.Check(name, 0.0, 0.0) for name in wanted]


def test_a_process_of_its_own_runs_the_interpreter() -> None:
    if not backend.HAS_TRITON:
        pytest.skip("Triton is not installed")
    check = selftest.self_test_in_interpreter()
    assert check == selftest.Check("fused step against reference, in Triton's interpreter", 0.0, 0.0)


def test_a_process_that_fails_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no such module\n")

    monkeypatch.setattr(subprocess, "run", failing)
    check = selftest.self_test_in_interpreter()
    assert not check.passed
    assert math.isnan(check.error)
    assert check.name.endswith("it did not run (ImportError: no such module)")


@pytest.mark.interpreter
def test_control_a_wrong_product_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in which the last channel of the skip input is missing."""
    honest = kernels.add_projection_doubled

    def wrong(image: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        skip[:, -1] = 0
        return honest(image, x, weight, skip=skip)

    monkeypatch.setattr(kernels, "add_projection_doubled", wrong)
    assert [check.passed for check in selftest.self_test(CPU)][-2:] == [False, True]


def test_control_a_wrong_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reference.diffusion_step

    def wrong(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        result = honest(x, *arguments, **options)
        return result * (1 + 1e-3) if x.dtype == torch.float32 else result

    monkeypatch.setattr(reference, "diffusion_step", wrong)
    assert not any(check.passed for check in selftest.self_test(CPU) if "step" in check.name)
