"""Libraries that a wheel has prebuilt: used where they fit, whole, without a compiler; all others are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfusion.kernels.cpu import compiler, library, prebuild, sampling_library

TEXT = 'extern "C" int seven() { return 7; }'
FLAGS = ["-O1", "-fPIC"]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library in the folder of those that a wheel has, an empty cache, and no compiler."""
    try:
        compiler.compiler()
    except compiler.CompilerError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(compiler, "PREBUILT", tmp_path)
    monkeypatch.setenv("STEPFUSION_CACHE", str(tmp_path / "cache"))
    path = compiler.prebuild("seven", TEXT, FLAGS, tmp_path)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    return path


def test_it_is_used_without_a_compiler(shipped: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = compiler.load("seven", TEXT, FLAGS)
    assert (found.functions.seven(), found.origin) == (7, "prebuilt")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "other", ["text", "flags", "PyTorch", "machine", "bytes", "no library", "STEPFUSION_CXXFLAGS"]
)
def test_what_does_not_fit_is_not_used(other: str, shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, flags = TEXT, FLAGS
    if other == "text":
        text = f"{TEXT} "
    elif other == "flags":
        flags = [*FLAGS, "-mavx2"]
    elif other == "PyTorch":
        monkeypatch.setattr(torch, "__version__", f"{torch.__version__}.other")
    elif other == "machine":
        monkeypatch.setattr("platform.machine", lambda: "other")
    elif other == "bytes":  # a library to which something was added still loads
        shipped.write_bytes(shipped.read_bytes() + b"\0")
    elif other == "no library":
        content = b"no library"
        shipped.rename(shipped.with_stem(f"{shipped.stem.rpartition('-')[0]}-{compiler._digest(content)}"))
        next(shipped.parent.glob("*.so")).write_bytes(content)
    else:
        monkeypatch.setenv("STEPFUSION_CXXFLAGS", "-DOTHER")
    assert compiler.at_hand("seven", text, flags) is None
    with pytest.raises(compiler.CompilerError, match="there is no C\\+\\+ compiler '/no/such/compiler'"):
        compiler.load("seven", text, flags)
    if other == "machine":
        return  # whose flags this compiler may not know
    monkeypatch.delenv("CXX")
    if other != "flags" or torch.cpu._is_avx2_supported():
        assert compiler.load("seven", text, flags).origin == "compiled on this machine"


def test_they_are_all_that_is_ever_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, Sequence[str]]] = []

    def note(name: str, text: str, flags: Sequence[str]) -> Any:
        asked.append((name, text, flags))
        raise compiler.CompilerError("not now")

    monkeypatch.setattr(compiler, "load", note)
    for instructions in ("DEFAULT", "AVX2", "AVX512"):
        sampling_library._outcome.__wrapped__(instructions)
    for dtype, instructions in ((torch.float32, "AVX2"), (torch.float32, "AVX512"), (torch.bfloat16, "AVX512")):
        library._outcome.__wrapped__(dtype, instructions)
    made: list[tuple[str, str, Sequence[str]]] = []
    monkeypatch.setattr(compiler, "prebuild", lambda *one: made.append(one[:3]))
    for machine, wanted in (("x86_64", asked), ("aarch64", asked[:1])):
        made.clear()
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        prebuild.write_libraries(tmp_path)
        assert made == wanted
