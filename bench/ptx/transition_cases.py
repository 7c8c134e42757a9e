"""Log-probabilities of steps: equal bits for every shape, dtype, layout and alignment, but for learned variance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from stepfusion import kernels
from stepfusion.bench.ptx.agreement import same_bits, within
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion.bench.ptx.inputs import (
    BRAIN,
    CIFAR,
    DTYPES,
    FASHION,
    HALF,
    LARGE,
    RAGGED,
    SINGLE,
    Case,
    Tensors,
    shifted,
    unchanged,
    words,
)
from stepfusion.kernels import reference
from stepfusion.kernels.coefficients import HISTORY, WHOLE_IMAGE
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance

#: A row, the last, one that is unguided, none, one beyond the table.
_ROWS = (0, 3, 2, kernels.PARKED, 4)


@dataclass(frozen=True)
class Transition:
    """One call of transition_logprob; lanes are guided by different scales."""

    shape: tuple[int, ...]
    dtype: torch.dtype = BRAIN
    learned: bool = False
    guided: bool = False
    nhwc: bool = False
    shift: int = 0
    rows: tuple[int, ...] = _ROWS

    def __str__(self) -> str:
        options = [name for name in ("learned", "guided", "nhwc") if getattr(self, name)]
        shift = f"shifted {self.shift}" if self.shift else ""
        lanes = "" if self.rows == _ROWS else f"{len(self.rows)} lanes"
        return words("log-probability", self.dtype, self.shape, *options, lanes, shift)

    def check(self, executor: Executor) -> None:
        """The result equals the reference's; with learned variance an exp is involved, and rounding may differ."""
        given = self._arguments()
        before = {name: tensor.clone() for name, tensor in given.items()}
        with executor.running():
            got = kernels.transition_logprob(**given)
        unchanged(given, before)
        want = reference.transition_logprob(**given)
        if self.learned:
            within("log-probability", got, want, tolerance(SINGLE, _largest(want), ROUNDINGS["transition_logprob"]))
        else:
            same_bits("log-probability", got, want)

    def _arguments(self) -> Tensors:
        lanes = len(self.rows)
        batch = (lanes, *self.shape)
        out = (lanes, self.shape[0] * (1 + self.learned), *self.shape[1:])
        memory = torch.channels_last if self.nhwc else torch.contiguous_format
        table = _table()
        given = {"x": torch.randn(batch), "x_next": torch.randn(batch), "out": torch.randn(out).to(self.dtype)}
        if self.guided:
            given["out_uncond"] = torch.randn(out).to(self.dtype)
        given = {name: shifted(tensor, self.shift) if self.shift else tensor for name, tensor in given.items()}
        for name in ("out", "out_uncond"):
            if name in given:
                given[name] = given[name].contiguous(memory_format=memory)
        if self.guided:
            given["guidance"] = torch.tensor([7.5, 1.0, 2.0, 3.0, 0.0])[:lanes]
        return given | {
            "rows": torch.tensor(self.rows),
            "coefficients": table,
            "transitions": kernels.transitions_of(table),
        }


def _largest(x: torch.Tensor) -> float:
    return float(x.nan_to_num().abs().max())


def _table() -> torch.Tensor:
    """Four rows with noise, one of them unguided, float32."""
    table = torch.randn(4, len(kernels.COLUMNS))
    for name in (*HISTORY, *WHOLE_IMAGE, "unguided"):
        table[:, kernels.COLUMNS.index(name)] = 0.0
    table[:, kernels.COLUMNS.index("clip")] = torch.tensor([0.75, 1.0, 0.5, torch.inf])
    table[:, kernels.COLUMNS.index("sigma")] = torch.tensor([0.3, 1.0, 0.05, 2.0])
    table[2, kernels.COLUMNS.index("unguided")] = 1.0
    return table


def _quick() -> list[tuple[Transition, tuple[str, ...]]]:
    hopper = ("sm_90",)
    plain = Transition(CIFAR)
    return [
        (plain, NVIDIA),
        (Transition(FASHION, SINGLE, guided=True, shift=1), hopper),
        (Transition((3, 9, 7), HALF, guided=True, nhwc=True), hopper),
        (Transition((2, 7, 9), learned=True, guided=True), hopper),
        (Transition((1,), SINGLE), hopper),
    ]


def _every() -> Iterator[Transition]:
    for dtype in DTYPES:
        plain = Transition(CIFAR, dtype)
        yield from (replace(plain, shape=shape) for shape in (LARGE, FASHION, CIFAR, RAGGED, (1,), (7,), (1025,)))
        yield from (replace(plain, shape=(1, 8, 131), shift=shift) for shift in (1, 2, 4))
        yield replace(plain, guided=True)
        yield replace(plain, guided=True, nhwc=True)
        yield replace(plain, learned=True)
        yield replace(plain, learned=True, guided=True, nhwc=True)
        yield replace(plain, shape=(33 * 1024 + 5,), rows=(1, kernels.PARKED))


def transition_cases() -> list[Case]:
    """Every case, each once."""
    quick = _quick()
    targets = dict(quick)
    full = dict.fromkeys([case for case, _ in quick] + list(_every()))
    return [Case(str(case), case.check, targets.get(case, ())) for case in full]
