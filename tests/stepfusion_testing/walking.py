"""Walking a table with the reference step, as an engine does, and a network whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stepfusion.kernels import reference
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

Network = Callable[[torch.Tensor, int], torch.Tensor]


def walk(table: StepTable, network: Network, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """x after every row of a table, in the dtype of x; with given noise [rows, B, ...], or without any."""
    device = table.on(x.device, x.dtype)
    history = torch.full((3, *x.shape), torch.nan, dtype=x.dtype)  # a row must not read what no row has kept
    for i, t in enumerate(table.timesteps):
        x = reference.diffusion_step(
            x,
            network(x, int(t)),
            torch.full((len(x),), i),
            device.coefficients,
            device.timesteps,
            noise=None if noise is None else noise[i],
            history=history,
        )
    return x


@dataclass(frozen=True)
class Gaussian:
    """The ideal network for data N(mean, std^2 I): E[x0 | x], as eps, x0 or v. Keeps every state of order 1."""

    alphas_cumprod: torch.Tensor  # float64 [T]
    prediction: str
    mean: float
    std: float

    def __call__(self, x: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W]; t: one timestep, or int64 [B]."""
        abar = self.alphas_cumprod[t].to(x.dtype).reshape(-1, 1, 1, 1)
        residual = (x - abar.sqrt() * self.mean) / (abar * self.std**2 + 1 - abar)
        if self.prediction == "epsilon":
            return (1 - abar).sqrt() * residual
        x0 = self.mean + abar.sqrt() * self.std**2 * residual
        if self.prediction == "sample":
            return x0
        return (abar * (1 - abar)).sqrt() * residual - (1 - abar).sqrt() * x0


def stand_in(schedule: NoiseSchedule, prediction: str, *, learned: bool = False) -> Network:
    """The ideal network of a Gaussian that reaches beyond the clip, and a wiggle that is not linear.

    With ``learned`` it returns twice the channels, the second half for the variance.
    """
    ideal = Gaussian(torch.from_numpy(schedule.alphas_cumprod.copy()), prediction, 0.5, 0.6)

    def network(x: torch.Tensor, t: int) -> torch.Tensor:
        out = ideal(x, t) + 0.1 * torch.sin(3 * x + t)
        return torch.cat([out, torch.cos(5 * x)], dim=1) if learned else out

    return network
