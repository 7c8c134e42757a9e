"""The caches of Inductor and Triton inside stepfusion's (:mod:`stepfusion.kernels.cache`), for the next process.

Both write to their caches when they only read, to lock something or to put a file where its name says. So where
stepfusion's cache cannot be written to, they work in a private copy of it, which is made of links.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from stepfusion.kernels.cache import (
    cache_directory,
    make_cache_directory,
    note_compiled,
    shipped_directory,
    why_not_private,
)
from stepfusion.kernels.cpu.library import ONEDNN_LIMITS

__all__ = ["cache_directory", "compiler_cache", "inductor_folder", "make_cache_directory", "use_triton_cache"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_OF_TRITON = "TRITON_CACHE_DIR"
_GROUP = "__grp__"  # a file of Triton's that lists where those lie that belong together
_MISSES = "fxgraph_cache_miss", "fxgraph_cache_bypass"  # what Inductor counts when it compiles
_LOCK = threading.RLock()


@contextmanager
def compiler_cache(what: str = "a program") -> Iterator[None]:
    """Let Inductor keep what it compiles in this block in stepfusion's cache, one thread at a time.

    If it had to compile, :func:`stepfusion.kernels.cache.note_compiled` is told that it was ``what``.

    ``TORCHINDUCTOR_CACHE_DIR`` set by the user wins, and is as before after the block. Inductor itself sets it to its
    default in a temporary directory, when it is first used: that is not a user's choice. If stepfusion's cache cannot
    be used, Inductor's default remains, unless others may write to it: then a directory for this block alone stands
    in for it.
    """
    with _LOCK, ExitStack() as stack:
        previous = os.environ.get(_VARIABLE)  # before the import, which can set it
        stack.enter_context(_noting(what))
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        default = os.path.abspath(default_cache_dir())
        if previous is not None and previous != default:
            yield
            return
        directory = make_cache_directory(inductor_folder()) or _working_copy(inductor_folder())
        if directory is None and _is_open_to_others(Path(default)):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepfusion-")))
        if directory is None:
            yield
            return
        os.environ[_VARIABLE] = str(directory)
        try:
            yield
        finally:
            if previous is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = previous


def inductor_folder() -> str:
    """The name of Inductor's folder in the cache, one for each set of instructions that may be used here.

    What Inductor keeps holds weights in the layout that oneDNN chose, and code for some instructions, while the keys
    of its cache name neither. A home directory on several machines, or a limit such as ``ONEDNN_MAX_CPU_ISA`` that
    is set once, would have a process abort in a network that another one compiled.
    """
    has = [torch.backends.cpu.get_cpu_capability(), platform.machine()]
    has += ["bf16"] if torch.cpu._is_avx512_bf16_supported() else []
    has += ["amx"] if torch.cpu._is_amx_tile_supported() else []
    has += [value for name in ONEDNN_LIMITS if (value := os.environ.get(name))]
    return "inductor-" + re.sub(r"[^a-z0-9_]+", "-", "-".join(has).lower())


def use_triton_cache() -> None:
    """Have Triton keep its kernels in stepfusion's cache from now on, if ``STEPFUSION_CACHE`` says where that is.

    Nothing is done if ``TRITON_CACHE_DIR`` is set. Without either variable Triton's own default remains.
    """
    if os.environ.get("STEPFUSION_CACHE") and not os.environ.get(_OF_TRITON):
        with _LOCK:
            directory = make_cache_directory("triton")
            if directory is not None:
                _relocate_groups(directory)
            directory = directory or _working_copy("triton")
            if directory is not None:
                os.environ[_OF_TRITON] = str(directory)


@contextmanager
def _noting(what: str) -> Iterator[None]:
    from torch._dynamo.utils import counters

    def misses() -> int:
        return sum(counters["inductor"][name] for name in _MISSES)

    before = misses()
    yield
    if misses() > before:
        note_compiled(what)


def _working_copy(name: str) -> Path | None:
    """A directory of this process alone with all that a cache holds which cannot be written to; None without one."""
    shipped = shipped_directory(name)
    try:
        return None if shipped is None else _copy_of(shipped, os.getpid())
    except OSError:  # no room for temporary files, or no links
        return None


@functools.cache
def _copy_of(shipped: Path, process: int) -> Path:
    """The copy, which is removed at the end of the process that made it. Files are links, locks are left out."""
    copy = Path(tempfile.mkdtemp(prefix="stepfusion-"))
    atexit.register(_remove, copy, process)
    for folder, _, files in os.walk(shipped):
        place = copy / Path(folder).relative_to(shipped)
        place.mkdir(exist_ok=True)
        for file in files:
            if not file.endswith(".lock"):
                (place / file).symlink_to(Path(folder, file).resolve())
    _relocate_groups(copy)
    return copy


def _remove(copy: Path, process: int) -> None:
    if os.getpid() == process:  # and not in a process that was forked from it
        shutil.rmtree(copy, ignore_errors=True)


def _relocate_groups(directory: Path) -> None:
    """Let Triton find the files of its groups in ``directory``: it lists them with the path that they had before."""
    for group in directory.glob(f"*/{_GROUP}*"):
        try:
            listed = json.loads(group.read_bytes())["child_paths"]
            moved = {name: str(group.parent / Path(path).name) for name, path in listed.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # Triton compiles again what it cannot read either
        if moved != listed:
            _replace(group, json.dumps({"child_paths": moved}))


def _replace(file: Path, text: str) -> None:
    """Give a file another text, whole, so that no reader sees a part; a link becomes a file."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as written:
        written.write(text)
    os.replace(written.name, file)


def _is_open_to_others(directory: Path) -> bool:
    """Whether others may write to a directory; not if there is none yet."""
    return directory.exists() and why_not_private(directory) is not None
