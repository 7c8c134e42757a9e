"""The norm: one launch, of one tile and of several, and two; ragged sizes, all options; float64 within rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepfusion import kernels
from stepfusion.bench.ptx.agreement import within
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion.bench.ptx.inputs import BRAIN, DTYPES, HALF, SINGLE, Case, unchanged, words
from stepfusion.kernels import reference
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance

_ALL = ("time", "scale", "shift")


@dataclass(frozen=True)
class Norm:
    """One call of group_norm_silu.

    Attributes:
        channels, skip: of x and of the skip input. height, width: of the image. extras: of time, scale and shift.
        mean, std: of x. halves: weight and bias have the dtype of x, and are float32 otherwise. offset: elements by
            which x is shifted; the launcher copies it then, for the kernel wants 16 bytes.
    """

    channels: int
    height: int
    width: int
    groups: int
    dtype: torch.dtype = BRAIN
    skip: int = 0
    extras: tuple[str, ...] = ()
    silu: bool = True
    batch: int = 2
    mean: float = 0.0
    std: float = 1.0
    halves: bool = False
    eps: float = 1e-6
    offset: int = 0

    def __str__(self) -> str:
        channels = f"{self.channels}+{self.skip} channels"
        options = ["no silu"] * (not self.silu) + ["halves"] * self.halves + ["offset"] * bool(self.offset)
        options += [f"mean {self.mean}"] * (self.mean != 0) + [f"std {self.std}"] * (self.std != 1)
        options += [f"eps {self.eps}"] * (self.eps != 1e-6)
        size, batch = (self.height, self.width), f"batch {self.batch}"
        return words("norm", self.dtype, size, channels, f"{self.groups} groups", batch, *self.extras, *options)

    def arguments(self) -> dict[str, Any]:
        """Random inputs; time, scale and shift are columns of one wider tensor, as in a UNet."""
        total = self.channels + self.skip
        wide = torch.randn(self.batch, 16 + 3 * total).to(self.dtype)
        columns = zip(_ALL, wide[:, 16:].chunk(3, dim=1), strict=True)
        parameters = self.dtype if self.halves else torch.float32
        given: dict[str, Any] = {
            "x": self._image(self.channels, self.offset),
            "weight": torch.randn(total).to(parameters),
            "bias": torch.randn(total).to(parameters),
            "groups": self.groups,
            "eps": self.eps,
            "silu": self.silu,
        }
        if self.skip:
            given["skip"] = self._image(self.skip, 0)
        return given | {name: column for name, column in columns if name in self.extras}

    def _image(self, channels: int, offset: int) -> torch.Tensor:
        """[B, C, H, W] in channels_last memory."""
        pixels = (torch.randn(self.batch, self.height, self.width, channels) * self.std + self.mean).to(self.dtype)
        memory = torch.zeros(pixels.numel() + offset, dtype=self.dtype)[offset:].view(pixels.shape)
        return memory.copy_(pixels).permute(0, 3, 1, 2)

    def check(self, executor: Executor) -> None:
        """float64's result within rounding; inputs are left alone."""
        given = self.arguments()
        before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
        with executor.running():
            got = kernels.group_norm_silu(**given)
        exact: dict[str, Any] = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        within("out", got, reference.group_norm_silu(**exact), bound(exact, self.dtype))
        unchanged(given, before)


