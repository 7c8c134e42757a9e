"""Triton kernels that are right, and kernels that do what the executor must find: controls of how launches are run.

``python executed_kernels.py`` executes them, in a process without TRITON_INTERPRET, and prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from stepfusion.bench.ptx.coverage import total
from stepfusion.bench.ptx.executor import Executor
from stepfusion.bench.ptx.machine import ORDERS
from stepfusion.bench.ptx.types import Fault

SIZE = 1024
#: sm_100 has an instruction of its own for the largest of a warp, which no kernel of ours uses.
TARGETS = ("sm_80", "sm_90")


@triton.jit
def layouts_kernel(x_ptr, y_ptr, i_ptr, n, BLOCK: tl.constexpr):
    """Reductions, a scan, a transposition, a split and a join: all that moves elements between threads."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=-1e30)
    tl.store(y_ptr, tl.max(x, axis=0))
    tl.store(y_ptr + 1, tl.min(tl.where(offs < n, x, 1e30), axis=0))
    tl.store(y_ptr + 2, tl.sum(tl.where(offs < n, x, 0.0), axis=0))
    tl.store(i_ptr, tl.argmax(x, axis=0))
    square = tl.trans(tl.reshape(tl.where(offs < n, x, 0.0), (BLOCK // 32, 32)))
    tl.store(y_ptr + 16 + offs, tl.reshape(square, (BLOCK,)))
    tl.store(y_ptr + 16 + BLOCK + offs, tl.cumsum(tl.where(offs < n, 1.0, 0.0), axis=0))
    a, b = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    tl.store(y_ptr + 16 + 2 * BLOCK + offs, tl.interleave(b, a))


@triton.jit
def copy_kernel(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    """y[i] = x[stride i] for i < n."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride, mask=offs < n), mask=offs < n)


@triton.jit
def last_one_wins_kernel(y_ptr, BLOCK: tl.constexpr):
    """Every thread writes a number of its own to one of 32 places."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs % 32, offs)


@triton.jit
def branch_kernel(x_ptr, BLOCK: tl.constexpr):
    """A branch that a launch with x = 0 does not take."""
    offs = tl.arange(0, BLOCK)
    if tl.load(x_ptr) > 0:
        tl.store(x_ptr + offs, tl.load(x_ptr + offs) * 2)


def layouts(target: str, order: str) -> str | None:
    """What is wrong with the results of :func:`layouts_kernel`."""
    x, i, n = torch.randn(999), torch.zeros(1, dtype=torch.int32), 999
    y = torch.full((16 + 3 * SIZE,), torch.nan)
    with Executor(target, orders=(order,), check_races=True).running():
        layouts_kernel[(1,)](x, y, i, n, BLOCK=SIZE)
    padded = torch.cat((x, torch.zeros(SIZE - n)))
    swapped = torch.cat((x, torch.full((SIZE - n,), -1e30))).view(-1, 2).flip(1).reshape(-1)
    checks = {
        "extremes": y[0] == x.max() and y[1] == x.min() and i[0] == x.argmax(),
        "sum": abs(y[2] - x.double().sum()) < 1e-4,
        "transposition": torch.equal(y[16 : 16 + SIZE], padded.view(32, 32).t().reshape(-1)),
        "scan": torch.equal(y[16 + SIZE : 16 + 2 * SIZE], torch.arange(1, SIZE + 1).clamp(max=n).float()),
        "split and join": torch.equal(y[16 + 2 * SIZE :], swapped),
    }
    return ", ".join(name for name, right in checks.items() if not right) or None


def _copy(x: torch.Tensor, y: torch.Tensor, stride: int, n: int) -> None:
    copy_kernel[(1,)](x, y, stride, n, BLOCK=SIZE)


def _fresh() -> None:
    _copy(torch.empty(SIZE), torch.empty(SIZE), 1, SIZE)


def _fresh_and_written() -> None:
    middle = torch.empty(SIZE)
    _copy(torch.zeros(SIZE), middle, 1, 1000)
    _copy(middle, torch.empty(SIZE), 1, 1000)


def _gaps() -> None:
    _copy(torch.zeros(SIZE, 2)[:, 0], torch.empty(SIZE), 1, SIZE)


def _no_gaps() -> None:
    _copy(torch.zeros(SIZE, 2)[:, 0], torch.empty(SIZE), 2, SIZE)


def _beyond() -> None:
    _copy(torch.zeros(SIZE)[:1000], torch.empty(SIZE), 1, 1001)


def _racing() -> None:
    last_one_wins_kernel[(1,)](torch.zeros(32, dtype=torch.int32), BLOCK=SIZE)


#: Launches -> words of the fault they must be, or None.
LAUNCHES: dict[str, tuple[Callable[[], None], str | None]] = {
    "reads what a launcher allocated": (_fresh, "reads of what nobody wrote"),
    "reads what a launch before it wrote": (_fresh_and_written, None),
    "reads between the elements of a strided tensor": (_gaps, "between the elements"),
    "reads a strided tensor": (_no_gaps, None),
    "reads one element beyond": (_beyond, "outside every tensor"),
}


def fault(launch: Callable[[], None], executor: Executor) -> str | None:
    """What executing a launch finds."""
    try:
        with executor.running():
            launch()
    except Fault as error:
        return str(error)
    return None


def coverage() -> dict[str, object]:
    """A branch that a launch does not take, and then one that does."""
    executor, missed = Executor("sm_90"), []
    for value in (-1.0, 1.0):
        with executor.running():
            branch_kernel[(1,)](torch.full((SIZE,), value), BLOCK=SIZE)
        (program,) = executor.programs.values()
        missed.append([block._asdict() for block in program.missed()])
    return {"missed": missed, "instructions": total([program]), "launches": executor.launches["branch_kernel"]}


def main() -> None:
    """Print what was found."""
    report = {
        "layouts": {f"{target}, {order}": layouts(target, order) for target in TARGETS for order in ORDERS[:3]},
        "faults": {name: fault(launch, Executor()) for name, (launch, _) in LAUNCHES.items()},
        "racing": fault(_racing, Executor()),
        "racing, logged": fault(_racing, Executor(check_races=True)),
        "racing, in two orders": fault(_racing, Executor(orders=ORDERS[1:3])),
        "coverage": coverage(),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
