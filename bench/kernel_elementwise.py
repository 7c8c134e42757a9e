"""The sampling step, the forward process, its posterior and the pixels, by everyone who has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stepfusion import samplers
from stepfusion.bench.kernel_work import DIFFUSERS, INDUCTOR, Set, Work, identity, implementations, source
from stepfusion.bench.measure import Limit
from stepfusion.bench.optional import need, why_not
from stepfusion.bench.own_loop import OWN, OwnScheduler
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion.samplers.schedule import NoiseSchedule

_STEPS, _POSITION = 50, 20  # which row of which table is measured
_LARGEST = 64.0  # of the terms of a step there: coefficients up to 12, states up to 5
_LARGEST_SAMPLE = 8.0  # of the images and the noise of q_sample
_SCHEDULE = NoiseSchedule.linear(scaled=False)
#: Notes of those who draw by PyTorch's generator.
_DRAWING = dict.fromkeys((INDUCTOR, DIFFUSERS, OWN), "draws torch.randn")


def elementwise(device: torch.device, sizes: Sequence[tuple[int, ...]]) -> Iterator[Work]:
    """Every operation that takes each element by itself, for images of these shapes [B, C, H, W]."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for shape in sizes:
        yield _step(device, shape, dtype, "ddim", "no noise")
        yield _step(device, shape, dtype, "ddim", "noise given")
        yield _step(device, shape, dtype, "ddim", "noise drawn")
        yield _step(device, shape, dtype, "ddpm", "noise given")
        yield _q_sample(device, shape, "noise given")
        yield _q_sample(device, shape, "noise drawn")
        yield _posterior(device, shape)
        yield _to_uint8(device, shape)


def _step(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, sampler: str, noise: str) -> Work:
    """One step of a table of 50 for every image of ``shape`` [B, C, H, W], all on one row."""
    eta = 0.0 if noise == "no noise" else 1.0
    if sampler == "ddim":
        table = samplers.ddim(_SCHEDULE, _STEPS, eta=eta, compat="diffusers")
    else:
        table = samplers.ddpm(_SCHEDULE, _STEPS, compat="diffusers")
    on_device = table.on(device)
    columns, timesteps = on_device.coefficients, on_device.timesteps
    lanes, elements = shape[0], math.prod(shape)
    copied = dtype != torch.float32

    def make() -> Set:
        return {
            **identity(lanes, device),
            "x": torch.randn(shape, device=device),
            "out": torch.randn(shape, device=device).to(dtype),
            "noise": None if noise == "no noise" else torch.randn(shape, device=device),
            "rows": torch.full((lanes,), _POSITION, device=device),
            "x_next": torch.empty(shape, device=device),
            "x_net": torch.empty(shape, device=device, dtype=dtype) if copied else None,
        }

    def run(step: Callable[..., Tensor], s: Set, given: bool) -> Tensor:
        drawn = source(s, noise, given)
        return step(s["x"], s["out"], s["rows"], columns, timesteps, x_next=s["x_next"], x_net=s["x_net"], **drawn)

    compiled = torch.compile(_step_formula, fullgraph=True, dynamic=False)

    def inductor(s: Set, given: bool) -> Tensor:
        drawn = noise == "noise drawn" and not given
        x_next: Tensor = compiled(s["x"], s["out"], s["rows"], columns, None if drawn else s["noise"], drawn)[0]
        return x_next

    timestep = int(table.timesteps[_POSITION])
    own = OwnScheduler(sampler, {"variance_type": "fixed_small"})
    own.set_timesteps(_STEPS)

    def own_step(s: Set, given: bool) -> Tensor:
        z = None if noise == "noise drawn" and not given else s["noise"]
        return own.step(s["out"], timestep, s["x"], z, eta=eta).prev_sample

    peer = _DiffusersStep(sampler, eta, timestep, noise)
    return Work(
        f"{sampler} step, {noise}",
        shape,
        dtype,
        elements * (8 + dtype.itemsize * (2 if copied else 1) + (4 if noise == "noise given" else 0)),
        elements * (10 if noise == "no noise" else 12),
        make,
        Limit(tolerance(torch.float32, _LARGEST, ROUNDINGS["diffusion_step"])),
        {
            **{name: partial(run, op) for name, op in implementations("diffusion_step", device).items()},
            INDUCTOR: inductor,
            DIFFUSERS: peer.run,
            **({OWN: own_step} if why_not("diffusers") is not None else {}),
        },
        noise == "noise drawn",
        _DRAWING if noise == "noise drawn" else {},
        peer.patched if sampler == "ddpm" and why_not("diffusers") is None else nullcontext,
    )


