"""Inductor's cache inside stepfusion's (:mod:`stepfusion.kernels.cache`): compiled networks, for the next process."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from stepfusion.kernels.cache import cache_directory, make_cache_directory, why_not_private
from stepfusion.kernels.cpu.library import ONEDNN_LIMITS

__all__ = ["cache_directory", "compiler_cache", "inductor_folder", "make_cache_directory"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_LOCK = threading.RLock()


@contextmanager
def compiler_cache() -> Iterator[None]:
    """Let Inductor keep what it compiles in this block in stepfusion's cache, one thread at a time.

    ``TORCHINDUCTOR_CACHE_DIR`` set by the user wins, and is as before after the block. Inductor itself sets it to its
    default in a temporary directory, when it is first used: that is not a user's choice. If stepfusion's cache cannot
    be used, Inductor's default remains, unless others may write to it: then a directory for this block alone stands
    in for it.
    """
    with _LOCK, ExitStack() as stack:
        previous = os.environ.get(_VARIABLE)  # before the import, which can set it
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        default = os.path.abspath(default_cache_dir())
        if previous is not None and previous != default:
            yield
            return
        directory = make_cache_directory(inductor_folder())
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


def _is_open_to_others(directory: Path) -> bool:
    """Whether others may write to a directory; not if there is none yet."""
    return directory.exists() and why_not_private(directory) is not None
