"""The C++ kernels: one library, compiled where it is used, by Inductor's compiler settings and cache."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from stepfusion.kernels.cpu import winograd_matrices

_Result = TypeVar("_Result", Tensor, tuple[Tensor, Tensor, Tensor], None)

LANES = 16  # channels of a vector: kernels take multiples of it

_HEADERS = "vector.h", "norm.h", "matmul.h", "winograd.h"
_SOURCES = "group_norm.cpp", "winograd.cpp", "convolution.cpp", "resnet.cpp", "attention.cpp"


ONEDNN_LIMITS = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"  # in the order in which oneDNN reads them
_BELOW_AVX512_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")


def why_not_cpu_kernels() -> str | None:
    """The reason why the C++ kernels cannot run on this machine's CPU; None if they can."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16"
    if (used := torch.backends.cpu.get_cpu_capability()) != "AVX512":
        return f"PyTorch uses {used} here (ATEN_CPU_CAPABILITY limits it), and the C++ kernels need AVX512"
    if (limit := onednn_limit()) is not None:
        return f"{limit} holds oneDNN, which multiplies the matrices, below AVX512-BF16"
    if not (torch._C._has_mkldnn and torch._C._get_mkldnn_enabled()):
        return "this PyTorch has no oneDNN, which multiplies the matrices, or it is switched off"
    return None


def onednn_limit() -> str | None:
    """The environment variable and value that keep oneDNN below AVX512-BF16; None if none does.

    oneDNN reads them once, when PyTorch first calls it, without regard to case, and offers no way to ask for the
    instruction set that it chose.
    """
    for name in ONEDNN_LIMITS:
        value = os.environ.get(name)
        if value:
            return f"{name}={value}" if value.lower() in _BELOW_AVX512_BF16 else None
    return None


@functools.cache
def load() -> Any:
    """What the sources in this folder compile to; taken from Inductor's cache if it is there.

    Raises:
        Whatever Inductor raises if there is no working C++ compiler.
    """
    from torch._inductor.codecache import CppCodeCache

    folder = Path(__file__).parent
    texts = [(folder / name).read_text(encoding="utf-8") for name in (*_HEADERS, *_SOURCES)]
    texts.insert(len(_HEADERS) - 1, winograd_matrices.CONSTANTS)
    return CppCodeCache.load("\n".join(texts))


def op(
    name: str, fake: Callable[..., _Result], mutates: Sequence[str] = ()
) -> Callable[[Callable[..., _Result]], OpOverload]:
    """Make a function that allocates what it returns, as `fake` does, an operator on CPU tensors without gradients.

    ``torch.library.custom_op`` would do with less, and with three times the Python for each call, which matters
    when the kernels have just used the caches. `mutates` names the arguments that the function writes to.
    """

    def register(function: Callable[..., _Result]) -> OpOverload:
        qualified = f"stepfusion::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(qualified, "CPU", function)
        torch.library.register_fake(qualified, fake)
        overload: OpOverload = getattr(torch.ops.stepfusion, name).default
        return overload

    return register


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise a ValueError that names the first tensor with gaps, which kernels would not see."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


def like(x: Tensor, *_: object) -> Tensor:
    """Room for the images that an operator makes of x, where they have its shape."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def call(name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], numbers: Sequence[float] = ()) -> None:
    """Call a function of the library, which takes addresses, then int64, then double.

    Raises:
        RuntimeError: with what the function says went wrong.
    """
    function = _function(name, len(tensors), len(sizes), len(numbers))
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    error = function(*addresses, *sizes, *numbers)
    if error is not None:
        raise RuntimeError(f"{name} failed: {error.decode(errors='replace').splitlines()[0]}")


@functools.cache
def _function(name: str, addresses: int, sizes: int, numbers: int) -> Any:
    function = getattr(load(), name)
    function.argtypes = [ctypes.c_void_p] * addresses + [ctypes.c_int64] * sizes + [ctypes.c_double] * numbers
    function.restype = ctypes.c_char_p
    return function
