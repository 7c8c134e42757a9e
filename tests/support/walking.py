"""Walking a table with the reference step, as an engine does, and a network whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stepfusion.kernels import STREAM_INITIAL, reference
from stepfusion.table import StepTable

Network = Callable[[torch.Tensor, int], torch.Tensor]
CPU = torch.device("cpu")


def walk(table: StepTable, network: Network, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """x after every row of a table, in the dtype of x; with given noise [rows, B, ...], or without any."""
    return _walk(table, network, x, noise, None)


def draw(table: StepTable, network: Network, count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Images 0 .. count-1 of a seed, float32, all noise counter-based."""
    seeds, indices = torch.full((count,), seed), torch.arange(count)
    x = reference.normal(seeds, indices, torch.zeros_like(indices), shape, STREAM_INITIAL)
    return _walk(table, network, x, None, (seeds, indices))


def _walk(
    table: StepTable,
    network: Network,
    x: torch.Tensor,
    noise: torch.Tensor | None,
    keys: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    device = table.on(CPU, x.dtype)
    seeds, indices = keys if keys is not None else (None, None)
    for i, t in enumerate(table.timesteps):
        x = reference.diffusion_step(
            x,
            network(x, int(t)),
            torch.full((len(x),), i),
            device.coefficients,
            device.timesteps,
            noise=None if noise is None else noise[i],
            seeds=seeds,
            indices=indices,
        )
    return x


@dataclass(frozen=True)
class Gaussian:
    """The ideal network for data N(mean, std^2 I): E[x0 | x], as eps, x0 or v. Keeps every state of order 1."""

    alphas_cumprod: torch.Tensor  # float64 [T]
    prediction: str
    mean: float | torch.Tensor
    std: float

    def __call__(self, x: torch.Tensor, t: int) -> torch.Tensor:
        abar = self.alphas_cumprod[t].to(x.dtype)
        spread = abar * self.std**2 + 1 - abar
        residual = (x - abar.sqrt() * self.mean) / spread
        if self.prediction == "epsilon":
            return (1 - abar).sqrt() * residual
        x0 = self.mean + abar.sqrt() * self.std**2 * residual
        if self.prediction == "sample":
            return x0
        return (abar * (1 - abar)).sqrt() * residual - (1 - abar).sqrt() * x0
