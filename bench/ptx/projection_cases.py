"""Products of shortcuts, added to an image: of one input and of two, ragged, at any address, doubled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepfusion import kernels
from stepfusion.bench.ptx.added_cases import random_image
from stepfusion.bench.ptx.agreement import within
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion.bench.ptx.inputs import BRAIN, HALF, Case, unchanged, words
from stepfusion.kernels import reference
from stepfusion.kernels.tolerance import projection_roundings, tolerance


@dataclass(frozen=True)
class Projection:
    """One call of add_projection_, or of add_projection_doubled if ``doubles``.

    Attributes:
        channels, of_x, of_skip: of the image, x and the skip input. offset: elements by which x is shifted; the
            launcher copies it then. nan: put one into a pixel of the first image.
    """

    channels: int
    of_x: int
    of_skip: int
    height: int
    width: int
    dtype: torch.dtype = BRAIN
    batch: int = 2
    bias: bool = True
    doubles: bool = False
    offset: int = 0
    nan: bool = False

    def __str__(self) -> str:
        channels = f"{self.of_x}+{self.of_skip} to {self.channels} channels"
        options = [name for name in ("bias", "doubles", "offset", "nan") if getattr(self, name)]
        return words("projection", self.dtype, (self.height, self.width), channels, f"batch {self.batch}", *options)

    def check(self, executor: Executor) -> None:
        """The sum is float64's within rounding, also where another image has a NaN; inputs are left alone."""
        size = self.height, self.width
        given: dict[str, Any] = {
            "image": random_image((self.batch, self.channels, *size), self.dtype),
            "x": random_image((self.batch, self.of_x, *size), self.dtype, self.offset),
            "weight": (torch.randn(self.channels, self.of_x + self.of_skip) / 4).to(self.dtype),
        }
        if self.of_skip:
            given["skip"] = random_image((self.batch, self.of_skip, *size), self.dtype)
        if self.bias:
            given["bias"] = torch.randn(self.channels)
        if self.nan:
            given["x"][0, -1, -1, -1] = math.nan
        before = {name: tensor.clone() for name, tensor in given.items()}
        double = {name: tensor.double() for name, tensor in given.items()}
        magnitude = {name: tensor.abs().nan_to_num() for name, tensor in double.items()}
        largest = float(reference.add_projection_doubled(**magnitude).max())
        roundings = projection_roundings(self.of_x + self.of_skip)
        allowed, name = tolerance(self.dtype, largest, roundings), f"add_projection_{'doubled' * self.doubles}"
        with executor.running():
            out = getattr(kernels, name)(**given)
        within("sum", out, getattr(reference, name)(**double), allowed)
        if not self.doubles:
            del before["image"]  # which it was added to
        unchanged(given, before)


def _quick() -> list[Projection]:
    return [
        Projection(64, 64, 64, 8, 8, doubles=True),
        Projection(40, 32, 32, 9, 7, HALF, nan=True),
        Projection(128, 32, 16, 64, 64, batch=1),
        Projection(64, 96, 0, 6, 5, bias=False),
    ]


def _every() -> Iterator[Projection]:
    for dtype in (HALF, BRAIN):
        plain = Projection(128, 128, 64, 16, 16, dtype)
        yield plain
        yield replace(plain, of_skip=0, bias=False)
        yield replace(plain, channels=200, of_x=48, of_skip=16, height=7, width=5, nan=True)
        yield replace(plain, channels=33, of_x=20, of_skip=12, height=5, width=3, offset=1)
        yield replace(plain, channels=1, of_x=1, of_skip=0, height=1, width=1, batch=1)
        yield replace(plain, doubles=True)
        yield replace(plain, channels=136, of_x=40, of_skip=24, height=7, width=9, doubles=True, nan=True)
        yield replace(plain, channels=256, of_x=64, height=64, width=64, batch=1)
        yield replace(plain, channels=64, of_x=64, height=65, width=64, batch=1, doubles=True)
        yield replace(plain, channels=136, of_x=32, of_skip=32, height=65, width=64, batch=1)
        yield replace(plain, channels=512, of_x=512, of_skip=512, height=4, width=4)


def projection_cases() -> list[Case]:
    """Every case, each once."""
    quick = _quick()
    full = dict.fromkeys([*quick, *_every()])
    return [Case(str(case), case.check, NVIDIA if case in quick else ()) for case in full]
