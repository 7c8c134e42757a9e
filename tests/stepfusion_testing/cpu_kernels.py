"""What the tests of the C++ kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stepfusion.kernels.cpu.library import why_not_cpu_kernels

needs_kernel = pytest.mark.skipif(why_not_cpu_kernels() is not None, reason=f"C++: {why_not_cpu_kernels()}")


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
