"""The C++ sampling kernels: one library, compiled once by the machine's C++ compiler and kept in stepfusion's cache.

It is apart from the library of the network kernels, which needs AVX512-BF16. These sources are plain C++ for any
instruction set, compiled for the one that PyTorch uses here: AVX512, AVX2, or what the compiler takes for granted
(SSE2, NEON). The flags are ours, not Inductor's: nothing may be contracted or reordered, for the results are to have
the bits of the PyTorch reference.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.backend import BackendError
from stepfusion.kernels.cache import make_cache_directory

#: The codes of element types in C++; plus 4 if the channels of a pixel lie together (channels_last).
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CHANNELS_LAST = 4

_SOURCES = "sampling.h", "step.cpp", "forward.cpp", "pixels.cpp"
_COMPILERS = "g++", "clang++", "c++"
FLAGS = "-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"
_VECTORS = {
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}
_SECONDS = 300  # a compiler that takes longer is taken for one that hangs
_LOCK = threading.Lock()


def why_not_sampling_kernels() -> str | None:
    """The reason why the C++ sampling kernels cannot run on this machine; None if they can.

    The first call on a machine compiles them, which takes a few seconds, and says so on stderr.
    """
    return _outcome(instruction_set())[1]


def require_sampling_kernels(device: torch.device) -> None:
    """Raise :class:`BackendError` if the C++ sampling kernels cannot run on ``device``."""
    _check_device(device)
    load()


def load() -> Any:
    """The compiled library.

    Raises:
        BackendError: it cannot be compiled or loaded here.
    """
    library, reason = _outcome(instruction_set())
    if reason is not None:
        raise BackendError(f"the C++ sampling kernels cannot run: {reason}; use backend='reference'")
    return library


def _check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise BackendError(f"the C++ sampling kernels cannot run on {device}: they are for CPUs")


def instruction_set() -> str:
    """What PyTorch uses of this CPU, which ``ATEN_CPU_CAPABILITY`` limits: "AVX512", "AVX2", "DEFAULT", ..."""
    return torch.backends.cpu.get_cpu_capability()


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
    _check_device(first.device)
    if torch.compiler.is_exporting():
        return True
    given = (first, *others)
    return launch.needs_gradient(*given) or any(x is not None and x.dtype == torch.float64 for x in given)


@functools.cache
def _outcome(instructions: str) -> tuple[Any, str | None]:
    """The library, or the reason why there is none. Asked once, for a compiler that fails would fail again."""
    try:
        with _LOCK:
            return _load(instructions), None
    except (OSError, subprocess.SubprocessError, filelock.Timeout, _CompilerError) as error:
        return None, str(error).splitlines()[0]


class _CompilerError(Exception):
    """There is no compiler, or it fails; the message says which."""


def _load(instructions: str) -> Any:
    if os.name == "nt":
        raise _CompilerError("they are not compiled on Windows")
    folder = make_cache_directory("cpp")
    if folder is None:  # for this process alone: what is loaded stays when its file is gone
        with tempfile.TemporaryDirectory(prefix="stepfusion-") as temporary:
            return _library(Path(temporary), instructions)
    return _library(folder, instructions)


def _library(folder: Path, instructions: str) -> Any:
    text, flags = source(), _flags(instructions)
    target = folder / f"sampling-{_key(text, flags)}.so"
    if (library := _open(target)) is not None:
        return library
    with filelock.FileLock(target.with_suffix(".lock"), timeout=_SECONDS):  # several processes, one compiler
        if (library := _open(target)) is not None:
            return library
        _compiler()  # before the line that says so
        print("stepfusion: compiling the C++ sampling kernels, once on this machine", file=sys.stderr, flush=True)
        build(text, flags, target)
    return ctypes.CDLL(str(target))


def _open(path: Path) -> Any:
    """The library in a file; None if there is none, or one that cannot be loaded and is to be compiled again."""
    try:
        return ctypes.CDLL(str(path)) if path.exists() else None
    except OSError:
        return None


def source() -> str:
    """The kernels, as one text."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES)


def _flags(instructions: str) -> list[str]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has no OpenMP
    added = shlex.split(os.environ.get("STEPFUSION_CXXFLAGS", ""))
    return [*FLAGS, *threads, abi, *_VECTORS.get(instructions, ()), *added]


def _key(text: str, flags: Sequence[str]) -> str:
    """A digest of everything that decides whether a library fits: a user's machines may share a cache."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    facts = (text, *flags, torch.__version__, sys.platform, platform.machine(), libc or "")
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def build(text: str, flags: Sequence[str], target: Path) -> None:
    """Compile C++ that calls PyTorch into a library, which appears whole or not at all."""
    compiler = _compiler()
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        path, compiled, linked = (Path(folder) / name for name in ("sampling.cpp", "sampling.o", "sampling.so"))
        path.write_text(text, encoding="utf-8")
        _run([*compiler, *flags, f"-I{torch_folder / 'include'}", "-c", str(path), "-o", str(compiled)])
        # Without -fopenmp: the OpenMP library must be the one that PyTorch runs, whatever its file is called.
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*compiler, "-shared", *sanitizers, str(compiled), *libraries, "-o", str(linked)])
        os.replace(linked, target)


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for words in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if shutil.which(words[0]) is not None:
            return words
    if chosen:
        raise _CompilerError(f"there is no C++ compiler {chosen[0]!r}, which CXX names")
    raise _CompilerError(f"there is no C++ compiler ({', '.join(_COMPILERS)}; CXX names another)")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise _CompilerError(f"{command[0]} failed: {first.strip()}")
