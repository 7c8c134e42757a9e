"""The machine code of every kernel, compiled with no GPU: a slow or a non-reproducible kernel fails on a laptop."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import stepfusion.kernels
from stepfusion.bench import machine_code
from stepfusion.bench.offline import TARGETS
from stepfusion.bench.sass import Sass, narrow, parse_sass, small_accesses
from stepfusion_testing.compiler_process import json_of

pytest.importorskip("triton")

LOOKED_AT = ("sm_90",)  # the other targets are in the soak tests
SUPPORT = Path(__file__).parents[1] / "stepfusion_testing"
NO_NOISE, GIVEN_NOISE, DRAWN_NOISE = 22, 24, 68  # SASS instructions an element of the step kernel, large lanes
NOISE = 66  # of what makes noise and little else
# the same with x0, with a history, which a row may read and write, and with a known region; all branches are counted
MORE = {
    "noise none, nhwc": 24,  # 23.7 by Triton 3.6, which makes up to 3 % more than 3.7
    "noise drawn, nhwc": 72,
    "noise none, x0, 1": 20,
    "noise none, history 1, 1": 28,
    "noise none, history 2, 1": 32,
    "noise none, history 3, 1": 36.5,  # 36.3 by Triton 3.6
    "noise drawn, history 3, 1": 88,
    "noise given, known": 31,
    "noise drawn, known": 74,
    "noise drawn, x0, known": 75,
}
# the same of the norm, 32 elements a thread: alone; with a skip input or modulated, or statistics and result at once;
# with a residual, and the input written as well. Triton 3.8 makes up to 9 % more of them than 3.7
NORM_LIMITS = {"group_norm_moments_kernel": (10.5, 14, 23.5), "group_norm_silu_kernel": (18, 26, 26.5)}
NORM_TWICE = (28, 42)  # the same of one launch that reads its tiles twice: alone, and with the input written
# the same of the layer norm, 48 to 72 elements a thread: alone, and with the residual
LAYER_NORM_LIMITS = (20, 27)
ADD_BIAS = 16  # of what adds bias and residual elsewhere, 16 elements a thread
# the same of a shortcut's product, whatever its depth: on a GPU with matrix units that read shared memory; doubled
PROJECTION = (16, 36)

ODD_CHANNELS = "500 channels"

SASS = """
        Function : add_kernel
 Function add_kernel:
  REG:24 STACK:0 SHARED:1024 LOCAL:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000e300000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x00 */
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;           /* 0x00 */
        /*0030*/              @UP1 LDG.E.U16 R6, desc[UR4][R2.64] ;       /* 0x00 */
        /*0040*/                   LDG.E.64 R8, desc[UR4][R2.64] ;        /* 0x00 */
        /*0050*/                   MUFU.RSQ R0, R4 ;                      /* 0x00 */
        /*0060*/                   FFMA R0, R0, R1, R2 ;                  /* 0x00 */
        /*0070*/                   STL.64 [R1], R4 ;                      /* 0x00 */
        /*0080*/                   LDL R4, [R1] ;                         /* 0x00 */
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;       /* 0x00 */
        /*00a0*/              @!P0 BRA 0xd0 ;                             /* 0x00 */
        /*00b0*/                   BRA 0xc0 ;                             /* 0x00 */
        /*00c0*/               @P1 BRA 0x20 ;                             /* 0x00 */
        /*00d0*/                   EXIT ;                                 /* 0x00 */
        /*00e0*/                   BRA 0xe0;                              /* 0x00 */
       /*10000*/                   NOP;                                   /* 0x00 */
"""


@pytest.fixture(scope="session", params=["quick", pytest.param("every variant", marks=pytest.mark.soak)])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel as it is compiled for sm_90: what each limit below needs, or every variant."""
    options = [word for target in LOOKED_AT for word in ("--target", target)]
    options += ["--quick"] * (request.param == "quick")
    codes: list[dict[str, Any]] = json_of(tmp_path_factory, "-m", "stepfusion.bench.machine_code", "--json", *options)
    return codes