def _step_formula(
    x: Tensor, out: Tensor, rows: Tensor, columns: Tensor, noise: Tensor | None, drawn: bool
) -> tuple[Tensor, Tensor]:
    """A step as a compiler likes it: one expression, without the reference's branches."""
    c = columns[rows].view(-1, columns.shape[1], *[1] * (x.ndim - 1))
    eps = out.float()
    x0 = (c[:, 0] * x + c[:, 1] * eps).clamp(-c[:, 2], c[:, 2])
    x_next = c[:, 3] * x0 + c[:, 4] * x + c[:, 5] * eps
    if drawn:
        noise = torch.randn_like(x)
    if noise is not None:
        x_next = x_next + c[:, 6] * noise
    return x_next, x_next.to(out.dtype)


class _DiffusersStep:
    """A scheduler's step. DDPM's takes no noise from outside: it is handed over by a patch that holds for the run."""

    def __init__(self, sampler: str, eta: float, timestep: int, noise: str) -> None:
        self._sampler, self._eta, self._timestep, self._noise = sampler, eta, timestep, noise
        self._scheduler: Any = None
        self._z: Tensor | None = None

    def patched(self) -> AbstractContextManager[object]:
        """DDPM's steps add the current set's noise."""
        return mock.patch.object(need("diffusers.schedulers.scheduling_ddpm"), "randn_tensor", self._handed_over)

    def _handed_over(self, *_: object, **__: object) -> Tensor | None:
        return self._z

    def run(self, s: Set, given: bool) -> Tensor:
        if self._scheduler is None:
            self._scheduler = getattr(need("diffusers"), f"{self._sampler.upper()}Scheduler")()
            self._scheduler.set_timesteps(_STEPS)
        self._z = None if self._noise == "noise drawn" and not given else s["noise"]
        options = {"eta": self._eta, "variance_noise": self._z} if self._sampler == "ddim" else {}
        out: Tensor = self._scheduler.step(s["out"], self._timestep, s["x"], **options).prev_sample
        return out


def _q_sample(device: torch.device, shape: tuple[int, ...], noise: str) -> Work:
    signal, scale = (
        torch.tensor(table, dtype=torch.float32, device=device)
        for table in (_SCHEDULE.sqrt_alphas_cumprod, _SCHEDULE.sqrt_one_minus_alphas_cumprod)
    )
    drawn = noise == "noise drawn"

    def make() -> Set:
        return {
            **identity(shape[0], device),
            "x": torch.randn(shape, device=device),
            "t": torch.randint(0, 1000, (shape[0],), device=device),
            "noise": torch.randn(shape, device=device),
        }

    def run(q_sample: Callable[..., tuple[Tensor, Tensor]], s: Set, given: bool) -> Tensor:
        return q_sample(s["x"], s["t"], signal, scale, **source(s, noise, given))[0]

    compiled = torch.compile(_q_sample_formula, fullgraph=True, dynamic=False)
    scheduler: Any = need("diffusers").DDPMScheduler() if why_not("diffusers") is None else None

    def inductor(s: Set, given: bool) -> Tensor:
        x_t: Tensor = compiled(s["x"], s["t"], signal, scale, None if drawn and not given else s["noise"])[0]
        return x_t

    def diffusers(s: Set, given: bool) -> Tensor:
        z = torch.randn_like(s["x"]) if drawn and not given else s["noise"]
        out: Tensor = scheduler.add_noise(s["x"], z, s["t"])
        return out

    accepted = tolerance(torch.float32, _LARGEST_SAMPLE, ROUNDINGS["q_sample"])
    return Work(
        f"q_sample, {noise}",
        shape,
        torch.float32,
        math.prod(shape) * 12,
        math.prod(shape) * 3,
        make,
        Limit(accepted),
        {
            **{name: partial(run, op) for name, op in implementations("q_sample", device).items()},
            INDUCTOR: inductor,
            DIFFUSERS: diffusers,
        },
        drawn,
        _DRAWING if drawn else {},
        limits={} if scheduler is None else {DIFFUSERS: Limit(accepted + _of_tables(scheduler.alphas_cumprod))},
    )


