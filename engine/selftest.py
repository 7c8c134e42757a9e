"""A quick proof on the machine at hand: the fused step against the reference, and both against float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepfusion import kernels
from stepfusion.kernels import reference
from stepfusion.kernels.backend import why_not_triton
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion.samplers import ddpm
from stepfusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference found, and the largest that rounding explains."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """True where rounding explains the difference."""
        return self.error <= self.allowed


def self_test(device: torch.device) -> list[Check]:
    """Walk a stochastic table over random images on ``device``.

    Reference against float64, and fused against reference where Triton runs.
    """
    table = ddpm(NoiseSchedule.linear(), 10)
    rows = torch.arange(10, device=device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((10, 3, 16, 16), generator=generator).to(device)
    out = torch.randn((10, 3, 16, 16), generator=generator).to(device)
    identity = {"seeds": rows * 7, "indices": rows}
    single, double = table.on(device), table.on(device, torch.float64)
    exact = reference.diffusion_step(
        x.double(), out.double(), rows, double.coefficients, double.timesteps, **identity
    )
    plain = reference.diffusion_step(x, out, rows, single.coefficients, single.timesteps, **identity)
    magnitude = float(max(abs(table.coefficients[:, :2]).max() * x.abs().max(), exact.abs().max()))
    allowed = tolerance(torch.float32, magnitude, ROUNDINGS["diffusion_step"])
    checks = [Check("reference step against float64", float((plain - exact).abs().max()), allowed)]
    if why_not_triton(device) is None:
        fused = kernels.diffusion_step(x, out, rows, single.coefficients, single.timesteps, **identity)
        checks.append(Check("fused step against reference", float((fused - plain).abs().max()), 0.0))
    return checks
