"""The implementations of the fused sampling ops that tests run through: Triton, and C++ by instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import cpu_ops, reference
from stepfusion.kernels.cpu import sampling_library
from stepfusion_testing.aarch64 import emulated
from stepfusion_testing.cpu_kernels import use_instruction_set

INSTRUCTION_SETS = ("DEFAULT", "AVX2", "AVX512")
_FUNCTION = sampling_library.function.__wrapped__  # without its cache, which knows one instruction set
FUSED = ("triton", *INSTRUCTION_SETS, "NEON")


@dataclass(frozen=True)
class Fused:
    """One implementation: its module, where it runs, and whether it truncates to bfloat16 instead of rounding."""

    ops: ModuleType
    device: torch.device
    truncates: bool = False


def choose(name: str, request: pytest.FixtureRequest) -> Fused:
    """The implementation of this name: one of :data:`FUSED`, or "reference"; skips what the machine cannot run."""
    if name == "reference":
        return Fused(reference, torch.device("cpu"))
    if name == "triton":
        device: torch.device = request.getfixturevalue("kernel_device")
        return Fused(kernels, device, device.type == "cpu")
    monkeypatch = request.getfixturevalue("monkeypatch")
    if name == "NEON":
        monkeypatch.setattr(sampling_library, "call", emulated(request.getfixturevalue("aarch64_program")))
    else:
        use_sampling_kernels(name, monkeypatch)
    return Fused(cpu_ops, torch.device("cpu"))


def use_sampling_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the C++ sampling kernels as compiled for an instruction set; skips if the processor does not have it."""
    use_instruction_set(name, monkeypatch)
    monkeypatch.setattr(sampling_library, "function", _FUNCTION)
    reason = sampling_library.why_not_sampling_kernels()
    if reason is not None:
        pytest.skip(f"C++: {reason}")
