"""Computing in a forked process: PyTorch's threads stay in the parent, and the child would wait for them for ever."""

from __future__ import annotations

import os

import torch

_computes: int | None = None  # the process that computed with several threads


def check_process() -> None:
    """Note that this process computes, unless it is the forked child of one that did, whose threads it lacks.

    It is called before anything is computed. A child that computes with one thread needs no others.

    Raises:
        RuntimeError: this process would wait for ever.
    """
    global _computes
    if torch.get_num_threads() == 1:
        return
    if _computes not in (None, os.getpid()):
        raise RuntimeError(
            "this process was forked from one that had computed with several threads, and would wait for them for "
            "ever: start it by 'spawn' or 'forkserver', compute in it alone, or call torch.set_num_threads(1) in it"
        )
    _computes = os.getpid()
