"""How the C++ sampling kernels are compiled and kept: once, visibly, whole, and with a reason if they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepfusion.kernels import BackendError, cpu_ops, reference
from stepfusion.kernels.cpu import compiler, sampling_library
from stepfusion_testing.twins import assert_same_bits

LINE = "stepfusion: compiling the C++ sampling kernels, once on this machine\n"
PROGRAM = "from stepfusion.kernels.cpu.sampling_library import why_not_sampling_kernels as why; print(why())"
NUMBERS = torch.tensor([3])
NOISE = (NUMBERS, NUMBERS, NUMBERS, (4096,))

Load = Callable[[], str | None]

needs_compiler = pytest.mark.skipif(
    sampling_library.why_not_sampling_kernels() is not None,
    reason=f"C++: {sampling_library.why_not_sampling_kernels()}",
)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """What a new process with an empty cache would do; returns the reason why not."""
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STEPFUSION_CXXFLAGS", "-O0")
    monkeypatch.delenv("CXX", raising=False)
    for name in ("_outcome", "function"):
        monkeypatch.setattr(sampling_library, name, getattr(sampling_library, name).__wrapped__)

    def why_not() -> str | None:
        reason = sampling_library.why_not_sampling_kernels()
        if reason is None:
            assert_same_bits("z", cpu_ops.normal(*NOISE), reference.normal(*NOISE))
        return reason

    return why_not


@needs_compiler
def test_it_is_compiled_once_and_says_so_and_again_for_other_flags_or_instructions(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert load() is None
    assert capfd.readouterr() == ("", LINE)
    with monkeypatch.context() as without_compiler:
        without_compiler.setenv("CXX", "/no/such/compiler")
        assert load() is None
    assert capfd.readouterr() == ("", "")
    assert len(list((tmp_path / "cache" / "cpp").glob("*.so"))) == 1
    assert (tmp_path / "cache" / "cpp").stat().st_mode & 0o077 == 0  # what lies there is executed
    assert not [path for path in (tmp_path / "cache" / "cpp").iterdir() if path.is_dir()]
    monkeypatch.setenv("STEPFUSION_CXXFLAGS", "-O0 -DOTHER")
    assert load() is None
    monkeypatch.setattr(compiler, "instruction_set", lambda: "DEFAULT")
    assert load() is None
    others = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert capfd.readouterr().err == LINE * (1 + others)


@needs_compiler
def test_one_of_two_processes_compiles_and_what_cannot_be_loaded_is_compiled_again(
    load: Load, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own the first library: a file that is in use must not be overwritten."""
    variables = {**os.environ, "STEPFUSION_CACHE": str(tmp_path / "cache"), "STEPFUSION_CXXFLAGS": "-O0"}
    command = [sys.executable, "-P", "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    together = [subprocess.Popen(command, env=variables, text=True, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in together]
    assert sorted(said) == [("None\n", ""), ("None\n", LINE)]
    (library,) = (tmp_path / "cache" / "cpp").glob("*.so")
    library.write_bytes(b"cut off")
    assert load() is None
    assert capfd.readouterr().err == LINE


@needs_compiler
def test_if_nothing_can_be_kept_every_process_compiles(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert sampling_library.why_not_sampling_kernels() is None
    told = LINE.replace("once on this machine", "for this process alone: no cache can be written")
    assert capfd.readouterr().err == told
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/compiler -v", "there is no C++ compiler '/no/such/compiler', which CXX names"),
        (f"{shutil.which('false')}", f"{shutil.which('false')} failed: exit status 1"),
    ],
)
def test_a_compiler_that_fails_is_a_reason(
    compiler: str, reason: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert load() == reason
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_compiler
def test_the_compilers_first_error_is_the_reason(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFUSION_CXXFLAGS", "-include no_such_header.h")
    reason = load()
    assert reason is not None
    assert "failed: " in reason
    assert "no_such_header.h" in reason


def test_no_compiler_is_a_reason(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load() == "there is no C++ compiler (g++, clang++, c++; CXX names another)"
    assert capfd.readouterr().err == ""


def test_what_cannot_run_is_refused_with_the_reason(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    message = "cannot run: there is no C\\+\\+ compiler '/no/such/compiler', which CXX names; use backend='reference'"
    with pytest.raises(BackendError, match=message):
        cpu_ops.normal(*NOISE)


@needs_compiler
def test_contraction_would_change_the_bits(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the flags: with fused multiply-adds allowed, the noise differs from the reference's."""
    capabilities = torch.cpu.get_capabilities()
    if not capabilities.get("fma3", capabilities["architecture"] == "aarch64"):
        pytest.skip("this CPU has no fused multiply-add")
    fused = "-ffp-contract=fast" + (" -mfma" if "fma3" in capabilities else "")
    monkeypatch.setenv("STEPFUSION_CXXFLAGS", fused)
    with pytest.raises(AssertionError, match="differ"):
        load()
