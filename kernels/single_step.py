"""One DDIM or DDPM step between two timesteps, without a table: coefficients on the fly, then the fused step.

For a loop, build a table once (:func:`stepfusion.ddim`, :func:`stepfusion.ddpm`) and walk it: the coefficients here
cost some twenty small tensor operations a call.
"""

from __future__ import annotations

from typing import Any

import torch

from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.kernels.step import diffusion_step
from stepfusion.kernels.step_reference import diffusion_step_reference


def ddim_step(
    x: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    eta: float = 0.0,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = True,
    final_alpha_cumprod: float = 1.0,
    **step: Any,
) -> torch.Tensor:
    """One DDIM step (Song et al. 2021, equation 12), every lane between timesteps of its own.

    Args:
        x: float32 [B, ...]; out: the network's output like x, float16, bfloat16 or float32.
        t, t_prev: int64 [B], where the step starts and ends; t_prev = -1 is the end of sampling.
        alphas_cumprod: float64 [T] (float32 is promoted), on the device of x.
        eta: 0 is deterministic, 1 has DDPM's noise.
        prediction: "epsilon", "sample" or "v_prediction". clip: bound of |x0|, or None.
        rederive_eps: use the eps that belongs to the clipped x0 instead of the network's.
        final_alpha_cumprod: abar if t_prev is -1.
        step: noise, seeds and indices, out_uncond and guidance, x_next, x_net, x0, flags, known of
            :func:`stepfusion.kernels.diffusion_step`.

    Returns:
        float32 like x, the state at t_prev. A t or t_prev outside the schedule gives NaN.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    between = levels(x, t, t_prev, alphas_cumprod, final_alpha_cumprod, prediction)
    table = ddim_table(*between, eta, prediction, clip, rederive_eps)
    return diffusion_step(x, out, own_rows(x), table.to(x.dtype), t, **step)


def ddim_step_reference(
    x: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    eta: float = 0.0,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = True,
    final_alpha_cumprod: float = 1.0,
    **step: Any,
) -> torch.Tensor:
    """The twin of :func:`ddim_step` in eager PyTorch: same arguments, same result. Also in float64."""
    between = levels(x, t, t_prev, alphas_cumprod, final_alpha_cumprod, prediction)
    table = ddim_table(*between, eta, prediction, clip, rederive_eps)
    return diffusion_step_reference(x, out, own_rows(x), table.to(x.dtype), t, **step)


def ddpm_step(
    x: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    **step: Any,
) -> torch.Tensor:
    """One ancestral DDPM step (Ho et al. 2020, algorithm 2), every lane between timesteps of its own.

    Args:
        x, out, t, t_prev, alphas_cumprod, prediction, clip, step: as in :func:`ddim_step`.
        variance: "fixed_small" (beta-tilde), "fixed_large" (beta), "learned" or "learned_range" (out has twice x's
            channels).

    Returns:
        float32 like x, the state at t_prev; no noise is added if t_prev is -1.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    between = levels(x, t, t_prev, alphas_cumprod, 1.0, prediction)
    table = ddpm_table(*between, t_prev < 0, variance, prediction, clip)
    return diffusion_step(x, out, own_rows(x), table.to(x.dtype), t, **step)


def ddpm_step_reference(
    x: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    **step: Any,
) -> torch.Tensor:
    """The twin of :func:`ddpm_step` in eager PyTorch: same arguments, same result. Also in float64."""
    between = levels(x, t, t_prev, alphas_cumprod, 1.0, prediction)
    table = ddpm_table(*between, t_prev < 0, variance, prediction, clip)
    return diffusion_step_reference(x, out, own_rows(x), table.to(x.dtype), t, **step)


def levels(
    x: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    final: float,
    prediction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """abar where each lane's step starts and where it ends, float64 [B]."""
    if prediction not in algebra.PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(map(repr, algebra.PREDICTIONS))}, got {prediction!r}")
    launch.check_lanes("x", x, (*launch.FLOATS, torch.float64))
    for name, tensor in (("t", t), ("t_prev", t_prev)):
        launch.check_like(name, tensor, (len(x),), x.device, (torch.int64,))
    launch.check_table("alphas_cumprod", alphas_cumprod, x.device)
    abar = alphas_cumprod.to(torch.float64)
    return launch.gather(abar, t), torch.where(t_prev == -1, final, launch.gather(abar, t_prev))


def ddim_table(
    abar: torch.Tensor, abar_prev: torch.Tensor, eta: float, prediction: str, clip: float | None, rederive_eps: bool
) -> torch.Tensor:
    """The table of one DDIM step between two levels a lane, float64 [B, 21]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    columns = algebra.ddim(abar, abar_prev, eta=eta, prediction=prediction, rederive_eps=rederive_eps)
    return _table(columns, clip)


def ddpm_table(
    abar: torch.Tensor,
    abar_prev: torch.Tensor,
    last: torch.Tensor,
    variance: str,
    prediction: str,
    clip: float | None,
) -> torch.Tensor:
    """The table of one DDPM step between two levels a lane, float64 [B, 21]; ``last``: lanes that add no noise."""
    if variance not in algebra.VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(map(repr, algebra.VARIANCES))}, got {variance!r}")
    columns = algebra.ddpm(abar, abar_prev, prediction=prediction, variance=variance)
    columns["sigma"] = torch.where(last, 0.0, columns["sigma"])
    if variance == "learned_range":
        small, large = columns.pop("small").clamp(min=1e-20).log(), columns.pop("large").log()
        columns["half_log_min"], columns["half_log_span"] = small / 2, (large - small) / 2
    return _table(columns, clip)


def _table(columns: dict[str, torch.Tensor], clip: float | None) -> torch.Tensor:
    """A table with one row a lane, float64 [B, 21]."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    columns["clip"] = torch.full_like(columns["sigma"], float("inf") if clip is None else clip)
    zero = torch.zeros_like(columns["sigma"])
    defaults = {name: zero + value for name, value in algebra.DEFAULTS.items()}
    return torch.stack([columns.get(name, defaults.get(name, zero)) for name in algebra.COLUMNS], dim=1)


def own_rows(x: torch.Tensor) -> torch.Tensor:
    """Lane i walks row i."""
    return torch.arange(len(x), device=x.device)