@pytest.fixture(scope="session")
def controls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Kernels that must fail the checks below."""
    codes: dict[str, dict[str, Any]] = json_of(tmp_path_factory, str(SUPPORT / "slow_kernels.py"))
    return codes


def _entry_kernels() -> set[str]:
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(stepfusion.kernels.__path__, "stepfusion.kernels.")
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def _narrow(code: dict[str, Any]) -> bool:
    return code["narrow_loads"] != 0 or code["narrow_stores"] != 0


def _contracted(code: dict[str, Any]) -> bool:
    """Fused multiply-adds beyond those that refine square roots: two a root in line, three in the one slow path."""
    sass = code["sass"]
    allowed = 2 * sass["rsqrt"] + 1 if sass["rsqrt"] else 0
    return code["contractions"] != 0 or sass["ffma"] > allowed


@pytest.mark.slow
def test_every_kernel_compiles(report: list[dict[str, Any]]) -> None:
    compiled = {(code["kernel"], code["target"]) for code in report}
    assert compiled == {(kernel, target) for kernel in _entry_kernels() for target in LOOKED_AT}


@pytest.mark.soak
def test_every_kernel_compiles_for_every_target(tmp_path_factory: pytest.TempPathFactory) -> None:
    codes = json_of(tmp_path_factory, "-m", "stepfusion.bench.machine_code", "--json")
    assert {(code["kernel"], code["target"]) for code in codes} == {(k, t) for k in _entry_kernels() for t in TARGETS}
    assert not [c["variant"] for c in codes if c["scratch"] or (c["sass"] and c["sass"]["local"])]


@pytest.mark.slow
def test_tensor_accesses_are_128_bits_wide(report: list[dict[str, Any]]) -> None:
    """Exempt: a lane of one element, the loads of to_uint8_kernel, which gather from planes but for C = 1, what
    the step reads and writes of a network in NHWC, and the bias of a projection, two numbers at a time.

    500 channels in bfloat16 are no multiple of 16 bytes: that norm is a control, which must be found.
    """
    exempt = ("1x1x1x1", "nhwc", ODD_CHANNELS)
    nvidia = [c for c in report if c["sass"] is not None and not any(word in c["variant"] for word in exempt)]
    planes = [c for c in nvidia if c["kernel"] == "to_uint8_kernel" and "x1x" not in c["variant"]]
    biases = [c for c in nvidia if c["kernel"] == "add_projection_kernel" and c["sass"]["loads"].get("64", 0) == 8]
    assert all(c["narrow_loads"] < 8 and c["narrow_stores"] == 0 for c in biases)
    found = [(c["kernel"], c["variant"], c["target"]) for c in nvidia if _narrow(c) and c not in (*planes, *biases)]
    assert not found
    assert planes
    assert all(code["narrow_stores"] == 0 for code in planes)
    assert all(_narrow(code) for code in report if ODD_CHANNELS in code["variant"])


def _norms(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both kernels of the group norm on NVIDIA targets, without the control."""
    norms = [c for c in report if c["kernel"] in NORM_LIMITS and c["sass"] and ODD_CHANNELS not in c["variant"]]
    assert {code["kernel"] for code in norms} == set(NORM_LIMITS)
    return norms


def _carried(code: dict[str, Any], accesses: str) -> float:
    """The share of a thread's elements that 128-bit accesses of a kernel can carry."""
    size = 4 if "float32" in code["variant"] else 2
    return float(code["sass"][accesses].get("128", 0) * 16 / size / code["elements"])


def _is_alone(code: dict[str, Any], report: list[dict[str, Any]]) -> bool:
    """Whether a norm is one launch."""
    return not any(c["kernel"] == "group_norm_moments_kernel" and c["variant"] == code["variant"] for c in report)


def _writes_input(code: dict[str, Any], report: list[dict[str, Any]]) -> bool:
    """Whether a launch of a norm writes what it normalises: the first of two, or the only one."""
    first = code["kernel"] == "group_norm_moments_kernel" or _is_alone(code, report)
    return "input" in code["variant"] and first


@pytest.mark.slow
def test_norms_read_and_write_images_128_bits_at_a_time(report: list[dict[str, Any]]) -> None:
    """All of an image, so that what is narrow is statistics and parameters."""
    for code in _norms(report):
        reads = 1 + (_writes_input(code, report) and "residual" in code["variant"])
        assert _carried(code, "loads") >= reads * (3 if code["bodies"] == 2 and _is_alone(code, report) else 1)
        stores = (code["kernel"] == "group_norm_silu_kernel") + _writes_input(code, report)
        assert _carried(code, "stores") == stores * code["bodies"], code
    controls = [code for code in report if ODD_CHANNELS in code["variant"]]
    assert {code["kernel"] for code in controls} == set(NORM_LIMITS)
    assert all(_carried(code, "loads") < 1.0 for code in controls)


