"""The comparisons that hold an executed kernel to its reference, and the report of them."""

from __future__ import annotations

import math

import pytest
import torch

from stepfusion.bench.ptx import report
from stepfusion.bench.ptx.agreement import Disagreement, largest, same_bits, within
from stepfusion.bench.ptx.executor import NVIDIA
from stepfusion.bench.ptx.inputs import Case, shifted, strided
from stepfusion.bench.ptx.types import Fault

ONE = torch.tensor([1.0, -0.0, math.nan, math.inf])


def test_bits_are_compared_with_signs_and_any_nan() -> None:
    same_bits("x", ONE, ONE.clone())
    same_bits("x", torch.tensor([7], dtype=torch.uint8), torch.tensor([7], dtype=torch.uint8))
    for changed in (torch.tensor([1.0, 0.0, math.nan, math.inf]), ONE.nextafter(torch.tensor(0.0)), ONE.nan_to_num()):
        with pytest.raises(Disagreement, match=r"x: \d of 4 differ, first at \[\d\]"):
            same_bits("x", changed, ONE)
    with pytest.raises(Disagreement, match=r"x: torch\.float64 \[4\] instead of torch\.float32 \[4\]"):
        same_bits("x", ONE.double(), ONE)


def test_a_bound_is_kept_and_nan_stays_in_its_place() -> None:
    within("x", ONE + 0.5, ONE.double(), 0.5)
    with pytest.raises(Disagreement, match=r"x: 2 of 4 are more than 0\.4 apart"):
        within("x", ONE + 0.5, ONE.double(), 0.4)
    with pytest.raises(Disagreement, match="1 of 4"):
        within("x", ONE.nan_to_num(nan=0.0, posinf=math.inf), ONE.double(), 1.0)
    assert largest(ONE) == 1.0
    assert largest(torch.tensor([math.nan])) == 0.0


def test_inputs_lie_where_they_should() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(shifted(x, 1), x)
    assert shifted(x, 1).data_ptr() % 16 == 4
    assert torch.equal(strided(x), x)
    assert not strided(x).is_contiguous()


class _Stub:
    """An executor that runs nothing."""

    def __init__(self, target: str) -> None:
        self.target, self.case = target, ""
        self.launches, self.elements, self.programs = {"k": 2}, {"k": 10}, {}


def _raises(error: Exception) -> Case:
    def check(executor: object) -> None:
        raise error

    return Case("wrong", check, NVIDIA)


def test_a_report_says_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("right", lambda executor: None, ("sm_90",)), _raises(Fault("f")), _raises(Disagreement("d"))]
    monkeypatch.setattr(report, "every_case", lambda: cases)
    seen: list[str] = []
    made = report.run(
        ("sm_80", "sm_90"),
        quick=True,
        make=_Stub,
        progress=lambda result: seen.append(result.case),  # type: ignore[arg-type]
    )
    assert seen == ["wrong", "wrong", "right", "wrong", "wrong"]
    assert [result.error for result in made.failures] == ["Fault: f", "Disagreement: d"] * 2
    assert made.count() == "4 launches of 0 programs of 1 kernels, 20 elements"
    assert list(report.lines(made))[-1].endswith("1 cases agree, 4 do not")
    assert made.as_json()["count"] == made.count()


def test_errors_of_a_case_itself_are_not_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "every_case", lambda: [_raises(TypeError("a mistake"))])
    with pytest.raises(TypeError, match="a mistake"):
        report.run(("sm_90",), make=_Stub)  # type: ignore[arg-type]
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_case_is_there_once_and_every_target_has_a_quick_part() -> None:
    cases = report.every_case()
    assert len({case.name for case in cases}) == len(cases) > 600
    assert {target for case in cases for target in case.quick} == set(NVIDIA)
