"""The C++ sampling kernels: one library, prebuilt or compiled when first used (:mod:`.compiler`).

It is apart from the libraries of the network kernels, which need AVX2. These sources are plain C++ for any
instruction set, compiled for the one that PyTorch uses here: AVX512, AVX2, or what the compiler takes for granted
(SSE2, NEON). The flags are ours, not Inductor's: nothing may be contracted or reordered, for the results are to have
the bits of the PyTorch reference.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.backend import BackendError
from stepfusion.kernels.cpu import compiler

#: The codes of element types in C++; plus 4 if the channels of a pixel lie together (channels_last).
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CHANNELS_LAST = 4

_SOURCES = "sampling.h", "noise.h", "step.cpp", "transition.cpp", "forward.cpp", "pixels.cpp"
FLAGS = "-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"
_VECTORS = {
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}


def why_not_sampling_kernels() -> str | None:
    """The reason why the C++ sampling kernels cannot run on this machine; None if they can.

    The first call on a machine compiles them if they are not prebuilt; that takes a few seconds, and a line says so.
    """
    return _outcome(compiler.instruction_set())[1]


def sampling_library_origin() -> str:
    """Where the library is from: "prebuilt" or "compiled on this machine".

    Raises:
        BackendError: there is none.
    """
    return _loaded().origin


def require_sampling_kernels(device: torch.device) -> None:
    """Raise :class:`BackendError` if the C++ sampling kernels cannot run on ``device``."""
    _check_device(device)
    load()


def load() -> Any:
    """The compiled library.

    Raises:
        BackendError: it cannot be compiled or loaded here.
    """
    return _loaded().functions


def _loaded() -> compiler.Library:
    library, reason = _outcome(compiler.instruction_set())
    if library is None:
        raise BackendError(f"the C++ sampling kernels cannot run: {reason}; use backend='reference'")
    return library


def _check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise BackendError(f"the C++ sampling kernels cannot run on {device}: they are for CPUs")


def call(name: str, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
    """Call a function of the library, which takes addresses and then int64."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function(name, len(tensors), len(sizes))(*addresses, *sizes)


@functools.cache
def function(name: str, addresses: int, sizes: int) -> Any:
    """A function of the library as ctypes calls it."""
    found = getattr(load(), name)
    found.argtypes = [ctypes.c_void_p] * addresses + [ctypes.c_int64] * sizes
    found.restype = None
    return found


def layout(*batches: Tensor | None) -> tuple[list[Tensor | None], int, int, list[int]]:
    """How batches of images of one size are read: the batches, channels and pixels of an image, and their forms.

    Contiguous batches are images of one channel, whatever their shape. If one is channels_last all have their
    channels. A batch with other strides is copied, and one of another dtype than :data:`TYPES` becomes float32.
    """
    read: list[Tensor | None] = []
    forms: list[int] = []
    apart = False
    for batch in batches:
        if batch is None:
            read.append(None)
            forms.append(0)
            continue
        if batch.dtype not in TYPES:
            batch = batch.to(torch.float32)
        form = TYPES[batch.dtype]
        if not batch.is_contiguous():
            if batch.ndim == 4 and batch.is_contiguous(memory_format=torch.channels_last):
                apart, form = True, form + CHANNELS_LAST
            else:
                batch = batch.contiguous()
        read.append(batch)
        forms.append(form)
    first = batches[0]
    assert first is not None
    channels = first.shape[1] if apart else 1
    return read, channels, math.prod(first.shape[1:]) // channels, forms


def left_to_the_reference(first: Tensor, *others: Tensor | None) -> bool:
    """True for what the C++ kernels do not take: float64, gradients, and programs that are exported.

    Raises:
        BackendError: ``first`` is not on a CPU.
    """
    return not_compiled_for(first, *others) or launch.needs_gradient(first, *others)


def not_compiled_for(first: Tensor, *others: Tensor | None) -> bool:
    """The same of kernels that have a gradient of their own: float64, and programs that are exported.

    Raises:
        BackendError: ``first`` is not on a CPU.
    """
    _check_device(first.device)
    return _exporting() or any(x is not None and x.dtype == torch.float64 for x in (first, *others))


def _exporting() -> bool:
    return torch.compiler.is_exporting()


# PyTorch 2.11's compiler takes `is_exporting()` for true in every program that it traces; called, it tells the truth.
# The mark is `torch.compiler.assume_constant_result`'s, which would import the compiler, a second or more, to set it.
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _outcome(instructions: str) -> tuple[compiler.Library | None, str | None]:
    """The library, or the reason why there is none. Asked once, for a compiler that fails would fail again."""
    try:
        return compiler.load(*_parts(instructions)), None
    except compiler.CompilerError as error:
        return None, str(error)


def libraries(*, x86_64: bool) -> list[tuple[str, str, list[str]]]:
    """Every library that x86-64 processors use, or others: its name, text and flags."""
    return [_parts(instructions) for instructions in ("DEFAULT", *(_VECTORS if x86_64 else ()))]


def _parts(instructions: str) -> tuple[str, str, list[str]]:
    return "sampling", source(), [*FLAGS, *_VECTORS.get(instructions, ())]


def source() -> str:
    """The kernels, as one text."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES)