@pytest.mark.slow
def test_norm_instructions(report: list[dict[str, Any]]) -> None:
    seen = set()
    for code in _norms(report):
        more = any(word in code["variant"] for word in ("+", "modulated")) or _is_alone(code, report)
        kind = 2 if _writes_input(code, report) else int(more)
        if code["elements"] == 32 and _is_alone(code, report) and code["bodies"] == 2:
            assert code["instructions_per_element"] <= NORM_TWICE[kind == 2], code
            seen.add(("tiles read twice", kind == 2))
        elif code["elements"] == 32:
            assert code["instructions_per_element"] <= NORM_LIMITS[code["kernel"]][kind], code
            seen.add((code["kernel"], kind))
    twice = {("tiles read twice", writes) for writes in (False, True)}
    assert seen == {(kernel, kind) for kernel in NORM_LIMITS for kind in range(3)} | twice


@pytest.mark.slow
def test_instructions_of_what_adds_biases(report: list[dict[str, Any]]) -> None:
    codes = [code for code in report if code["kernel"] == "add_bias_kernel" and code["sass"]]
    assert {word for code in codes for word in ("doubled", "padded") if word in code["variant"]} == {
        "doubled",
        "padded",
    }
    assert max(code["instructions_per_element"] for code in codes) <= ADD_BIAS


@pytest.mark.slow
def test_projections_leave_room_for_two_programs(report: list[dict[str, Any]]) -> None:
    """Registers and shared memory of a multiprocessor, so that one multiplies while another reads and writes."""
    codes = [code for code in report if code["kernel"] == "add_projection_kernel" and code["target"] == "sm_90"]
    assert {"doubled" in code["variant"] for code in codes} == {False, True}
    for code in codes:
        threads = {64: 256, 32: 256 if "64x64" in code["variant"] else 128}[code["elements"]]
        assert 2 * threads * code["sass"]["registers"] <= 65536, code
        assert 2 * (code["shared"] + 1024) <= 227 * 1024, code
        assert code["instructions_per_element"] <= PROJECTION["doubled" in code["variant"]], code


@pytest.mark.slow
@pytest.mark.parametrize("adds", [False, True])
def test_instructions_of_layer_norms(report: list[dict[str, Any]], adds: bool) -> None:
    codes = [code for code in report if code["kernel"] == "layer_norm_modulate_kernel" and code["sass"]]
    chosen = [code for code in codes if ("residual" in code["variant"]) is adds]
    assert {code["elements"] for code in chosen} >= ({48, 64, 72} if adds else {72})
    assert max(code["instructions_per_element"] for code in chosen) <= LAYER_NORM_LIMITS[adds]
    assert all(_carried(code, "loads") >= 1 + adds and _carried(code, "stores") == 1 + adds for code in chosen)


@pytest.mark.slow
def test_no_local_memory(report: list[dict[str, Any]]) -> None:
    assert not [c["variant"] for c in report if c["scratch"] or (c["sass"] and c["sass"]["local"])]


@pytest.mark.slow
def test_no_contraction(report: list[dict[str, Any]]) -> None:
    """Exempt: norms and products, which promise their references' results within rounding."""
    rounded = (*NORM_LIMITS, "layer_norm_modulate_kernel", "add_projection_kernel")
    exact = [c for c in report if c["kernel"] not in rounded]
    assert not [c["variant"] for c in exact if c["target"] != "gfx942" and c["contractions"]]
    assert not [(c["kernel"], c["variant"]) for c in exact if c["target"] == "sm_90" and _contracted(c)]


def _steps(report: list[dict[str, Any]], noise: str) -> list[dict[str, Any]]:
    """The table walker on sm_90 and large lanes, without what costs more: guidance, history, learned variance."""
    steps = [
        code
        for code in report
        if code["kernel"] == "diffusion_step_kernel" and code["target"] == "sm_90" and code["elements"] == 32
        if f"noise {noise}" in code["variant"]
        and "learned" not in code["variant"]
        and "guided" not in code["variant"]
        and "history" not in code["variant"]
        and not any(words in code["variant"] for words in MORE)
    ]
    assert {"bfloat16", "float32"} <= {code["variant"].split(", ")[1] for code in steps}
    assert len(steps) >= 3
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "limit"), [("none", NO_NOISE), ("given", GIVEN_NOISE), ("drawn", DRAWN_NOISE)])
def test_step_instructions(report: list[dict[str, Any]], noise: str, limit: int) -> None:
    costs = {code["variant"]: code["instructions_per_element"] for code in _steps(report, noise)}
    assert max(costs.values()) <= limit, costs


