"""The compiled PTX of every kernel, executed on the CPU: results, accesses, races, and what must be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepfusion import kernels
from stepfusion.bench import machine_code
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion_testing.compiler_process import json_of
from stepfusion_testing.planted import planted
from stepfusion_testing.ptx_mutants import EXCHANGES, MUTANTS
from stepfusion_testing.twins import assert_same_bits, outputs

pytest.importorskip("triton")

SUPPORT = Path(__file__).parents[1] / "stepfusion_testing"
EXECUTE = ("-m", "stepfusion.bench.machine_code", "--execute", "--json")
TARGET = "sm_90"  # the others are in the soak tests
KERNELS = {
    *("diffusion_step_kernel", "q_sample_kernel", "q_posterior_kernel", "normal_kernel", "to_uint8_kernel"),
    *("to_uint8_rgb_kernel", "to_uint8_rgba_kernel", "group_norm_moments_kernel", "group_norm_silu_kernel"),
    *("add_bias_kernel", "layer_norm_modulate_kernel", "transition_terms_kernel", "transition_sum_kernel"),
    "add_projection_kernel",
}

#: A lane of one element has one program, for Triton compiles an argument of 1 as a constant. Its release 3.6 keeps
#: the two instructions that other programs of such a lane would run.
ONE_PROGRAM = "posterior float16 1 strides"


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quick part: every kernel as it is compiled for sm_90, three of them in two orders of warps."""
    executed: dict[str, Any] = json_of(tmp_path_factory, str(SUPPORT / "ptx_quick.py"), TARGET)
    return executed


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What execution finds in kernels with planted faults."""
    faults: dict[str, dict[str, Any]] = json_of(tmp_path_factory, str(SUPPORT / "ptx_mutants.py"))
    return faults


@pytest.mark.slow
def test_executed_results_are_the_references(report: dict[str, Any], record_property: Any) -> None:
    _assert_executed(report, TARGET, record_property)


@pytest.mark.slow
def test_every_block_of_every_program_is_reached(report: dict[str, Any]) -> None:
    unreachable = [block for block in report["missed"] if block["case"] == ONE_PROGRAM]
    assert report["missed"] == unreachable
    assert sum(block["instructions"] for block in unreachable) <= 2
    reached, every = report["instructions"]
    assert reached == every - sum(block["instructions"] for block in unreachable) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found["plain"][name] is None
    error = found["mutants"][name]
    assert error is not None
    if "without other" in name:
        assert error.startswith("Fault")
        assert "nobody wrote" in error
    else:
        assert error.startswith("Disagreement: x0: 1 of 9" if "clamp" in name else "Disagreement: out")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXCHANGES)
def test_every_missing_barrier_is_found(name: str, found: dict[str, dict[str, Any]]) -> None:
    errors = found["barriers"][name]
    assert errors
    assert all(error is not None and "races" in error for error in errors)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in MUTANTS if "clamp" not in name])
def test_tritons_interpreter_does_not_see_the_mutant(name: str, tmp_path: Path) -> None:
    """Why the PTX is executed: there, a masked load without ``other`` is 0, and nothing flushes a subnormal number.

    Before Triton 3.8 the interpreter did not see a clamp without NaN either.
    """
    mutant = MUTANTS[name]
    given = mutant.call.arguments()
    changed = getattr(planted(tmp_path, mutant.file, mutant.old, mutant.new), mutant.function)
    plain = getattr(kernels, mutant.function)
    if mutant.function == "diffusion_step":
        got, want = outputs(changed, given), outputs(plain, given)
    else:
        got, want = {"out": changed(**given)}, {"out": plain(**given)}
    for tensor, right in zip(got.values(), want.values(), strict=True):
        assert_same_bits(name, tensor, right)


def test_what_cannot_be_executed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match="target must be one of sm_80, sm_90, sm_100, whose code is PTX, got 'gfx942'"
    ):
        Executor("gfx942")
    with pytest.raises(SystemExit) as stopped:
        machine_code.main(["--execute", "--target", "gfx942"])
    assert stopped.value.code == 2
    assert "--execute runs PTX, which targets sm_80, sm_90, sm_100 have" in capsys.readouterr().err


@pytest.mark.interpreter
def test_the_interpreter_has_no_ptx(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        machine_code.main(["--execute"])
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET=1 is set in this process" in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.parametrize("target", NVIDIA)
def test_two_orders_of_warps_give_the_same_bytes(
    target: str, tmp_path_factory: pytest.TempPathFactory, record_property: Any
) -> None:
    """Every launch of the quick cases, and a search for races."""
    _assert_executed(json_of(tmp_path_factory, *EXECUTE, "--quick", "--target", target), target, record_property)


@pytest.mark.soak
@pytest.mark.parametrize("target", NVIDIA)
def test_the_whole_matrix(target: str, tmp_path_factory: pytest.TempPathFactory, record_property: Any) -> None:
    """Every dtype, source of noise, shape, alignment, stride and option."""
    executed = json_of(tmp_path_factory, *EXECUTE, "--target", target)
    _assert_executed(executed, target, record_property)
    assert len(executed["results"]) > 600


def _assert_executed(executed: dict[str, Any], target: str, record_property: Any) -> None:
    """Every kernel ran for the target, and nothing was wrong; what ran is printed."""
    record_property("compiled PTX executed", f"{target}: {executed['count']}")
    assert not [result for result in executed["results"] if result["error"] is not None]
    assert {(k["kernel"], k["target"]) for k in executed["kernels"]} == {(kernel, target) for kernel in KERNELS}
    assert all(k["launches"] > 0 and k["elements"] > 0 for k in executed["kernels"])
