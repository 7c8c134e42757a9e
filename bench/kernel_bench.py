"""Every fused operation against its eager reference, Inductor, PyTorch's own composition and diffusers' scheduler.

Inputs rotate through sets that together exceed the caches, as far as 64 sets do. Where noise is drawn, stepfusion is
compared with its reference drawing the same noise; peers are compared with given noise, and timed drawing their own.
Peers' steps write the next state only, ours the network's copy of it as well where that has another dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import kernels, samplers
from stepfusion.bench.floors import Floors, measure_floors
from stepfusion.bench.measure import Contender, Limit, contest
from stepfusion.bench.models import load_model
from stepfusion.bench.optional import need, why_not
from stepfusion.bench.rows import Row
from stepfusion.kernels import reference
from stepfusion.kernels.backend import interpreting, why_not_triton
from stepfusion.kernels.tolerance import ROUNDINGS, UNIT, tolerance
from stepfusion.samplers.schedule import NoiseSchedule

PART = "kernels"
OURS, REFERENCE, INDUCTOR, DIFFUSERS, ATEN = "stepfusion fused", "reference", "inductor", "diffusers", "aten"

_SIZES = {
    "tiny": ((1, 3, 8, 8), (2, 3, 16, 16)),
    "cpu": ((1, 3, 32, 32), (16, 3, 256, 256)),
    "cuda": ((1, 3, 32, 32), (64, 3, 32, 32), (16, 3, 256, 256), (128, 3, 256, 256)),
}
_ROTATED = {"tiny": 1, "cpu": 64 << 20, "cuda": 256 << 20}  # bytes of all sets together
_MOST_SETS = 64
_STEPS, _POSITION = 50, 20  # which row of which table is measured
_LARGEST = 64.0  # of the terms of a step there: coefficients up to 12, states up to 5
_NORM_BYTES = {"tiny": 1 << 12, "cpu": 4 << 20, "cuda": 128 << 20}  # of the input of a normalisation
_NORM_MODELS = {"tiny": ("tiny",), "cpu": ("cifar10",), "cuda": ("cifar10", "celebahq-256")}
_NORM_EPS = 1e-6
_SCHEDULE = NoiseSchedule.linear(scaled=False)

Set = dict[str, Any]
Run = Callable[[Set, bool], Tensor]


@dataclass(frozen=True)
class Work:
    """One operation at one size.

    Attributes:
        op, shape, dtype: of the rows. bytes, flops: the least that it costs.
        make: a fresh set of inputs. limit: of the difference to the reference.
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


def kernel_rows(
    device: torch.device, *, compiled: bool = True, tiny: bool = False, rounds: int = 15
) -> Iterator[Row]:
    """Measure all operations on ``device``; without ``compiled``, Inductor is not timed."""
    floors = measure_floors(PART, device, tiny=tiny)
    yield from floors.rows
    size = "tiny" if tiny else device.type
    reasons = {
        OURS: _why_not_fused(device),
        INDUCTOR: None if compiled else "nothing is compiled in this run",
        DIFFUSERS: why_not("diffusers"),
    }
    absent = {name: f"not timed: {reason}" for name, reason in reasons.items() if reason is not None}
    for work in itertools.chain(_elementwise(device, _SIZES[size]), _normalisations(device, size)):
        torch._dynamo.reset()
        yield from _rows(work, device, floors, absent, _ROTATED[size], rounds)


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
            notes="; ".join((*([work.notes[name]] if name in work.notes else []), f"{len(sets)} sets of inputs")),
            **verdict.fields(),  # type: ignore[arg-type]
        )
    for name in work.runs:
        if name in absent:
            yield Row(PART, work.op, name, device.type, **common, notes=absent[name])


def _contender(name: str, run: Run, work: Work, sets: Sequence[Set]) -> Contender:
    """Compared on the first set, timed on all in turn."""
    given = not (work.draws and name in (OURS, REFERENCE))
    truth = work.runs[REFERENCE](sets[0], given).clone()
    turn = itertools.cycle(sets)
    return Contender(name, truth, lambda: run(sets[0], given), lambda: run(next(turn), False), work.limit)


