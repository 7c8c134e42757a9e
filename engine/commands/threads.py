"""How a command uses a processor: how its idle threads wait, how many there are, and a note if others are busy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from stepfusion.commands.streams import tell

#: What OpenMP's libraries read when PyTorch loads them. A thread that waits for others turns some 1000 times, about
#: 15 microseconds, and sleeps: by default it turns for milliseconds, on a core that another process may need.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
_CHOICES = (*WAITING, "KMP_BLOCKTIME")  # by which a user decides, too
MOST = 1 << 10


def wait_passively() -> None:
    """Let idle threads sleep, in this process and those that it starts, unless the user decided how they wait.

    Nothing is done once PyTorch is loaded, for it would come too late.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _CHOICES):
        os.environ.update(WAITING)


def add_threads_argument(add: Callable[..., object]) -> None:
    """Declare the number of threads."""
    add("--threads", type=int, metavar="N", help="threads of a CPU (default: PyTorch's, one for each core)")


def use_threads(args: argparse.Namespace) -> None:
    """Use as many threads as ``args`` say; without a number, say so on a terminal if the machine is busy.

    Raises:
        TypeError, ValueError: the number is out of range.
    """
    import torch

    from stepfusion import _checks

    if args.threads is not None:
        torch.set_num_threads(_checks.integer("--threads", args.threads, 1, MOST))
    elif sys.stderr.isatty() and not args.quiet and (note := _busy(torch.get_num_threads())) is not None:
        tell(f"stepfusion: {note}")


def _busy(threads: int) -> str | None:
    """What to do about other processes, if there are more than this one leaves cores for."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads == 1 or load < cores:
        return None
    return f"the load of this machine is {load:.1f}, on {cores} cores: on a CPU --threads 1 may be faster"