def _of_tables(alphas_cumprod: Tensor) -> float:
    """The largest error that a peer's tables give its q_sample: a float32 product of all steps, and 1 minus it."""
    theirs = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    ours = _SCHEDULE.sqrt_alphas_cumprod, _SCHEDULE.sqrt_one_minus_alphas_cumprod
    apart = sum(float(abs(x.double().numpy() - y).max()) for x, y in zip(theirs, ours, strict=True))
    return _LARGEST_SAMPLE * apart


def _q_sample_formula(
    x: Tensor, t: Tensor, signal: Tensor, scale: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (-1, *[1] * (x.ndim - 1))
    if noise is None:
        noise = torch.randn_like(x)
    return signal[t].view(shape) * x + scale[t].view(shape) * noise, noise


def _posterior(device: torch.device, shape: tuple[int, ...]) -> Work:
    tables = [
        torch.tensor(table, dtype=torch.float32, device=device)
        for table in (
            _SCHEDULE.posterior_mean_coef1,
            _SCHEDULE.posterior_mean_coef2,
            _SCHEDULE.posterior_variance,
            _SCHEDULE.posterior_log_variance_clipped,
        )
    ]

    def make() -> Set:
        x, y = torch.randn(shape, device=device), torch.randn(shape, device=device)
        return {"x": x, "y": y, "t": torch.zeros(shape[0], dtype=torch.int64, device=device)}

    scheduler: Any = None
    if why_not("diffusers") is None:
        scheduler = need("diffusers").DDPMScheduler(prediction_type="sample", clip_sample=False)

    def diffusers(s: Set, given: bool) -> Tensor:
        mean: Tensor = scheduler.step(s["x"], 0, s["y"]).prev_sample
        return mean

    def run(posterior: Callable[..., tuple[Tensor, Tensor, Tensor]], s: Set, given: bool) -> Tensor:
        return posterior(s["x"], s["y"], s["t"], *tables)[0]

    compiled = torch.compile(_posterior_formula, fullgraph=True, dynamic=False)
    return Work(
        "posterior",
        shape,
        torch.float32,
        math.prod(shape) * 12,
        math.prod(shape) * 3,
        make,
        Limit(tolerance(torch.float32, 8.0, ROUNDINGS["q_posterior_mean_variance"])),
        {
            **{name: partial(run, op) for name, op in implementations("q_posterior_mean_variance", device).items()},
            INDUCTOR: partial(run, compiled),
            DIFFUSERS: diffusers,
        },
        notes={DIFFUSERS: "DDPMScheduler.step of an x0, at the timestep that adds no noise"},
    )


def _posterior_formula(x_start: Tensor, x_t: Tensor, t: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    coef1, coef2, variance, log_variance = (table[t].view(-1, *[1] * (x_t.ndim - 1)) for table in tables)
    return coef1 * x_start + coef2 * x_t, variance, log_variance


def _to_uint8(device: torch.device, shape: tuple[int, ...]) -> Work:
    def run(to_uint8: Callable[[Tensor], Tensor], s: Set, given: bool) -> Tensor:
        return to_uint8(s["x"])

    return Work(
        "to_uint8",
        shape,
        torch.float32,
        math.prod(shape) * 5,
        math.prod(shape) * 5,
        lambda: {"x": torch.randn(shape, device=device)},
        Limit(1.0),  # a level: ties may round otherwise
        {
            **{name: partial(run, op) for name, op in implementations("to_uint8", device).items()},
            INDUCTOR: partial(run, torch.compile(_to_uint8_formula, fullgraph=True, dynamic=False)),
        },
    )


def _to_uint8_formula(x: Tensor) -> Tensor:
    return ((x * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