def _elementwise(device: torch.device, sizes: Sequence[tuple[int, ...]]) -> Iterator[Work]:
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


# The step


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
            **_identity(lanes, device),
            "x": torch.randn(shape, device=device),
            "out": torch.randn(shape, device=device).to(dtype),
            "noise": None if noise == "no noise" else torch.randn(shape, device=device),
            "rows": torch.full((lanes,), _POSITION, device=device),
            "x_next": torch.empty(shape, device=device),
            "x_net": torch.empty(shape, device=device, dtype=dtype) if copied else None,
        }

    def run(step: Callable[..., Tensor], s: Set, given: bool) -> Tensor:
        source = _source(s, noise, given)
        return step(s["x"], s["out"], s["rows"], columns, timesteps, x_next=s["x_next"], x_net=s["x_net"], **source)

    compiled = torch.compile(_step_formula, fullgraph=True, dynamic=False)

    def inductor(s: Set, given: bool) -> Tensor:
        drawn = noise == "noise drawn" and not given
        x_next: Tensor = compiled(s["x"], s["out"], s["rows"], columns, None if drawn else s["noise"], drawn)[0]
        return x_next

    peer = _DiffusersStep(sampler, eta, int(table.timesteps[_POSITION]), noise)
    return Work(
        f"{sampler} step, {noise}",
        shape,
        dtype,
        elements * (8 + dtype.itemsize * (2 if copied else 1) + (4 if noise == "noise given" else 0)),
        elements * (10 if noise == "no noise" else 12),
        make,
        Limit(tolerance(torch.float32, _LARGEST, ROUNDINGS["diffusion_step"])),
        {
            OURS: partial(run, kernels.diffusion_step),
            REFERENCE: partial(run, reference.diffusion_step),
            INDUCTOR: inductor,
            DIFFUSERS: peer.run,
        },
        noise == "noise drawn",
        {INDUCTOR: "draws torch.randn", DIFFUSERS: "draws torch.randn"} if noise == "noise drawn" else {},
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


# The forward process, its posterior, and pixels


def _q_sample(device: torch.device, shape: tuple[int, ...], noise: str) -> Work:
    signal, scale = (
        torch.tensor(table, dtype=torch.float32, device=device)
        for table in (_SCHEDULE.sqrt_alphas_cumprod, _SCHEDULE.sqrt_one_minus_alphas_cumprod)
    )
    drawn = noise == "noise drawn"

    def make() -> Set:
        return {
            **_identity(shape[0], device),
            "x": torch.randn(shape, device=device),
            "t": torch.randint(0, 1000, (shape[0],), device=device),
            "noise": torch.randn(shape, device=device),
        }

    def run(q_sample: Callable[..., tuple[Tensor, Tensor]], s: Set, given: bool) -> Tensor:
        return q_sample(s["x"], s["t"], signal, scale, **_source(s, noise, given))[0]

    compiled = torch.compile(_q_sample_formula, fullgraph=True, dynamic=False)
    scheduler: Any = need("diffusers").DDPMScheduler() if why_not("diffusers") is None else None

    def inductor(s: Set, given: bool) -> Tensor:
        x_t: Tensor = compiled(s["x"], s["t"], signal, scale, None if drawn and not given else s["noise"])[0]
        return x_t

    def diffusers(s: Set, given: bool) -> Tensor:
        z = torch.randn_like(s["x"]) if drawn and not given else s["noise"]
        out: Tensor = scheduler.add_noise(s["x"], z, s["t"])
        return out

    return Work(
        f"q_sample, {noise}",
        shape,
        torch.float32,
        math.prod(shape) * 12,
        math.prod(shape) * 3,
        make,
        Limit(tolerance(torch.float32, 8.0, ROUNDINGS["q_sample"])),
        {
            OURS: partial(run, kernels.q_sample),
            REFERENCE: partial(run, reference.q_sample),
            INDUCTOR: inductor,
            DIFFUSERS: diffusers,
        },
        drawn,
        {INDUCTOR: "draws torch.randn", DIFFUSERS: "draws torch.randn"} if drawn else {},
    )


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
        return {"x": x, "y": y, "t": torch.randint(0, 1000, (shape[0],), device=device)}

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
            OURS: partial(run, kernels.q_posterior_mean_variance),
            REFERENCE: partial(run, reference.q_posterior_mean_variance),
            INDUCTOR: partial(run, compiled),
        },
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
            OURS: partial(run, kernels.to_uint8),
            REFERENCE: partial(run, reference.to_uint8),
            INDUCTOR: partial(run, torch.compile(_to_uint8_formula, fullgraph=True, dynamic=False)),
        },
    )


