"""What networks are trained on along EDM's path and along the straight one: plain functions, for loops of one's own.

Each gives the loss of every image, so that callers weight and average as they like. A network is called as
``network(x, told)``, or ``network(x, told, labels)`` if there are labels; what it is told of a level is float32 [B].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepfusion import _checks
from stepfusion.diffusion.step_draws import log_normal, logit_normal, step_generator, strata
from stepfusion.kernels import launch
from stepfusion.kernels.launch import plain_torch
from stepfusion.samplers.path import Floats, FlowPath, Path, SigmaPath

#: How the times of rectified flow are drawn: evenly, or most of them between noise and data.
TIMES = ("uniform", "logit-normal")

Pair = tuple[Floats, Floats]
"""A weight of x0 and one of the noise for each image, float64 [B] each."""


def edm_loss(
    network: Callable[..., Any],
    path: SigmaPath,
    x_start: Tensor,
    *,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    labels: Tensor | None = None,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    seed: int = 0,
    step: int | None = None,
) -> Tensor:
    """EDM's loss of each image, differentiable in the network (Karras et al. 2022, equation 8 and table 1).

    With x = x0 + sigma eps and D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) it is the mean over the elements of

        lambda(sigma) (D(x; sigma) - x0)^2,    lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    As lambda c_out^2 = 1, that is the squared error of the raw output F, of which
    (sigma x0 - sigma_data^2 eps) / (sigma_data sqrt(sigma^2 + sigma_data^2)) is wanted: so it is computed, for the
    difference D - x0 loses its digits where sigma is small.

    Args:
        network: F; it is shown c_in x [B, ...] in the dtype of x_start, and told c_noise = log(sigma) / 4.
        path: says sigma_data, and how levels are told.
        x_start: x0 [B, ...] in float16, bfloat16, float32 or float64.
        sigma: float32 or float64 [B], on the CPU or on the device of x_start, which is then waited for. By default
            drawn: log sigma is N(p_mean, p_std^2), image i of B from the i-th of B equally likely parts.
        noise: eps [B, ...]; by default drawn.
        labels: are handed to the network.
        p_mean, p_std: of the logarithm of a drawn sigma.
        seed, step: of what is drawn, a function of (seed, step) alone. ``step`` is needed to draw, and different in
            every step of a training. The same are the sigma and the noise of ``stepfusion train``.

    Returns:
        float32 [B], or float64 if x_start is.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_path(path, SigmaPath)
    p_mean, p_std = checked_log_normal(p_mean, p_std)
    u, noise = _drawn(x_start, noise, sigma is None, seed, step)
    sigma = log_normal(u, p_mean, p_std) if sigma is None else sigma
    levels = _levels("sigma", sigma, x_start, lambda v: (v > 0) & (v < np.inf), "a finite number above 0")
    scale, data = path.in_scale("edm", levels), path.sigma_data
    target = levels * scale / data, -data * scale
    return _squared_errors(network, path, levels, x_start, noise, labels, (scale, scale * levels), target)


def flow_loss(
    network: Callable[..., Any],
    path: FlowPath,
    x_start: Tensor,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    labels: Tensor | None = None,
    times: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    seed: int = 0,
    step: int | None = None,
) -> Tensor:
    """The flow-matching loss of each image, differentiable in the network (Lipman et al. 2023, equation 23).

    With x = (1 - t) x0 + t eps it is the mean over the elements of (network(x; t) - (eps - x0))^2.

    Args:
        network: is shown x [B, ...] in the dtype of x_start, and told ``path.told_scale * t``.
        path: says how times are told, and shifts those that are drawn (Esser et al. 2024, equation 23).
        t: float32 or float64 [B] in [0, 1], on the CPU or on the device of x_start, which is then waited for. By
            default drawn, image i of B from the i-th of B equally likely parts.
        times: of a drawn t before its shift, "uniform" in [0, 1), or "logit-normal": log(t / (1 - t)) is
            N(logit_mean, logit_std^2) (Esser et al. 2024, equation 19).
        x_start, noise, labels, seed, step: as for :func:`edm_loss`.

    Returns:
        float32 [B], or float64 if x_start is.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_path(path, FlowPath)
    _checks.choice("times", times, TIMES)
    logit_mean = _checks.number("logit_mean", logit_mean)
    logit_std = _checks.number("logit_std", logit_std, 0.0)
    u, noise = _drawn(x_start, noise, t is None, seed, step)
    t = drawn_times(path, u, times, logit_mean, logit_std) if t is None else t
    levels = _levels("t", t, x_start, lambda v: (v >= 0) & (v <= 1), "a number in [0, 1]")
    ones = np.ones_like(levels)
    return _squared_errors(network, path, levels, x_start, noise, labels, path.pair(levels), (-ones, ones))


def checked_log_normal(p_mean: float, p_std: float) -> tuple[float, float]:
    """The mean and the standard deviation of log sigma, if every sigma that is drawn is a number above 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _checks.number("p_mean", p_mean, -100.0, 100.0), _checks.number("p_std", p_std, 0.0, 10.0)


