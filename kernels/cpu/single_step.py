"""One DDIM or DDPM step between two timesteps: :mod:`stepfusion.kernels.single_step`, the step in C++ for CPUs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepfusion.kernels.cpu.step import diffusion_step
from stepfusion.kernels.single_step import ddim_table, ddpm_table, levels, own_rows


def ddim_step(
    x: Tensor,
    out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    alphas_cumprod: Tensor,
    *,
    eta: float = 0.0,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = True,
    final_alpha_cumprod: float = 1.0,
    **step: Any,
) -> Tensor:
    """One DDIM step: :func:`stepfusion.kernels.ddim_step` on a CPU."""
    between = levels(x, t, t_prev, alphas_cumprod, final_alpha_cumprod, prediction)
    table = ddim_table(*between, eta, prediction, clip, rederive_eps)
    return diffusion_step(x, out, own_rows(x), table.to(x.dtype), t, **step)


def ddpm_step(
    x: Tensor,
    out: Tensor,
    t: Tensor,
    t_prev: Tensor,
    alphas_cumprod: Tensor,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    **step: Any,
) -> Tensor:
    """One ancestral DDPM step: :func:`stepfusion.kernels.ddpm_step` on a CPU."""
    between = levels(x, t, t_prev, alphas_cumprod, 1.0, prediction)
    table = ddpm_table(*between, t_prev < 0, variance, prediction, clip)
    return diffusion_step(x, out, own_rows(x), table.to(x.dtype), t, **step)
