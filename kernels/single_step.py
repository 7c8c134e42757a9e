"""One DDIM or DDPM step between two timesteps, without a table: coefficients on the fly, then the fused step.

For a loop, build a table once (:func:`stepfusion.ddim`, :func:`stepfusion.ddpm`) and walk it: the coefficients here cost some twenty small
tensor operations a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.kernels.step import diffusion_step, diffusion_step_reference

_Step = Callable[..., torch.Tensor]


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
        final_alpha_cumprod: abar where t_prev is -1.
        step: noise, seeds and indices, out_uncond and guidance, x_next, x_net, x0, flags of :func:`stepfusion.kernels.diffusion_step`.

    Returns:
        float32 like x, the state at t_prev. A t or t_prev outside the schedule gives NaN.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    return _ddim(
        diffusion_step,
        x,
        out,
        t,
        t_prev,
        alphas_cumprod,
        eta,
        prediction,
        clip,
        rederive_eps,
        final_alpha_cumprod,
        step,
    )


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
    step_function = diffusion_step_reference
    return _ddim(
        step_function,
        x,
        out,
        t,
        t_prev,
        alphas_cumprod,
        eta,
        prediction,
        clip,
        rederive_eps,
        final_alpha_cumprod,
        step,
    )


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
    """One ancestral DDPM step (Ho et al. 2020, algorithm 2), every lane between timesteps of its own; no noise where t_prev is -1.

    Args:
        x, out, t, t_prev, alphas_cumprod, prediction, clip, step: as in :func:`ddim_step`.
        variance: "fixed_small" (beta-tilde), "fixed_large" (beta) or "learned_range" (out has twice the channels of x).

    Returns:
        float32 like x, the state at t_prev.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    return _ddpm(diffusion_step, x, out, t, t_prev, alphas_cumprod, variance, prediction, clip, step)


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
    return _ddpm(diffusion_step_reference, x, out, t, t_prev, alphas_cumprod, variance, prediction, clip, step)


def _ddim(
    function: _Step,
    x: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    eta: float,
    prediction: str,
    clip: float | None,
    rederive_eps: bool,
    final_alpha_cumprod: float,
    step: dict[str, Any],
) -> torch.Tensor:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    abar, abar_prev = _levels(x, t, t_prev, alphas_cumprod, final_alpha_cumprod, prediction)
    columns = algebra.ddim(abar, abar_prev, eta=eta, prediction=prediction, rederive_eps=rederive_eps)
    return _walk(function, x, out, t, columns, clip, step)


def _ddpm(
    function: _Step,
    x: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    variance: str,
    prediction: str,
    clip: float | None,
    step: dict[str, Any],
) -> torch.Tensor:
    if variance not in algebra.VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(map(repr, algebra.VARIANCES))}, got {variance!r}")
    abar, abar_prev = _levels(x, t, t_prev, alphas_cumprod, 1.0, prediction)
    columns = algebra.ddpm(abar, abar_prev, prediction=prediction, variance=variance)
    columns["sigma"] = torch.where(t_prev < 0, 0.0, columns["sigma"])
    if variance == "learned_range":
        small, large = columns.pop("small").clamp(min=1e-20).log(), columns.pop("large").log()
        columns["half_log_min"], columns["half_log_span"] = small / 2, (large - small) / 2
    return _walk(function, x, out, t, columns, clip, step)


def _levels(
    x: torch.Tensor,
    t: torch.Tensor,
    t_prev: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    final: float,
    prediction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if prediction not in algebra.PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(map(repr, algebra.PREDICTIONS))}, got {prediction!r}")
    for name, tensor in (("t", t), ("t_prev", t_prev)):
        launch.check_like(name, tensor, (len(x),), x.device, (torch.int64,))
    tables = (torch.float32, torch.float64)
    launch.check_like("alphas_cumprod", alphas_cumprod, (alphas_cumprod.numel(),), x.device, tables)
    abar = alphas_cumprod.to(torch.float64)
    return launch.gather(abar, t), torch.where(t_prev == -1, final, launch.gather(abar, t_prev))


def _walk(
    function: _Step,
    x: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    columns: dict[str, torch.Tensor],
    clip: float | None,
    step: dict[str, Any],
) -> torch.Tensor:
    """A table with one row a lane, and one walk over it."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    columns["clip"] = torch.full_like(columns["sigma"], float("inf") if clip is None else clip)
    zero = torch.zeros_like(columns["sigma"])
    table = torch.stack([columns.get(name, zero) for name in algebra.COLUMNS], dim=1).to(x.dtype)
    return function(x, out, torch.arange(len(x), device=x.device), table, t, **step)