def drawn_times(path: FlowPath, u: Tensor, times: str, logit_mean: float, logit_std: float) -> Tensor:
    """The quantiles ``u``, float64 [B] in [0, 1), of the times that :func:`flow_loss` draws: float64 [B]."""
    t = u if times == "uniform" else logit_normal(u, logit_mean, logit_std)
    return torch.from_numpy(path.shifted(t.numpy()))


def _squared_errors(
    network: Callable[..., Any],
    path: Path,
    levels: Floats,
    x_start: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    shown: Pair,
    target: Pair,
) -> Tensor:
    """The mean squared error of each image's output [B], if ``shown`` is what the network sees, and ``target`` what
    it should return of it."""
    dtype = torch.promote_types(x_start.dtype, torch.float32)
    told = torch.from_numpy(path.told(levels)).to(x_start.device, torch.float32)
    x0, eps = x_start.to(dtype), noise.to(dtype)
    x = _mixed(shown, x0, eps).to(x_start.dtype)
    out = network(x, told) if labels is None else network(x, told, labels)
    out = getattr(out, "sample", out)  # as diffusers' models return it
    launch.check_like("the network's output", out, tuple(x.shape), x.device, (*launch.FLOATS, torch.float64))
    errors: Tensor = (out.to(dtype) - _mixed(target, x0, eps)).square()
    return errors.reshape(len(x), math.prod(x.shape[1:])).mean(1)


def _mixed(weights: Pair, x0: Tensor, eps: Tensor) -> Tensor:
    """The sum of x0 and eps with a weight for each image."""
    of_x0, of_eps = (launch.per_lane(torch.from_numpy(w).to(x0.device, x0.dtype), x0) for w in weights)
    return of_x0 * x0 + of_eps * eps


@plain_torch(gradients=False)
def _drawn(
    x_start: Tensor, noise: Tensor | None, draws_levels: bool, seed: int, step: int | None
) -> tuple[Tensor, Tensor]:
    """Quantiles of the levels, float64 [B], and the noise: given, or of (seed, step) whether levels are or not."""
    launch.check_lanes("x_start", x_start, (*launch.FLOATS, torch.float64))
    launch.check_source(noise, None, None, x_start)
    seed = _checks.integer("seed", seed, 0, 2**63 - 1)
    if step is None:
        if noise is None or draws_levels:
            raise ValueError("step is needed to draw what is not given: another one in every step of a training")
        return torch.zeros(len(x_start), dtype=torch.float64), noise
    random = step_generator(seed, "step", _checks.integer("step", step, 0, 2**31 - 1))
    u = strata(len(x_start), random)
    if noise is None:
        noise = torch.randn(x_start.shape, generator=random).to(x_start.device)
    return u, noise


def _levels(
    name: str, levels: Tensor, x_start: Tensor, inside: Callable[[Floats], NDArray[np.bool_]], accepted: str
) -> Floats:
    """Levels as float64 [B] on the host; ValueError unless each is ``inside``, which ``accepted`` puts in words."""
    launch.check_dtype(name, levels, (torch.float32, torch.float64))
    launch.check_like(name, levels, (len(x_start),), levels.device, (levels.dtype,))
    values: Floats = levels.detach().cpu().numpy().astype(np.float64)
    wrong = values[~inside(values)]
    if len(wrong):
        raise ValueError(f"{name} must be {accepted} for each image, got {wrong[0]:g}")
    return values


def _check_path(path: object, kind: type[Path]) -> None:
    if not isinstance(path, kind):
        raise TypeError(f"path must be a {kind.__name__}, got {type(path).__name__}")
