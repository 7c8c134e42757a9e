"""The forward process, its posterior, normal noise and pixels: equal bits for every shape, dtype and alignment."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from stepfusion import kernels
from stepfusion.bench.ptx.agreement import same_bits
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
    TIMESTEPS,
    Case,
    identity,
    shifted,
    strided,
    table,
    unchanged,
    words,
)
from stepfusion.kernels import reference

_SHAPES = (LARGE, FASHION, CIFAR, RAGGED, (1,), (7,), ())
_PLACED = (1, 8, 131)  # a shape whose lanes begin anywhere


def _placed(x: torch.Tensor, shift: int, strides: bool) -> torch.Tensor:
    return strided(x) if strides else shifted(x, shift)


@dataclass(frozen=True)
class Forward:
    """One call of q_sample: noise is "given" or "drawn"."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    noise: str
    timesteps: tuple[int, ...] = TIMESTEPS
    shift: int = 0
    strides: bool = False

    def __str__(self) -> str:
        shift = f"shifted {self.shift}" if self.shift else ""
        lanes = "" if self.timesteps == TIMESTEPS else f"{len(self.timesteps)} lanes"
        return words("q_sample", self.dtype, self.shape, self.noise, lanes, shift, "strides" * self.strides)

    def check(self, executor: Executor) -> None:
        """x_t and eps equal the reference's."""
        lanes = len(self.timesteps)
        given = {
            "x_start": torch.randn(lanes, *self.shape).to(self.dtype),
            "t": torch.tensor(self.timesteps),
            "sqrt_alphas_cumprod": table("sqrt_alphas_cumprod"),
            "sqrt_one_minus_alphas_cumprod": table("sqrt_one_minus_alphas_cumprod"),
        }
        given |= {"noise": torch.randn(lanes, *self.shape)} if self.noise == "given" else identity(lanes, 2**31)
        given = {name: _placed(tensor, self.shift, self.strides) for name, tensor in given.items()}
        before = {name: tensor.clone() for name, tensor in given.items()}
        with executor.running():
            got = kernels.q_sample(**given)
        for name, ours, theirs in zip(("x_t", "eps"), got, reference.q_sample(**given), strict=True):
            same_bits(name, ours, theirs)
        unchanged(given, before)


@dataclass(frozen=True)
class Posterior:
    """One call of q_posterior_mean_variance."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    timesteps: tuple[int, ...] = TIMESTEPS
    shift: int = 0
    strides: bool = False

    def __str__(self) -> str:
        shift = f"shifted {self.shift}" if self.shift else ""
        lanes = "" if self.timesteps == TIMESTEPS else f"{len(self.timesteps)} lanes"
        return words("posterior", self.dtype, self.shape, lanes, shift, "strides" * self.strides)

    def check(self, executor: Executor) -> None:
        """Mean, variance and log variance equal the reference's."""
        batch = (len(self.timesteps), *self.shape)
        x_start, x_t = (_placed(torch.randn(batch).to(self.dtype), self.shift, self.strides) for _ in range(2))
        names = (
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_variance",
            "posterior_log_variance_clipped",
        )
        given = (x_start, x_t, torch.tensor(self.timesteps), *map(table, names))
        with executor.running():
            got = kernels.q_posterior_mean_variance(*given)
        want = reference.q_posterior_mean_variance(*given)
        for name, ours, theirs in zip(("mean", "variance", "log variance"), got, want, strict=True):
            same_bits(name, ours, theirs)


@dataclass(frozen=True)
class Normal:
    """One call of normal."""

    shape: tuple[int, ...]
    stream: int
    lanes: int = 3

    def __str__(self) -> str:
        return words("normal", self.shape, f"stream {self.stream}", f"{self.lanes} lanes")

    def check(self, executor: Executor) -> None:
        """The numbers equal the reference's."""
        seeds = identity(self.lanes, 0)["seeds"]
        indices, timesteps = torch.tensor([0, 2**32 - 1, 7]), torch.tensor([999, 2**31 + 3, 0])
        given = (seeds, indices[: self.lanes], timesteps[: self.lanes], self.shape, self.stream)
        with executor.running():
            got = kernels.normal(*given)
        same_bits("z", got, reference.normal(*given))


