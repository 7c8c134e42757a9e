"""Tensors that cases share: random ones, at addresses that are not aligned, between others, or with strides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import stepfusion as sf
from stepfusion.bench.ptx.agreement import same_bits
from stepfusion.bench.ptx.executor import Executor

Tensors = dict[str, torch.Tensor]

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = (HALF, BRAIN, SINGLE)
#: One lane: four even blocks, a part of one, three blocks, one ragged block after another.
LARGE, FASHION, CIFAR, RAGGED = (1, 64, 64), (1, 28, 28), (3, 32, 32), (1, 65, 80)
#: Timesteps in a schedule of 1000, at its ends and beyond them.
TIMESTEPS = (0, 999, 500, 1000, -1, 2**40)
SCHEDULE = sf.NoiseSchedule.linear(1000)


@dataclass(frozen=True)
class Case:
    """A call of a public function whose launches are executed and compared.

    Attributes:
        check: runs it; raises what is wrong. quick: targets on which it belongs to the quick part.
    """

    name: str
    check: Callable[[Executor], None]
    quick: tuple[str, ...] = ()


def words(*parts: object) -> str:
    """A name: dtypes and shapes in short, nothing for what is None, False or empty."""
    return " ".join(_word(part) for part in parts if part is not None and part is not False and part != "")


def _word(part: object) -> str:
    if isinstance(part, torch.dtype):
        return str(part).removeprefix("torch.")
    return "x".join(map(str, part)) or "scalar" if isinstance(part, tuple) else str(part)


def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same values ``by`` elements behind a well-aligned address, in memory that goes on at both ends."""
    memory = torch.full((x.numel() + 2 * by,), 7, dtype=x.dtype)[by : by + x.numel()].view(x.shape)
    return memory.copy_(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every other element of a tensor twice as large."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]


def table(name: str) -> torch.Tensor:
    """A table of :data:`SCHEDULE`, float32 [T]."""
    return torch.from_numpy(getattr(SCHEDULE, name).copy()).float()


def identity(lanes: int, first: int) -> Tensors:
    """Seeds of all bits, and indices that pass a power of two."""
    return {"seeds": torch.randint(-(2**63), 2**63 - 1, (lanes,)), "indices": torch.arange(lanes) + first}


def plant(x: torch.Tensor, lane: int, value: float) -> None:
    """Put ``value`` into the middle of one lane."""
    x[lane].view(-1)[math.prod(x.shape[1:]) // 2] = value


def unchanged(given: Tensors, before: Tensors) -> None:
    """Inputs are left alone.

    Raises:
        Disagreement: naming the one that was written.
    """
    for name, tensor in before.items():
        same_bits(f"{name}, an input,", given[name], tensor)
