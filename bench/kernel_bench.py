"""Every fused operation against its eager reference, Inductor, PyTorch's own composition and diffusers' scheduler.

Inputs rotate through sets that together exceed the caches, as far as 64 sets do. If noise is drawn, stepfusion is
compared with its reference drawing the same noise; peers are compared with given noise, and timed drawing their own.
Peers' steps write the next state only, ours the network's copy of it as well if that has another dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepfusion.bench.floors import Floors, measure_floors
from stepfusion.bench.kernel_elementwise import elementwise
from stepfusion.bench.kernel_norms import normalisations
from stepfusion.bench.kernel_projections import projections
from stepfusion.bench.kernel_token_norms import token_normalisations
from stepfusion.bench.kernel_work import CPP, DIFFUSERS, INDUCTOR, OURS, REFERENCE, Run, Set, Work
from stepfusion.bench.measure import Contender, contest
from stepfusion.bench.optional import why_not
from stepfusion.bench.rows import Row
from stepfusion.kernels.backend import interpreting, why_not_triton
from stepfusion.kernels.cpu.sampling_library import why_not_sampling_kernels

PART = "kernels"
_SIZES = {
    "tiny": ((1, 3, 8, 8), (2, 3, 16, 16)),
    "cpu": ((1, 1, 28, 28), (1, 3, 32, 32), (64, 3, 64, 64), (16, 3, 256, 256)),
    "cuda": ((1, 3, 32, 32), (64, 3, 32, 32), (16, 3, 256, 256), (128, 3, 256, 256)),
}
_ROTATED = {"tiny": 1, "cpu": 64 << 20, "cuda": 256 << 20}  # bytes of all sets together
_MOST_SETS = 64
_COMPILE_SECONDS = {"cpu": 180.0, "cuda": 20.0}  # for each operation and size


def kernel_rows(
    device: torch.device, *, compiled: bool = True, tiny: bool = False, rounds: int = 15
) -> Iterator[Row]:
    """Measure all operations on ``device``; without ``compiled``, Inductor is not timed."""
    floors = measure_floors(PART, device, tiny=tiny)
    yield from floors.rows
    size = "tiny" if tiny else device.type
    reasons = {
        OURS: _why_not_fused(device),
        CPP: why_not_sampling_kernels(),
        INDUCTOR: None if compiled else "nothing is compiled in this run",
        DIFFUSERS: why_not("diffusers"),
    }
    absent = {name: f"not timed: {reason}" for name, reason in reasons.items() if reason is not None}
    passes = [frozenset({INDUCTOR}), frozenset()] if INDUCTOR not in absent else [frozenset[str]()]
    for left_out in passes:  # first those that do not compile; then all, interleaved, whose rows replace the first
        norms = itertools.chain(normalisations(device, size), token_normalisations(device, size))
        for work in itertools.chain(elementwise(device, _SIZES[size]), norms, projections(device, size)):
            torch._dynamo.reset()
            runs = {name: run for name, run in work.runs.items() if name not in left_out}
            yield from _rows(replace(work, runs=runs), device, floors, absent, _ROTATED[size], rounds)


def _why_not_fused(device: torch.device) -> str | None:
    """Why the fused kernels' time means nothing here."""
    if interpreting():
        return "Triton's interpreter runs the kernels here, and its time means nothing"
    return why_not_triton(device)


def _rows(
    work: Work, device: torch.device, floors: Floors, absent: dict[str, str], rotated: int, rounds: int
) -> Iterator[Row]:
    first = work.make()
    size = sum(t.numel() * t.element_size() for t in first.values() if isinstance(t, Tensor))
    sets = [first, *(work.make() for _ in range(min(_MOST_SETS, math.ceil(rotated / size)) - 1))]
    contenders = [_contender(name, run, work, sets) for name, run in work.runs.items() if name not in absent]
    common: dict[str, Any] = {
        "shape": "x".join(map(str, work.shape)),
        "dtype": str(work.dtype).removeprefix("torch."),
        "bytes": work.bytes,
        "flops": work.flops,
    }
    with work.during():
        verdicts = contest(contenders, device, rounds)
    for name, verdict in verdicts.items():
        fraction = None
        if verdict.timing is not None:
            milliseconds = verdict.timing.device_ms or verdict.timing.median_ms
            fraction = work.bytes / (milliseconds / 1e3) / floors.copy
        yield Row(
            PART,
            work.op,
            name,
            device.type,
            **common,
            fraction=fraction,
            fraction_of=None if fraction is None else "copy bandwidth",
            notes="; ".join(filter(None, (work.notes.get(name), f"{len(sets)} sets of inputs", verdict.notes))),
            **verdict.fields(),  # type: ignore[arg-type]
        )
    for name in work.runs:
        if name in absent:
            yield Row(PART, work.op, name, device.type, **common, notes=absent[name])


def _contender(name: str, run: Run, work: Work, sets: Sequence[Set]) -> Contender:
    """Compared on the first set, timed on all in turn."""
    given = not (work.draws and name in (OURS, CPP, REFERENCE))
    truth = work.runs[REFERENCE](sets[0], given).clone()
    turn = itertools.cycle(sets)
    limit = work.limits.get(name, work.limit)
    seconds = _COMPILE_SECONDS[sets[0]["x"].device.type] if name == INDUCTOR else None
    return Contender(
        name, truth, lambda: run(sets[0], given), lambda: run(next(turn), False), limit, seconds, len(sets)
    )
