"""The headline of a well-known short course on diffusion models: 32 sprites, DDPM-500 against DDIM-25.

Published there: 118 s against 6 s, 19.7 times. Here each sampler runs as a plain loop in the style of a teaching
notebook, and through the engine, on one network with random weights. Images of loop and engine are compared with the
same noise first; what is timed draws its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from stepfusion.bench.floors import measure_floors
from stepfusion.bench.measure import Contender, Limit, contest, one_line
from stepfusion.bench.options import Options
from stepfusion.bench.ours import check_runs_as_asked
from stepfusion.bench.rows import Row
from stepfusion.engine import Engine
from stepfusion.kernels import BackendError
from stepfusion.kernels.cpu.library import why_not_cpu_kernels
from stepfusion.options import DType, NetworkMode
from stepfusion.samplers import ddim, ddpm
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

PART = "headline"
NOTEBOOK = "notebook loop float32"
_IMAGES, _TIMESTEPS, _DDIM_STEPS = 32, 500, 25
_CLASSES = 5
#: Root mean square, relative to the images'; hundreds of unclipped steps. The loop runs with PyTorch's
#: defaults, so on a GPU with convolutions in TF32.
_ALLOWED = {"float32": {"cpu": 1e-3, "cuda": 2e-2}, "tf32": {"cuda": 2e-2}, "bfloat16": {"cpu": 1e-1, "cuda": 1e-1}}

Network = Callable[..., torch.Tensor]


def headline_rows(options: Options) -> Iterator[Row]:
    """Four times, interleaved: both samplers, by the loop and by the engine in each mode that runs here."""
    from stepfusion.networks import ContextUNet

    device, tiny = options.device, options.tiny
    timesteps, images = (10, 2) if tiny else (_TIMESTEPS, (options.batches or (_IMAGES,))[0])
    yield from measure_floors(PART, device, tiny=tiny).rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ContextUNet(
            in_channels=3, features=8 if tiny else 64, context_size=_CLASSES, sample_size=16, num_timesteps=timesteps
        ).eval()
    schedule = NoiseSchedule.linear(timesteps, scaled=False)
    stride = timesteps // (2 if tiny else _DDIM_STEPS)
    tables = [
        ddpm(schedule, clip=None, variance="fixed_large"),
        ddim(schedule, timesteps=list(range(timesteps - 1, -1, -stride)), clip=None),
    ]
    start = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    labels = (torch.arange(images) % _CLASSES).to(device)
    entries: list[_Entry] = []
    for table in tables:
        entries += _entries(network, table, start, labels, options)
    verdicts = contest([entry.contender for entry in entries], device, options.rounds or (2 if tiny else 3))
    for entry in entries:
        yield Row(
            PART,
            entry.op,
            entry.provider,
            device.type,
            model="context UNet",
            shape="x".join(map(str, start.shape)),
            dtype=entry.dtype,
            batch=images,
            steps=entry.steps,
            **verdicts[entry.contender.name].fields(),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class _Entry:
    """One of the times, and who is to take it."""

    op: str
    provider: str
    dtype: str
    steps: int
    contender: Contender


def _entries(
    network: torch.nn.Module, table: StepTable, start: torch.Tensor, labels: torch.Tensor, options: Options
) -> Iterator[_Entry]:
    """The loop and every engine for one sampler."""
    device, steps = options.device, len(table)
    noise = torch.randn(steps, *start.shape, generator=torch.Generator().manual_seed(1)).to(device)
    sampler = "DDPM" if table.stochastic else "DDIM"
    op = f"{sampler}-{steps}"
    schedule = table.schedule
    assert isinstance(schedule, NoiseSchedule)
    notebook = Notebook(network.to(device), schedule, table.timesteps.tolist(), ancestral=table.stochastic)
    truth = notebook.sample(start, labels, noise)
    scale = float(truth.square().mean().sqrt())

    def entry(provider: str, dtype: str, check: Callable[[], torch.Tensor], run: Callable[[], object]) -> _Entry:
        limit = Limit(scale * _ALLOWED[dtype][device.type], "rms")
        return _Entry(op, provider, dtype, steps, Contender(f"{op} {provider}", truth, check, run, limit))

    yield entry(
        NOTEBOOK,
        "float32",
        lambda: notebook.sample(start, labels, noise),
        lambda: notebook.sample(start, labels, None),
    )
    for mode, dtype in _modes(options):
        try:
            engine = Engine(
                network,
                table.schedule,
                null_label=_CLASSES,
                device=device,
                dtype=cast(DType, dtype),
                network=cast(NetworkMode, mode),
                batch=len(start),
            )
        except BackendError as error:
            raise RuntimeError(one_line(error)) from error

        def sample(z: torch.Tensor | None, engine: Engine = engine) -> torch.Tensor:
            x = engine.sample(table=table, start=start, labels=labels, noise=z, progress=False)
            check_runs_as_asked(engine)
            return x

        yield entry(
            f"stepfusion {mode} {dtype}",
            dtype,
            partial(sample, noise if table.stochastic else None),
            partial(sample, None),
        )


def _modes(options: Options) -> list[tuple[str, str]]:
    """The engine's modes that are measured on the device."""
    if options.device.type == "cuda":
        modes = [("eager", "tf32"), ("graph", "tf32"), ("graph", "float32"), ("graph", "bfloat16")]
        return [*modes, ("compile+graph", "bfloat16")] if options.compiled else modes
    modes = [("eager", "float32")]
    if options.compiled:
        modes.append(("compile", "float32"))
        if why_not_cpu_kernels(torch.bfloat16) is None:
            modes.append(("compile", "bfloat16"))
    return modes


class Notebook:
    """The two samplers as a teaching notebook writes them: float32, a few tensor operations a step, no clip.

    Args:
        network: predicts eps. schedule: of the training. timesteps: that are visited, first to last.
        ancestral: DDPM's step (Ho et al. 2020, algorithm 2), which visits all; else DDIM's (Song et al. 2021,
            equation 12).
    """

    def __init__(self, network: Network, schedule: NoiseSchedule, timesteps: list[int], *, ancestral: bool) -> None:
        self._network, self._timesteps, self._ancestral = network, timesteps, ancestral
        self._beta = schedule.betas
        self._alpha_bar = schedule.alphas_cumprod

    @torch.no_grad()
    def sample(self, x: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Denoise x [B, C, H, W]; ``noise`` [steps, B, C, H, W] replaces what the loop would draw."""
        beta = torch.tensor(self._beta, dtype=torch.float32, device=x.device)
        alpha_bar = torch.tensor(self._alpha_bar, dtype=torch.float32, device=x.device)
        for i, t in enumerate(self._timesteps):
            eps = self._network(x, torch.full((len(x),), t, device=x.device), labels)
            if self._ancestral:
                z = torch.zeros_like(x)
                if t > 0:
                    z = torch.randn_like(x) if noise is None else noise[i]
                mean = (x - eps * (beta[t] / (1 - alpha_bar[t]).sqrt())) / (1 - beta[t]).sqrt()
                x = mean + beta[t].sqrt() * z
            else:
                last = i + 1 == len(self._timesteps)
                following = torch.ones_like(alpha_bar[0]) if last else alpha_bar[self._timesteps[i + 1]]
                x0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
                x = following.sqrt() * x0 + (1 - following).sqrt() * eps
        return x
