"""What the tests of the C++ kernels of networks share: the dtypes and instruction sets in which they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stepfusion.kernels.cpu import compiler
from stepfusion.kernels.cpu.library import why_not_cpu_kernels

#: Libraries by name: the dtype of images and weights, and the instruction set.
VARIANTS = {
    "float32-AVX2": (torch.float32, "AVX2"),
    "float32-AVX512": (torch.float32, "AVX512"),
    "bfloat16": (torch.bfloat16, "AVX512"),
}


def use_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the C++ kernels for an instruction set; skips if the processor does not have it.

    What ``ATEN_CPU_CAPABILITY`` says is of no account: a processor that has the instructions runs them.
    """
    offered = {"AVX2": torch.cpu._is_avx2_supported, "AVX512": torch.cpu._is_avx512_supported}
    if name in offered and not offered[name]():
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setattr(compiler, "instruction_set", lambda: name)


def use_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Run the kernels as compiled for one of `VARIANTS`, and return its dtype; skips what the machine cannot run."""
    dtype, instructions = VARIANTS[name]
    use_instruction_set(instructions, monkeypatch)
    reason = why_not_cpu_kernels(dtype)
    if reason is not None:
        pytest.skip(f"C++: {reason}")
    return dtype


def needs(dtype: torch.dtype) -> pytest.MarkDecorator:
    """Skips a test if the kernels for a dtype cannot run."""
    reason = why_not_cpu_kernels(dtype)
    return pytest.mark.skipif(reason is not None, reason=f"C++: {reason}")


def cpp_contenders(*, absent: bool) -> set[str]:
    """The names of the benchmarks' contenders that run a network by C++: those that run here, or that are absent."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        f"stepfusion cpp {name}"
        for name, dtype in dtypes.items()
        if (why_not_cpu_kernels(dtype) is not None) is absent
    }


def rms(error: Tensor) -> float:
    """The root of the mean square."""
    return float(error.double().pow(2).mean().sqrt())


def thread_counts() -> Iterator[int]:
    """1, 2 and 3, each while PyTorch uses so many threads."""
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(threads)