def bound(given: dict[str, Any], dtype: torch.dtype) -> float:
    """The tolerance, from the largest term: |h| / sigma of its group, times the gain, and the offsets."""
    h = torch.cat((given["x"], given["skip"]), dim=1) if "skip" in given else given["x"]
    if "time" in given:
        h = h + given["time"][:, :, None, None]
    grouped = h.unflatten(1, (given["groups"], -1)).flatten(2)
    terms = grouped.abs().amax(2) / (grouped.var(2, correction=0) + given["eps"]).sqrt()  # [B, groups]
    terms = (
        terms.repeat_interleave(h.shape[1] // given["groups"], dim=1) * given["weight"].abs() + given["bias"].abs()
    )
    if "scale" in given:
        terms = terms * (1 + given["scale"]).abs() + given["shift"].abs()
    return tolerance(dtype, float(terms.max()), ROUNDINGS["group_norm_silu"])


def _quick() -> list[tuple[Norm, tuple[str, ...]]]:
    hopper = ("sm_90",)
    return [
        (Norm(64, 8, 8, 8, extras=_ALL), NVIDIA),
        (Norm(48, 17, 18, 8, HALF, skip=32), NVIDIA),
        (Norm(33, 5, 7, 11, SINGLE, skip=22, extras=_ALL, silu=False), NVIDIA),
        (Norm(24, 29, 29, 4, SINGLE, skip=16, batch=1), NVIDIA),  # two launches
        (Norm(40, 41, 41, 4, BRAIN, extras=("time",), halves=True, batch=1), hopper),
        (Norm(2500, 4, 5, 1, SINGLE, extras=_ALL, batch=1), hopper),
        (Norm(24, 9, 9, 2, SINGLE, mean=1e3, std=0.1, batch=1), hopper),
        (Norm(8, 8, 8, 2, SINGLE, std=4e-20, eps=0.0, silu=False, batch=1), NVIDIA),
        (Norm(1, 5, 7, 1, HALF, offset=1), hopper),
        (Norm(6, 1, 1, 3, SINGLE, extras=("scale", "shift"), batch=1), hopper),
    ]


def _ragged() -> Iterator[Norm]:
    yield Norm(6, 1, 1, 3, extras=_ALL)
    yield Norm(1, 5, 7, 1)
    yield Norm(33, 5, 7, 11, skip=22, extras=_ALL)
    yield Norm(20, 9, 9, 4, skip=4, extras=("scale", "shift"))
    yield Norm(40, 28, 28, 8, extras=("time",))
    yield Norm(96, 33, 35, 32)
    yield Norm(200, 13, 11, 5, extras=_ALL)
    yield Norm(72, 24, 24, 2, skip=24, extras=_ALL)
    yield Norm(768, 33, 33, 1, extras=_ALL)
    yield Norm(1000, 9, 9, 1)
    yield Norm(67, 8, 9, 1, skip=66)
    yield Norm(24, 60, 70, 2, extras=_ALL)
    yield Norm(40, 41, 41, 4, skip=8, extras=_ALL)
    yield Norm(2500, 4, 5, 1, extras=_ALL)
    yield Norm(64, 33, 47, 8)
    yield Norm(16, 1, 1, 8)
    yield Norm(2, 1, 3, 1, extras=_ALL)
    yield Norm(32, 30, 20, 4, skip=16, extras=_ALL)


def _every() -> Iterator[Norm]:
    """Ragged shapes in every dtype, and the shapes of published networks that the machine-code bench looks at."""
    for dtype in DTYPES:
        for norm in _ragged():
            yield replace(norm, dtype=dtype)
            yield replace(norm, dtype=dtype, batch=1, halves=True)
        mean, std = (1e3, 0.1) if dtype == SINGLE else (5.0, 0.1)
        yield Norm(32, 32, 32, 8, dtype, mean=mean, std=std)
        yield Norm(24, 30, 35, 2, dtype, std=1e-15 if dtype != HALF else 1e-3, eps=0.0)
        yield Norm(32, 12, 12, 8, dtype, offset=1)
        yield Norm(128, 32, 32, 32, dtype)
    yield Norm(256, 16, 16, 32, BRAIN, extras=_ALL)
    yield Norm(512, 16, 16, 32, HALF, skip=256)
    yield Norm(256, 32, 32, 32, BRAIN, extras=_ALL)
    yield Norm(256, 4, 4, 32, BRAIN, silu=False)
    yield Norm(256, 14, 14, 32, BRAIN, skip=128)
    yield Norm(128, 64, 64, 32, BRAIN, extras=("time",), batch=1)
    yield Norm(512, 32, 32, 32, BRAIN, skip=256, batch=1)
    yield Norm(512, 64, 64, 32, BRAIN, skip=256, batch=1)
    yield Norm(500, 64, 64, 125, BRAIN, batch=1)


def norm_cases() -> list[Case]:
    """Every case, each once."""
    quick = _quick()
    targets = dict(quick)
    full = dict.fromkeys([case for case, _ in quick] + list(_every()))
    return [Case(str(case), case.check, targets.get(case, ())) for case in full]
