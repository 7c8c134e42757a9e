"""C++ sources become libraries: compiled once by the machine's C++ compiler, and kept in stepfusion's cache."""

from __future__ import annotations

import ctypes
import hashlib
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

import filelock
import torch

from stepfusion.kernels.cache import make_cache_directory, note_compiled, shipped_directory

_COMPILERS = "g++", "clang++", "c++"
_SECONDS = 300  # a compiler that takes longer is taken for one that hangs
_LOCK = threading.Lock()


class CompilerError(Exception):
    """There is no compiler, or it fails; the message, one line, says which."""


def instruction_set() -> str:
    """What PyTorch uses of this CPU, which ``ATEN_CPU_CAPABILITY`` limits: "AVX512", "AVX2", "DEFAULT", ..."""
    return torch.backends.cpu.get_cpu_capability()


def load(name: str, text: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The library that a text compiles to with these flags and those of ``STEPFUSION_CXXFLAGS``.

    The first call on a machine compiles it, which takes some seconds, and says so on stderr; where no cache can be
    written, the first call of each process, unless the cache has it (:mod:`stepfusion.kernels.cache`).

    Raises:
        CompilerError: it cannot be compiled or loaded here.
    """
    try:
        with _LOCK:
            return _load(name, text, _complete(flags))
    except (OSError, subprocess.SubprocessError, filelock.Timeout) as error:
        raise CompilerError(str(error).splitlines()[0]) from error


def _load(name: str, text: str, flags: Sequence[str]) -> ctypes.CDLL:
    if os.name == "nt":
        raise CompilerError("they are not compiled on Windows")
    file = f"{name}-{_key(text, flags)}.so"
    folder = make_cache_directory("cpp")
    if folder is not None:
        return _library(folder / file, name, text, flags)
    shipped = shipped_directory("cpp")
    if shipped is not None and (library := _open(shipped / file)) is not None:
        return library
    with tempfile.TemporaryDirectory(prefix="stepfusion-") as temporary:  # what is loaded stays when its file is gone
        return _compiled(Path(temporary) / file, name, text, flags, "for this process alone: no cache can be written")


def _library(target: Path, name: str, text: str, flags: Sequence[str]) -> ctypes.CDLL:
    if (library := _open(target)) is not None:
        return library
    with filelock.FileLock(target.with_suffix(".lock"), timeout=_SECONDS):  # several processes, one compiler
        if (library := _open(target)) is not None:
            return library
        return _compiled(target, name, text, flags, "once on this machine")


def _compiled(target: Path, name: str, text: str, flags: Sequence[str], how_often: str) -> ctypes.CDLL:
    compiler()  # before the line that says so
    print(f"stepfusion: compiling the C++ {name} kernels, {how_often}", file=sys.stderr, flush=True)
    build(text, flags, target)
    note_compiled(f"the C++ {name} kernels")
    return ctypes.CDLL(str(target))


def _open(path: Path) -> ctypes.CDLL | None:
    """The library in a file; None if there is none, or one that cannot be loaded and is to be compiled again."""
    try:
        return ctypes.CDLL(str(path)) if path.exists() else None
    except OSError:
        return None


def _complete(flags: Sequence[str]) -> list[str]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has no OpenMP
    added = shlex.split(os.environ.get("STEPFUSION_CXXFLAGS", ""))
    return [*flags, *threads, abi, *added]


def _key(text: str, flags: Sequence[str]) -> str:
    """A digest of everything that decides whether a library fits: a user's machines may share a cache."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    facts = (text, *flags, torch.__version__, sys.platform, platform.machine(), libc or "")
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def build(text: str, flags: Sequence[str], target: Path) -> None:
    """Compile C++ that calls PyTorch into a library, which appears whole or not at all.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    words = compiler()
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        path, compiled, linked = (Path(folder) / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
        path.write_text(text, encoding="utf-8")
        _run([*words, *flags, f"-I{torch_folder / 'include'}", "-c", str(path), "-o", str(compiled)])
        # Without -fopenmp: the OpenMP library must be the one that PyTorch runs, whatever its file is called.
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*words, "-shared", *sanitizers, str(compiled), *libraries, "-o", str(linked)])
        os.replace(linked, target)


def compiler() -> list[str]:
    """The command that compiles C++: what ``CXX`` names, or the first that is found.

    Raises:
        CompilerError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for words in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if shutil.which(words[0]) is not None:
            return words
    if chosen:
        raise CompilerError(f"there is no C++ compiler {chosen[0]!r}, which CXX names")
    raise CompilerError(f"there is no C++ compiler ({', '.join(_COMPILERS)}; CXX names another)")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise CompilerError(f"{command[0]} failed: {first.strip()}")
