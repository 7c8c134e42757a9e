"""C++ kernels for CPUs: compiled where they are used, by Inductor's compiler settings and cache."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

LANES = 16  # channels of a vector: kernels take multiples of it


def why_not_cpu_kernels() -> str | None:
    """The reason why the C++ kernels cannot run on this machine's CPU; None if they can."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16"
    if not torch._C._has_mkldnn:
        return "this PyTorch has no oneDNN, which multiplies the matrices"
    return None


@functools.cache
def library(name: str, constants: str = "") -> Any:
    """What `name`.cpp in this folder, after `constants`, compiles to; taken from Inductor's cache where it is there.

    Raises:
        Whatever Inductor raises where there is no working C++ compiler.
    """
    from torch._inductor.codecache import CppCodeCache

    folder = Path(__file__).parent
    text = (folder / "bfloat16.h").read_text(encoding="utf-8") + constants
    return CppCodeCache.load(
        text + (folder / name).with_suffix(".cpp").read_text(encoding="utf-8"), needs_vec_isa=True
    )
