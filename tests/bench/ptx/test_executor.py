"""Launches as the executor runs them: what Triton's layouts need, whose memory may be read, and what was reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepfusion_testing.compiler_process import json_of
from stepfusion_testing.executed_kernels import LAUNCHES

pytest.importorskip("triton")

CONTROLS = Path(__file__).parents[2] / "stepfusion_testing" / "executed_kernels.py"


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What executing the controls finds."""
    report: dict[str, Any] = json_of(tmp_path_factory, str(CONTROLS))
    return report


@pytest.mark.slow
def test_reductions_scans_and_layouts_give_pytorchs_results(found: dict[str, Any]) -> None:
    assert len(found["layouts"]) == 6
    assert not {name: wrong for name, wrong in found["layouts"].items() if wrong is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_reads_and_writes_what_it_may(name: str, found: dict[str, Any]) -> None:
    words, fault = LAUNCHES[name][1], found["faults"][name]
    assert (fault is None) == (words is None)
    assert words is None or words in fault
    assert fault is None or "(executed_kernels.py:" in fault


@pytest.mark.slow
def test_a_race_shows_in_the_log_and_in_the_order_of_warps(found: dict[str, Any]) -> None:
    assert found["racing"] is None
    assert "bytes of races, first in global memory: write executed_kernels.py:" in found["racing, logged"]
    assert "bytes are other ones if the order of the warps is 'warps reversed'" in found["racing, in two orders"]


@pytest.mark.slow
def test_coverage_names_the_block_that_no_launch_came_to(found: dict[str, Any]) -> None:
    coverage = found["coverage"]
    (block,) = coverage["missed"][0]
    assert block["instructions"] > 1
    assert all(line.startswith("executed_kernels.py:") for line in block["lines"])
    assert coverage["missed"][1] == []
    assert coverage["instructions"][0] == coverage["instructions"][1] > block["instructions"]
    assert coverage["launches"] == 2
