"""C++ sources become libraries: compiled once by the machine's C++ compiler, and kept in stepfusion's cache.

A wheel for one platform has prebuilt ones (:mod:`stepfusion.kernels.cpu.prebuild`), which need no compiler.
"""

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
from typing import NamedTuple

import filelock
import torch

from stepfusion.kernels.cache import make_cache_directory, note_compiled, shipped_directory

_COMPILERS = "g++", "clang++", "c++"
#: Where a wheel for one platform has its libraries.
PREBUILT = Path(__file__).parent / "prebuilt"
_SECONDS = 300  # a compiler that takes longer is taken for one that hangs
_LOCK = threading.Lock()


class CompilerError(Exception):
    """There is no compiler, or it fails; the message, one line, says which."""


class Library(NamedTuple):
    """A library that is loaded, and where it is from: "prebuilt" or "compiled on this machine"."""

    functions: ctypes.CDLL
    origin: str


def instruction_set() -> str:
    """What PyTorch uses of this CPU, which ``ATEN_CPU_CAPABILITY`` limits: "AVX512", "AVX2", "DEFAULT", ..."""
    return torch.backends.cpu.get_cpu_capability()


def load(name: str, text: str, flags: Sequence[str]) -> Library:
    """The library that a text compiles to with these flags and those of ``STEPFUSION_CXXFLAGS``.

    If it is not at hand (:func:`at_hand`) it is compiled, which takes some seconds, and a line on stderr says so:
    once on a machine; where no cache can be written, in each process.

    Raises:
        CompilerError: it cannot be compiled or loaded here.
    """
    try:
        with _LOCK:
            library = at_hand(name, text, flags)
            return library or Library(_make(name, text, _complete(flags)), "compiled on this machine")
    except (OSError, subprocess.SubprocessError, filelock.Timeout) as error:
        raise CompilerError(str(error).splitlines()[0]) from error


def at_hand(name: str, text: str, flags: Sequence[str]) -> Library | None:
    """The same library if nothing has to be compiled, prebuilt or from the cache; None if it is in neither.

    A prebuilt one is for the same text, flags, version of PyTorch and platform, and has the digest in its name.
    """
    flags = _complete(flags)
    for path in PREBUILT.glob(f"{name}-{_key(text, flags)}-*.so"):
        if (library := _open(path, digest=path.stem.rpartition("-")[2])) is not None:
            return Library(library, "prebuilt")
    folder = make_cache_directory("cpp") or shipped_directory("cpp")
    library = None if folder is None else _open(folder / _file(name, text, flags))
    return None if library is None else Library(library, "compiled on this machine")


def prebuild(name: str, text: str, flags: Sequence[str], folder: Path) -> Path:
    """Compile a library into a file of `folder` with the name by which :func:`at_hand` finds it.

    Raises:
        CompilerError: there is no compiler, or it fails.
    """
    flags = _complete(flags)
    built = folder / f"{name}-{_key(text, flags)}.so"
    build(text, flags, built)
    return built.rename(built.with_stem(f"{built.stem}-{_digest(built.read_bytes())}"))


def _make(name: str, text: str, flags: Sequence[str]) -> ctypes.CDLL:
    if os.name == "nt":
        raise CompilerError("they are not compiled on Windows")
    folder = make_cache_directory("cpp")
    if folder is not None:
        target = folder / _file(name, text, flags)
        with filelock.FileLock(target.with_suffix(".lock"), timeout=_SECONDS):  # several processes, one compiler
            return _open(target) or _compiled(target, name, text, flags, "once on this machine")
    with tempfile.TemporaryDirectory(prefix="stepfusion-") as temporary:  # what is loaded stays when its file is gone
        target = Path(temporary) / "kernels.so"
        return _compiled(target, name, text, flags, "for this process alone: no cache can be written")


def _compiled(target: Path, name: str, text: str, flags: Sequence[str], how_often: str) -> ctypes.CDLL:
    compiler()  # before the line that says so
    print(f"stepfusion: compiling the C++ {name} kernels, {how_often}", file=sys.stderr, flush=True)
    build(text, flags, target)
    note_compiled(f"the C++ {name} kernels")
    return ctypes.CDLL(str(target))


def _open(path: Path, digest: str | None = None) -> ctypes.CDLL | None:
    """The library in a file; None if there is none, if it has another digest, or if it cannot be loaded."""
    try:
        whole = path.exists() and digest in (None, _digest(path.read_bytes()))
        return ctypes.CDLL(str(path)) if whole else None
    except OSError:
        return None


def _complete(flags: Sequence[str]) -> list[str]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    threads = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has no OpenMP
    added = shlex.split(os.environ.get("STEPFUSION_CXXFLAGS", ""))
    return [*flags, *threads, abi, *added]


def _file(name: str, text: str, flags: Sequence[str]) -> str:
    """The name of a library in the cache, which a user's machines may share: not every one has the same C library."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ()) else ""
    return f"{name}-{_key(text, (*flags, libc or ''))}.so"


def _key(text: str, flags: Sequence[str]) -> str:
    """A digest of everything that decides whether a library fits, but for what its loading shows."""
    facts = (text, *flags, torch.__version__, sys.platform, platform.machine())
    return _digest("\0".join(facts).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


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
        # The second keeps the place of PyTorch on this machine out of what is compiled.
        headers = f"-I{torch_folder / 'include'}", f"-ffile-prefix-map={torch_folder}=torch"
        _run([*words, *flags, *headers, "-c", str(path), "-o", str(compiled)])
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
