"""What is added up on the way: norms of sums, which are returned as well, and sums that are resampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepfusion import kernels
from stepfusion.bench.ptx.agreement import same_bits, within
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion.bench.ptx.inputs import BRAIN, DTYPES, HALF, SINGLE, Case, unchanged, words
from stepfusion.bench.ptx.norm_cases import bound
from stepfusion.kernels import reference


def random_image(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Random numbers in channels_last memory, ``offset`` elements behind a well-aligned address."""
    lanes, channels, height, width = shape
    memory = torch.zeros(lanes * channels * height * width + offset, dtype=dtype)[offset:]
    pixels = memory.view(lanes, height, width, channels)
    return pixels.copy_(torch.randn(pixels.shape)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class AddedNorm:
    """One call of add_group_norm_silu: x and residual have ``channels``, and a bias of each channel is added."""

    channels: int
    height: int
    width: int
    groups: int
    dtype: torch.dtype = BRAIN
    skip: int = 0
    residual: bool = True
    bias: bool = True
    silu: bool = True
    batch: int = 2
    offset: int = 0

    def __str__(self) -> str:
        options = [name for name in ("residual", "bias", "silu") if getattr(self, name)]
        options += ["offset"] * bool(self.offset)
        channels, batch = f"{self.channels}+{self.skip} channels", f"batch {self.batch}"
        return words(
            "added norm", self.dtype, (self.height, self.width), channels, f"{self.groups} groups", batch, *options
        )

    def check(self, executor: Executor) -> None:
        """The sum equals the reference's, and its norm is float64's within rounding; inputs are left alone."""
        total, size = self.channels + self.skip, (self.height, self.width)
        given: dict[str, Any] = {
            "x": random_image((self.batch, self.channels, *size), self.dtype, self.offset),
            "weight": torch.randn(total),
            "bias": torch.randn(total),
        }
        if self.residual:
            given["residual"] = random_image((self.batch, self.channels, *size), self.dtype)
        if self.skip:
            given["skip"] = random_image((self.batch, self.skip, *size), self.dtype)
        if self.bias:
            given["time"] = torch.randn(total).expand(self.batch, total)
        before = {name: tensor.clone() for name, tensor in given.items()}
        with executor.running():
            out, joined = kernels.add_group_norm_silu(**given, groups=self.groups, eps=1e-6, silu=self.silu)
        unchanged(given, before)
        same_bits("sum", joined, reference.add_group_norm_silu(**given, groups=self.groups, eps=1e-6)[1])
        exact = {"x": joined.double(), "weight": given["weight"].double(), "bias": given["bias"].double()}
        norm: dict[str, Any] = {**exact, "groups": self.groups, "eps": 1e-6}
        within("out", out, reference.group_norm_silu(**norm, silu=self.silu), bound(norm, self.dtype))


@dataclass(frozen=True)
class Sum:
    """One call of add_bias, add_bias_doubled or add_bias_padded."""

    shape: tuple[int, ...]
    dtype: torch.dtype = BRAIN
    name: str = "add_bias"
    residual: bool = True
    bias: bool = True
    offset: int = 0

    def __str__(self) -> str:
        options = [name for name in ("residual", "bias") if getattr(self, name)]
        return words(self.name, self.dtype, self.shape, *options, "offset" if self.offset else None)

    def check(self, executor: Executor) -> None:
        """Every tensor equals the reference's; inputs are left alone."""
        x = random_image(self.shape, self.dtype, self.offset)
        residual = random_image(self.shape, self.dtype) if self.residual else None
        bias = torch.randn(self.shape[1]) if self.bias else None
        given = {name: t for name, t in (("x", x), ("residual", residual), ("bias", bias)) if t is not None}
        before = {name: tensor.clone() for name, tensor in given.items()}
        with executor.running():
            got = getattr(kernels, self.name)(x, bias, residual)
        unchanged(given, before)
        want = getattr(reference, self.name)(x, bias, residual)
        for ours, theirs in zip(_tuple(got), _tuple(want), strict=True):
            same_bits("sum", ours, theirs)


def _tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


_SUMS = ("add_bias", "add_bias_doubled", "add_bias_padded")


def _quick() -> list[tuple[AddedNorm | Sum, tuple[str, ...]]]:
    hopper = ("sm_90",)
    return [
        (AddedNorm(64, 8, 8, 8), NVIDIA),
        (AddedNorm(48, 17, 18, 8, HALF, skip=32), NVIDIA),
        (AddedNorm(24, 29, 29, 4, SINGLE, skip=16, batch=1), NVIDIA),  # two launches
        (AddedNorm(64, 6, 5, 8, skip=64, residual=False, bias=False), hopper),
        *((Sum((2, 64, 6, 5), BRAIN, name), NVIDIA) for name in _SUMS),
        *((Sum((1, 5, 3, 7), SINGLE, name, residual=False), hopper) for name in _SUMS),
        (Sum((1, 200, 4, 4), HALF, offset=1), hopper),
    ]


def _every() -> Iterator[AddedNorm | Sum]:
    yield AddedNorm(33, 5, 7, 11, SINGLE, skip=22, silu=False)
    for dtype in DTYPES:
        plain = AddedNorm(64, 16, 16, 8, dtype)
        yield plain
        yield replace(plain, skip=64, batch=1)
        yield replace(plain, skip=32, height=33, width=35)
        yield replace(plain, channels=24, skip=16, groups=4, height=41, width=41, batch=1)
        yield replace(plain, channels=20, skip=4, groups=4, height=9, width=9)
        yield replace(plain, residual=False, height=40, width=40)
        yield replace(plain, bias=False, silu=False)
        yield replace(plain, channels=768, groups=1, height=17, width=17, batch=1)
        yield replace(plain, channels=128, groups=32, height=32, width=32, batch=1)
        yield replace(plain, channels=1, groups=1, height=5, width=7, offset=1)
        for name in _SUMS:
            for shape in ((2, 128, 8, 8), (2, 5, 3, 7), (1, 1, 1, 1), (3, 200, 4, 6), (1, 300, 2, 3)):
                yield Sum(shape, dtype, name)
            yield Sum((2, 32, 9, 5), dtype, name, bias=False)
            yield Sum((2, 32, 9, 5), dtype, name, residual=False, offset=1)


def added_cases() -> list[Case]:
    """Every case, each once."""
    quick = _quick()
    targets = dict(quick)
    full = dict.fromkeys([case for case, _ in quick] + list(_every()))
    return [Case(str(case), case.check, targets.get(case, ())) for case in full]
