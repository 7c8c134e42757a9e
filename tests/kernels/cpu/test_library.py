"""Where the C++ kernels of networks run: what holds the processor or a library back is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from stepfusion.kernels import BackendError
from stepfusion.kernels.cpu import compiler, library
from stepfusion.kernels.cpu.library import why_not_cpu_kernels


@pytest.fixture(autouse=True)
def able_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is missing, whatever this one is."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(compiler, "compiler", lambda: ["g++"])
    monkeypatch.setattr(compiler, "at_hand", lambda *_: None)
    monkeypatch.setattr(torch._C, "_has_mkldnn", True)
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_able_machine_needs_no_reason(dtype: torch.dtype) -> None:
    assert why_not_cpu_kernels(dtype) is None


def test_other_dtypes_have_no_kernels() -> None:
    assert why_not_cpu_kernels(torch.float16) == "the C++ kernels are for float32 and bfloat16"


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_float32_needs_neither_bfloat16_nor_onednn(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert why_not_cpu_kernels(torch.float32) is None


@pytest.mark.parametrize("capability", ["DEFAULT", "NO AVX", "VSX"])
def test_float32_needs_avx2(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    expected = f"PyTorch uses {capability} here, and the C++ kernels need AVX2"
    assert why_not_cpu_kernels(torch.float32) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_compiler(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> list[str]:
        raise compiler.CompilerError("there is no C++ compiler")

    monkeypatch.setattr(compiler, "compiler", missing)
    assert why_not_cpu_kernels(dtype) == "there is no C++ compiler"
    monkeypatch.setattr(compiler, "at_hand", lambda name, *_: compiler.Library(None, f"{name}, prebuilt"))
    assert why_not_cpu_kernels(dtype) is None, "a library that is at hand needs none"
    assert library.library_origin(dtype) == f"{str(dtype).removeprefix('torch.')}, prebuilt"


def test_a_library_that_cannot_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise compiler.CompilerError("g++ failed: no such header")

    monkeypatch.setattr(compiler, "load", fail)
    monkeypatch.setattr(library, "_outcome", library._outcome.__wrapped__)
    with pytest.raises(BackendError, match=r"C\+\+ kernels of networks cannot run: g\+\+ failed: no such header"):
        library.load(torch.float32)


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert why_not_cpu_kernels(torch.bfloat16) == "this CPU has no AVX512-BF16"


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_pytorch_told_to_use_less(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    expected = f"PyTorch uses {capability} here (ATEN_CPU_CAPABILITY limits it), and the C++ kernels need AVX512"
    assert why_not_cpu_kernels(torch.bfloat16) == expected


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize("value", ["AVX2", "avx2_vnni", "AVX512_CORE", "SSE41"])
def test_onednn_told_to_use_less(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    expected = f"{name}={value} holds oneDNN, which multiplies the matrices, below AVX512-BF16"
    assert why_not_cpu_kernels(torch.bfloat16) == expected


@pytest.mark.parametrize("value", ["AVX512_CORE_BF16", "avx512_core_amx", "ALL", "DEFAULT", ""])
def test_onednn_told_to_use_enough(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
    assert why_not_cpu_kernels(torch.bfloat16) is None


@pytest.mark.parametrize(
    ("amx", "limit", "unit"),
    [
        (True, "", "AMX"),
        (True, "AVX10_1_512_AMX", "AMX"),
        (True, "avx512_core_amx", "AMX"),
        (True, "AVX512_CORE_BF16", "AVX512-BF16"),
        (True, "avx512_core_fp16", "AVX512-BF16"),
        (True, "AVX2", None),
        (False, "", "AVX512-BF16"),
        (False, "AVX512_CORE", None),
    ],
)
def test_what_multiplies_bfloat16(amx: bool, limit: str, unit: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert library.bfloat16_unit() == unit


def test_onednn_reads_its_new_name_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    assert why_not_cpu_kernels(torch.bfloat16) is None


@pytest.mark.parametrize("missing", ["_has_mkldnn", "_get_mkldnn_enabled"])
def test_pytorch_without_onednn(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, missing, False if missing == "_has_mkldnn" else lambda: False)
    assert "no oneDNN" in str(why_not_cpu_kernels(torch.bfloat16))


@pytest.mark.parametrize("limit", [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=str)
def test_a_process_under_a_limit_has_a_reason(limit: dict[str, str]) -> None:
    code = (
        "import torch; from stepfusion.kernels.cpu import library; print(library.why_not_cpu_kernels(torch.bfloat16))"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env={**os.environ, **limit}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() != "None"