@dataclass(frozen=True)
class Pixels:
    """One call of to_uint8."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shift: int = 0
    strides: bool = False

    def __str__(self) -> str:
        shift = f"shifted {self.shift}" if self.shift else ""
        return words("to_uint8", self.dtype, self.shape, shift, "strides" * self.strides)

    def check(self, executor: Executor) -> None:
        """The pixels equal the reference's, also of NaN, infinities, ends of the range, and halves."""
        x = torch.randn(self.shape) * 0.8
        ends = [math.nan, math.inf, -math.inf, 1.0, -1.0, 5.0, 0.0, -0.0, 2 * 127.5 / 255 - 1, 2 * 0.5 / 255 - 1]
        special = torch.tensor(ends)[: x.numel()]
        x.view(-1)[torch.randperm(x.numel())[: len(special)]] = special
        x = _placed(x.to(self.dtype), self.shift, self.strides)
        with executor.running():
            got = kernels.to_uint8(x)
        same_bits("pixels", got, reference.to_uint8(x))


Other = Forward | Posterior | Normal | Pixels


def _quick() -> list[tuple[Other, tuple[str, ...]]]:
    hopper = ("sm_90",)
    return [
        (Forward(RAGGED, BRAIN, "drawn"), NVIDIA),
        (Forward((7,), SINGLE, "given", shift=1), hopper),
        (Posterior(FASHION, BRAIN), NVIDIA),
        (Posterior(_PLACED, SINGLE, shift=1), hopper),
        (Posterior((1,), HALF, strides=True), hopper),
        (Normal(LARGE, kernels.STREAM_INITIAL, 1), NVIDIA),
        (Normal((7,), kernels.STREAM_STEP), hopper),
        (Pixels((2, 1, 28, 28), BRAIN), NVIDIA),
        (Pixels((2, 3, 32, 32), SINGLE), NVIDIA),
        (Pixels((2, 4, 12, 12), SINGLE), NVIDIA),
        (Pixels((1, 5, 9, 31), HALF, shift=1), hopper),
        (Pixels((1, 3, 4, 4), HALF, strides=True), hopper),
        (Pixels((1, 1, 1, 1), SINGLE), hopper),
    ]


def _every() -> Iterator[Other]:
    yield Forward(LARGE, HALF, "drawn", (5, 999))
    for dtype in DTYPES:
        for noise in ("given", "drawn"):
            plain = Forward(LARGE, dtype, noise)
            yield from (replace(plain, shape=shape) for shape in _SHAPES)
            for shift in (1, 2, 4):
                yield replace(plain, shape=_PLACED, shift=shift)
                yield replace(plain, timesteps=(7, 8), shift=shift)
            yield replace(plain, shape=(3, 64, 64), timesteps=(5,))
            yield replace(plain, shape=CIFAR, strides=True)
        mean = Posterior(LARGE, dtype)
        yield from (replace(mean, shape=shape) for shape in _SHAPES)
        yield from (replace(mean, shape=_PLACED, shift=shift) for shift in (1, 2, 4))
        yield replace(mean, shape=(3, 64, 64), timesteps=(5,))
        yield replace(mean, shape=CIFAR, strides=True)
        yield from _pixels(dtype)
    for shape in (LARGE, FASHION, (1,), (7,), RAGGED):
        yield Normal(shape, kernels.STREAM_INITIAL)
    for stream in (kernels.STREAM_STEP, kernels.STREAM_FORWARD):
        yield from (Normal(shape, stream) for shape in (LARGE, FASHION))
    yield Normal((3, 64, 64), kernels.STREAM_INITIAL, 1)


def _pixels(dtype: torch.dtype) -> Iterator[Pixels]:
    yield from (Pixels((2, channels, 64, 64), dtype) for channels in (1, 2, 3, 4))
    yield from (Pixels((1, channels, 1, 1), dtype) for channels in (1, 3))
    for shape in ((2, 3, 32, 32), (2, 4, 32, 32), (3, 4, 5, 7), (2, 3, 4, 4), (2, 3, 28, 28), (2, 4, 12, 12)):
        yield Pixels(shape, dtype)
    for shape in ((1, 5, 9, 31), (2, 3, 65, 80), (2, 1, 65, 80), (1, 3, 48, 48), (2, 300, 3, 3)):
        yield Pixels(shape, dtype)
    for shape in ((2, 3, 32, 32), (2, 4, 12, 12), (2, 1, 28, 28), (1, 2, 9, 9)):
        yield from (Pixels(shape, dtype, shift) for shift in (1, 2, 4))
        yield Pixels(shape, dtype, strides=True)


def other_cases() -> list[Case]:
    """Every case, each once."""
    quick = _quick()
    targets = dict(quick)
    full = dict.fromkeys([case for case, _ in quick] + list(_every()))
    return [Case(str(case), case.check, targets.get(case, ())) for case in full]