def _to_uint8_formula(x: Tensor) -> Tensor:
    return ((x * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# GroupNorm and SiLU


def _normalisations(device: torch.device, size: str) -> Iterator[Work]:
    """Every (channels, height, width) that the size's UNets normalise and activate, channels_last."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    seen: dict[tuple[int, int, int, int], None] = {}
    for name in _NORM_MODELS[size]:
        seen |= dict.fromkeys(_normalised(name))
    for groups, channels, height, width in seen:
        batch = max(1, _NORM_BYTES[size] // (channels * height * width * dtype.itemsize))
        yield _group_norm(device, (batch, channels, height, width), groups, dtype)


def _normalised(name: str) -> list[tuple[int, int, int, int]]:
    """(groups, C, H, W) of every GroupNorm of a model, in the order of its layers; nothing is computed."""
    model = load_model(name)
    network = model.network.to("meta")
    found: list[tuple[int, int, int, int]] = []

    def record(module: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(module, nn.GroupNorm)
        found.append((module.num_groups, *out.shape[1:]))

    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(record)
    x = torch.empty(1, *model.image_shape, device="meta")
    network(x, torch.zeros(1, dtype=torch.int64, device="meta"))
    return found


def _group_norm(device: torch.device, shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> Work:
    channels = shape[1]

    def make() -> Set:
        return {
            "x": torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last),
            "weight": torch.randn(channels, device=device).to(dtype),
            "bias": torch.randn(channels, device=device).to(dtype),
        }

    def run(norm: Callable[..., Tensor], s: Set, given: bool) -> Tensor:
        return norm(s["x"], s["weight"], s["bias"], groups, _NORM_EPS)

    def aten(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        return functional.silu(functional.group_norm(x, groups, weight, bias, eps))

    magnitude = 24.0  # of normalised values up to 6 times weights up to 4
    roundings = 2 * math.ceil(math.sqrt(math.prod(shape[1:]) // groups)) + 16
    # peers round to the dtype between norm and activation, too
    allowed = tolerance(dtype, magnitude, roundings) + (0.0 if dtype == torch.float32 else magnitude * UNIT[dtype])
    return Work(
        "group_norm_silu",
        shape,
        dtype,
        2 * math.prod(shape) * dtype.itemsize,
        12 * math.prod(shape),
        make,
        Limit(allowed),
        {
            OURS: partial(run, kernels.group_norm_silu),
            REFERENCE: partial(run, reference.group_norm_silu),
            INDUCTOR: partial(run, torch.compile(aten, fullgraph=True, dynamic=False)),
            ATEN: partial(run, aten),
        },
    )


# Inputs


def _identity(lanes: int, device: torch.device) -> Set:
    """What keys each image's own noise."""
    return {
        "seeds": torch.zeros(lanes, dtype=torch.int64, device=device),
        "indices": torch.arange(lanes, device=device),
    }


def _source(s: Set, noise: str, given: bool) -> Set:
    """Where a call of ours has its noise from."""
    if noise == "noise drawn" and not given:
        return {"seeds": s["seeds"], "indices": s["indices"]}
    return {"noise": s["noise"]}
