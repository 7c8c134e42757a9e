"""One operation at one size, as the kernel benchmark measures it, and where its inputs come from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepfusion import kernels
from stepfusion.bench.measure import Limit
from stepfusion.kernels import cpu_ops, reference

OURS, CPP, REFERENCE = "stepfusion fused", "stepfusion C++", "reference"
INDUCTOR, DIFFUSERS, ATEN = "inductor", "diffusers", "aten"

Set = dict[str, Any]
Run = Callable[[Set, bool], Tensor]


@dataclass(frozen=True)
class Work:
    """One operation at one size.

    Attributes:
        op, shape, dtype: of the rows. bytes, flops: the least that it costs.
        make: a fresh set of inputs. limit: of the difference to the reference.
        limits: of providers that have another.
        runs: by provider, ``run(set, given)``; with ``given``, the set's noise replaces what the call would draw.
        draws: the timed call draws noise. notes: by provider. during: held while all are compared and timed.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    flops: int
    make: Callable[[], Set]
    limit: Limit
    runs: dict[str, Run]
    draws: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    during: Callable[[], AbstractContextManager[object]] = nullcontext
    limits: dict[str, Limit] = field(default_factory=dict)


def implementations(name: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """The op of this name by provider: Triton's, on a CPU that in C++ too, and the reference."""
    found = {OURS: getattr(kernels, name), REFERENCE: getattr(reference, name)}
    return found | ({CPP: getattr(cpu_ops, name)} if device.type == "cpu" else {})


def identity(lanes: int, device: torch.device) -> Set:
    """What keys each image's own noise."""
    return {
        "seeds": torch.zeros(lanes, dtype=torch.int64, device=device),
        "indices": torch.arange(lanes, device=device),
    }


def source(s: Set, noise: str, given: bool) -> Set:
    """Where a call of ours has its noise from."""
    if noise == "noise drawn" and not given:
        return {"seeds": s["seeds"], "indices": s["indices"]}
    return {"noise": s["noise"]}