@pytest.mark.slow
@pytest.mark.parametrize("words", MORE)
def test_step_instructions_of_multistep_solvers_and_editing(report: list[dict[str, Any]], words: str) -> None:
    codes = [c for c in report if c["kernel"] == "diffusion_step_kernel" and words in c["variant"]]
    assert codes
    assert max(code["instructions_per_element"] for code in codes) <= MORE[words]


@pytest.mark.slow
def test_silent_rows_skip_the_noise(report: list[dict[str, Any]]) -> None:
    """A row with sigma = 0 jumps over the generator: what is left costs as much as a step that cannot draw."""
    for code in _steps(report, "drawn"):
        sass = code["sass"]
        assert (sass["instructions"] - sass["skipped"]) / code["elements"] <= NO_NOISE
    assert all(code["sass"]["skipped"] == 0 for code in _steps(report, "none"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["q_sample_kernel", "normal_kernel"])
def test_noise_instructions(report: list[dict[str, Any]], kernel: str) -> None:
    costs = [
        code["instructions_per_element"]
        for code in report
        if code["kernel"] == kernel and code["target"] == "sm_90" and code["elements"] == 32
    ]
    assert 0 < max(costs) <= NOISE


@pytest.mark.slow
def test_controls_are_caught(controls: dict[str, dict[str, Any]]) -> None:
    """Each check above finds the kernel that breaks it, and leaves a plain one alone."""
    noise = controls["library noise"]
    assert noise["instructions_per_element"] > NOISE
    assert noise["sass"]["local"] > 0
    assert controls["few registers"]["sass"]["local"] > 0
    assert _contracted(controls["contracted"])
    odd = controls["odd lanes"]
    assert _narrow(odd)
    assert odd["instructions_per_element"] > NO_NOISE
    plain = controls["plain"]
    assert not any((_narrow(plain), _contracted(plain), plain["sass"]["local"]))
    assert plain["instructions_per_element"] < NO_NOISE


def test_parse_sass() -> None:
    sass = parse_sass(SASS)
    assert sass == Sass(
        instructions=15,
        loads={128: 1, 64: 1, 32: 1, 16: 1},
        stores={128: 1},
        local=2,
        ffma=1,
        rsqrt=1,
        registers=24,
        skipped=2,
    )


def test_parse_sass_of_nothing() -> None:
    assert parse_sass("") == Sass(0, {}, {}, 0, 0, 0, 0, 0)


def test_narrow_leaves_out_bookkeeping() -> None:
    assert narrow({128: 12, 64: 2, 32: 10}, bookkeeping=12) == 0
    assert narrow({128: 12, 64: 2, 32: 42}, bookkeeping=12) == 32


def test_narrow_leaves_out_small_tensors_whatever_their_width() -> None:
    assert narrow({128: 6, 64: 2}, bookkeeping=0, small=4) == 0
    assert narrow({128: 6, 64: 2, 16: 32}, bookkeeping=2, small=4) == 28
    assert narrow({128: 6}, bookkeeping=2, small=4) == -2  # more bookkeeping than accesses: an error


def test_small_accesses() -> None:
    ttgir = """
      %a = tt.load %p, %m, %o : tensor<64x32x!tt.ptr<bf16>, #blocked>
      %b = tt.load %q : tensor<32x!tt.ptr<bf16>, #slice>
      %c = tt.load %r, %k : tensor<32x8x!tt.ptr<f32>, #blocked1>
      %d = tt.load %s : !tt.ptr<i64>
      tt.store %t, %v : tensor<512x!tt.ptr<i64>, #blocked2>
      tt.store %u, %w : tensor<8x!tt.ptr<f32>, #slice1>
    """
    assert small_accesses(ttgir, "load", threads=128) == 1 + 2
    assert small_accesses(ttgir, "store", threads=128) == 1


def test_instructions_per_element() -> None:
    code = machine_code.MachineCode("k", "v", "sm_90", elements=8, shared=0, sass=parse_sass(SASS))
    assert code.instructions_per_element == 15 / 8


@pytest.mark.interpreter
def test_the_interpreter_has_no_machine_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        machine_code.main(["--target", "sm_90"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "python -m stepfusion.bench.machine_code: machine code needs Triton's compiler, "
        "but TRITON_INTERPRET=1 is set in this process\n"
    )


@pytest.mark.slow
def test_nothing_is_compiled_once_a_server_is_warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Noise and pixels neither, and no variant of a kernel for odd numbers of images."""
    found = json_of(tmp_path_factory, str(SUPPORT / "served_compilations.py"))
    assert found["late"] == []
    assert {"diffusion_step_kernel", "normal_kernel", "to_uint8_kernel"} == set(found["served"])
