"""The C++ kernels of networks: a library for each dtype and instruction set, prebuilt or compiled when first used.

Float32 runs from AVX2 up, bfloat16 if the processor multiplies matrices of it (AVX512-BF16). The sources are the
same: what differs is in one header for each dtype.
"""

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

from stepfusion.kernels.backend import BackendError
from stepfusion.kernels.cpu import compiler, winograd_matrices

_Result = TypeVar("_Result", Tensor, tuple[Tensor, Tensor, Tensor], None)

LANES = 16  # kernels take channels that are multiples of it, whatever the vectors

#: The dtypes of images and weights, and the header with what is special about each.
DTYPES = {torch.float32: "float32.h", torch.bfloat16: "bfloat16.h"}
_SOURCES = "group_norm.cpp", "winograd.cpp", "convolution.cpp", "resnet.cpp", "attention.cpp"
_FLAGS = "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fno-math-errno", "-fno-trapping-math"
_VECTORS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}

ONEDNN_LIMITS = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"  # in the order in which oneDNN reads them
_BELOW_AVX512_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
_BELOW_AMX = (*_BELOW_AVX512_BF16, "avx512_core_bf16", "avx512_core_fp16", "avx10_1_512")


def why_not_cpu_kernels(dtype: torch.dtype) -> str | None:
    """The reason why the C++ kernels for this dtype cannot run on this machine's CPU; None if they can.

    Compiles nothing: if no library is at hand, a compiler that is found may still fail.
    """
    if dtype not in DTYPES:
        return f"the C++ kernels are for {' and '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    reason = _why_not_bfloat16() if dtype == torch.bfloat16 else _why_not_float32()
    if reason is not None or library_origin(dtype) is not None:
        return reason
    try:
        compiler.compiler()
    except compiler.CompilerError as error:
        return str(error)
    return None


def library_origin(dtype: torch.dtype) -> str | None:
    """Where the library for a dtype is from: "prebuilt" or "compiled on this machine"; None if there is none yet."""
    library = compiler.at_hand(*_parts(dtype, compiler.instruction_set()))
    return None if library is None else library.origin


def _why_not_float32() -> str | None:
    used = compiler.instruction_set()
    return None if used in _VECTORS else f"PyTorch uses {used} here, and the C++ kernels need AVX2"


def _why_not_bfloat16() -> str | None:
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16"
    if (used := compiler.instruction_set()) != "AVX512":
        return f"PyTorch uses {used} here (ATEN_CPU_CAPABILITY limits it), and the C++ kernels need AVX512"
    if (limit := onednn_limit()) is not None:
        return f"{limit} holds oneDNN, which multiplies the matrices, below AVX512-BF16"
    if not (torch._C._has_mkldnn and torch._C._get_mkldnn_enabled()):
        return "this PyTorch has no oneDNN, which multiplies the matrices, or it is switched off"
    return None


def bfloat16_unit() -> str | None:
    """What oneDNN multiplies bfloat16 matrices by on this CPU: "AMX" or "AVX512-BF16"; None if it has neither."""
    if torch.cpu._is_amx_tile_supported() and onednn_limit(_BELOW_AMX) is None:
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() and onednn_limit() is None else None


def onednn_limit(below: Sequence[str] = _BELOW_AVX512_BF16) -> str | None:
    """The environment variable and value that keep oneDNN below AVX512-BF16; None if none does.

    oneDNN reads them once, when PyTorch first calls it, without regard to case, and offers no way to ask for the
    instruction set that it chose.
    """
    for name in ONEDNN_LIMITS:
        value = os.environ.get(name)
        if value:
            return f"{name}={value}" if value.lower() in below else None
    return None


def load(dtype: torch.dtype) -> Any:
    """The library for images and weights of this dtype.

    Raises:
        BackendError: it cannot be compiled or loaded here.
    """
    library, reason = _outcome(dtype, compiler.instruction_set())
    if reason is not None:
        raise BackendError(f"the C++ kernels of networks cannot run: {reason}")
    return library


@functools.cache
def _outcome(dtype: torch.dtype, instructions: str) -> tuple[Any, str | None]:
    """The library, or the reason why there is none. Asked once, for a compiler that fails would fail again."""
    try:
        return compiler.load(*_parts(dtype, instructions)).functions, None
    except compiler.CompilerError as error:
        return None, str(error)


def libraries() -> list[tuple[str, str, list[str]]]:
    """Every library that x86-64 processors use: its name, text and flags."""
    bfloat16 = _parts(torch.bfloat16, "AVX512")
    return [*(_parts(torch.float32, instructions) for instructions in _VECTORS), bfloat16]


def _parts(dtype: torch.dtype, instructions: str) -> tuple[str, str, list[str]]:
    return str(dtype).removeprefix("torch."), source(dtype), flags(dtype, instructions)


def flags(dtype: torch.dtype, instructions: str) -> list[str]:
    """The compiler's flags for a dtype and an instruction set."""
    capability = f"-DCPU_CAPABILITY={instructions}", f"-DCPU_CAPABILITY_{instructions}"  # as PyTorch's headers ask
    bfloat16 = ["-mavx512bf16"] if dtype == torch.bfloat16 else []
    return [*_FLAGS, *capability, *_VECTORS[instructions], *bfloat16]


def source(dtype: torch.dtype) -> str:
    """The kernels, as one text."""
    folder = Path(__file__).parent
    names = "vector.h", DTYPES[dtype], "norm.h", "matmul.h", "winograd.h", *_SOURCES
    texts = [(folder / name).read_text(encoding="utf-8") for name in names]
    return "\n".join((texts[0], winograd_matrices.CONSTANTS, *texts[1:]))


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
    """Room for the images that an operator makes of x, if they have its shape."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def call(
    dtype: torch.dtype,
    name: str,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    numbers: Sequence[float] = (),
) -> None:
    """Call a function of the library for a dtype, which takes addresses, then int64, then double.

    Raises:
        BackendError: there is no library. RuntimeError: with what the function says went wrong.
    """
    function = _function(dtype, compiler.instruction_set(), name, len(tensors), len(sizes), len(numbers))
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    error = function(*addresses, *sizes, *numbers)
    if error is not None:
        raise RuntimeError(f"{name} failed: {error.decode(errors='replace').splitlines()[0]}")


@functools.cache
def _function(dtype: torch.dtype, _: str, name: str, addresses: int, sizes: int, numbers: int) -> Any:
    """A function of the library; made once for each instruction set, of which tests use several."""
    function = getattr(load(dtype), name)
    function.argtypes = [ctypes.c_void_p] * addresses + [ctypes.c_int64] * sizes + [ctypes.c_double] * numbers
    function.restype = ctypes.c_char_p
    return function
