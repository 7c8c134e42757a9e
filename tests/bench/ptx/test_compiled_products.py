"""Matrix products as Triton compiles them for NVIDIA GPUs: right as they are, and found without a wait."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stepfusion_testing.compiler_process import json_of
from stepfusion_testing.product_mutants import (
    CASES,
    REPEATS,
    TARGETS,
    TENSOR_PARTS,
    TENSOR_TARGET,
    UNFENCED,
)

pytest.importorskip("triton")

SUPPORT = Path(__file__).parents[2] / "stepfusion_testing"

#: What is there and need not be, and so is not always missed.
NOT_NEEDED = {
    # between the copies into the first buffers
    ("bar.sync", "before the loops"),
    # one of two: the buffer that the last products read is not the one that is filled first
    ("bar.sync", "between the loops"),
    # copies of nothing follow the last ones; what they fill with zeros is not always used again
    ("cp.async.wait_group", "between the loops"),
    ("cp.async.wait_group", "behind the loops"),
    # nobody has touched the sums since the first loop's
    ("wgmma.fence", "loop 2"),
}


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What executing the products finds."""
    executed: dict[str, Any] = json_of(tmp_path_factory, str(SUPPORT / "product_mutants.py"))
    return executed


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", [*TARGETS, TENSOR_TARGET])
def test_compiled_products_are_right_in_every_order_and_have_no_race(
    target: str, name: str, report: dict[str, Any]
) -> None:
    assert report["cases"][f"{target}, {name}"] is None


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_synchronisation_that_is_needed_is_missed(target: str, report: dict[str, Any]) -> None:
    mutants = report["mutants"][target]
    missed = [mutant for mutant in mutants if mutant["found"] is None]
    # what is there several times is missed if all of them are left out
    assert not [m for m in missed if (m["all"] or not REPEATS) and (m["what"], m["place"]) not in NOT_NEEDED]
    counts = Counter(mutant["what"] for mutant in mutants if mutant["found"] is not None)
    assert counts["bar.sync"] >= 6
    assert counts["cp.async.wait_group"] >= 4
    names = ("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "fence.proxy.async")
    assert all((counts[name] > 0) == (target == "sm_90") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "product"), [("sm_90", "wgmma"), (TENSOR_TARGET, "tcgen05.mma")])
def test_a_fence_that_triton_leaves_out_is_found(target: str, product: str, report: dict[str, Any]) -> None:
    error = report["as compiled"][target]
    assert (error is not None) == UNFENCED
    assert not UNFENCED or f"a {product} of shared memory that no fence.proxy.async" in error


@pytest.mark.slow
def test_what_is_found_says_what_is_missing(report: dict[str, Any]) -> None:
    words = {
        ("cp.async.wait_group", "loop 1"): "which nobody waited for",
        ("wgmma.wait_group", "loop 1"): "a wgmma, which nobody waited for",
        ("wgmma.fence", "loop 1"): "no wgmma.fence since",
        ("fence.proxy.async", "loop 1"): "no fence.proxy.async",
        ("bar.sync", "behind the loops"): "races",
    }
    seen = set()
    for mutant in [mutant for target in TARGETS for mutant in report["mutants"][target]]:
        key = (mutant["what"], mutant["place"])
        if key in words and mutant["found"] is not None:
            seen.add(key)
            assert words[key] in mutant["found"], mutant
    assert seen == set(words)


@pytest.mark.slow
@pytest.mark.parametrize("part", TENSOR_PARTS)
def test_what_is_missing_for_tensor_memory_is_found(part: str, report: dict[str, Any]) -> None:
    assert TENSOR_PARTS[part] in report["tensor mutants"][part]
