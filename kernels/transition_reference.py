"""Log-probabilities of steps in eager PyTorch: the twin of :mod:`stepfusion.kernels.transition`, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.coefficients import COLUMNS, HISTORY
from stepfusion.kernels.step_reference import check_arguments, diffusion_step_reference

RUN = 1024  # elements that are folded into one partial sum
LEAST_RUNS = 32  # of partial sums: what a warp holds
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def transitions_of(coefficients: torch.Tensor) -> torch.Tensor:
    """What the log-probability of each row needs of its noise, float64 [R, 2] on the CPU: 1 / (2 sigma^2) and
    log(sigma) + log(2 pi) / 2, with sigma as float32 holds it.

    NaN for rows whose next state is no Gaussian of x and the network's output alone: those without noise, and those
    that weigh what earlier rows kept.

    Args:
        coefficients: floating-point [R, 21], the columns :data:`stepfusion.kernels.COLUMNS`.
    """
    table = coefficients.detach().cpu().to(torch.float32).double()
    sigma = table[:, COLUMNS.index("sigma")]
    remembers = (table[:, [COLUMNS.index(name) for name in HISTORY]] != 0).any(1)
    # by the C library, row by row: a vectorised logarithm may depend on the place in its vector
    logs = [math.log(value) if value > 0 else math.nan for value in sigma.tolist()]
    both = torch.stack((0.5 / (sigma * sigma), torch.tensor(logs, dtype=torch.float64) + HALF_LOG_2PI), dim=1)
    return torch.where((remembers | ~(sigma > 0))[:, None], math.nan, both)


def transition_logprob_reference(
    x: torch.Tensor,
    x_next: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    transitions: torch.Tensor,
    *,
    out_uncond: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of :func:`stepfusion.kernels.transition_logprob` in eager PyTorch: same arguments, same result.

    Also in float64, with float64 x, x_next, out and coefficients; and of rows with a threshold or with rescale.
    """
    check_transition(x, x_next, out, rows, coefficients, transitions, out_uncond, guidance)
    steps = torch.zeros_like(rows).new_zeros(len(coefficients))
    # without noise the step returns the mean, with the bits that it adds noise to
    mean = diffusion_step_reference(x, out, rows, coefficients, steps, out_uncond=out_uncond, guidance=guidance)
    deviation = x_next.double() - mean.double()
    weight, normalizer = launch.gather(transitions, rows.clamp(min=0)).unbind(1)
    weight = launch.per_lane(torch.where(rows < 0, 1.0, weight), x)
    exponent = _exponent(x, out, rows, coefficients)
    if exponent is None:
        terms = weight * (deviation * deviation)
    else:
        scaled = deviation * torch.exp(-exponent).double()
        terms = weight * (scaled * scaled) + exponent.double()
    elements = math.prod(x.shape[1:])
    result = -_folded(terms.reshape(len(x), elements)) - normalizer * elements
    return torch.where(rows < 0, 0.0, result)


def _exponent(
    x: torch.Tensor, out: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor
) -> torch.Tensor | None:
    """The logarithm of std / sigma of each element, like x; None if the network did not learn its variance."""
    if out.numel() == x.numel():
        return None
    c = _columns(x, rows, coefficients)
    v = out.to(x.dtype).chunk(2, dim=1)[1]
    exponent: torch.Tensor = c["half_log_min"] + (v * 0.5 + 0.5) * c["half_log_span"]
    return exponent


def _columns(x: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of each lane's row by their names, [B, 1, ...] in the dtype of x."""
    columns = launch.gather(coefficients, rows.clamp(min=0)).to(x.dtype).unbind(1)
    return {name: launch.per_lane(column, x) for name, column in zip(COLUMNS, columns, strict=True)}


def runs_of(elements: int) -> int:
    """How many partial sums an image of so many elements has: a power of two, beyond those that it needs zeros."""
    return max(LEAST_RUNS, 1 << (-(-elements // RUN) - 1).bit_length())


def _folded(terms: torch.Tensor) -> torch.Tensor:
    """The sums [B] of terms [B, E], in the one order that all implementations share."""
    runs = runs_of(terms.shape[1])
    padded = torch.nn.functional.pad(terms, (0, runs * RUN - terms.shape[1]))
    return _halved(_halved(padded.reshape(len(terms), runs, RUN)))


def _halved(terms: torch.Tensor) -> torch.Tensor:
    """Sums along the last axis, a power of two: its second half is added to its first until one is left."""
    while (half := terms.shape[-1] // 2) > 0:
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """What :func:`transition_gradients` needs of a call, in the order of the operators' arguments."""
    x, x_next, out, rows, coefficients, transitions, out_uncond, guidance = inputs
    ctx.save_for_backward(x, x_next, out, rows, coefficients, transitions, out_uncond, guidance)


def transition_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient of the log-probabilities [B] by x, x_next, out and out_uncond; other arguments have none.

    With g = (x_next - mean) / std^2, the gradient by the mean: g (next_x + next_x0 x0_x [x0 is not clipped]) by x,
    -g by x_next, g (next_out + next_x0 x0_out [x0 is not clipped]) by eps, which guidance takes ``guidance`` times
    of out and 1 - ``guidance`` times of out_uncond; and ((x_next - mean)^2 / std^2 - 1) half_log_span / 2 by v.
    """
    x, x_next, out, rows, coefficients, transitions, out_uncond, guidance = ctx.saved_tensors
    c = _columns(x, rows, coefficients)
    exponent = _exponent(x, out, rows, coefficients)
    eps = out.to(x.dtype) if exponent is None else out.to(x.dtype).chunk(2, dim=1)[0]
    scale = torch.ones_like(c["sigma"])
    if out_uncond is not None:
        guided = launch.per_lane(guidance.to(x.dtype), x)
        scale = torch.where(c["unguided"] == 0, guided, 1.0)
        uncond = out_uncond.to(x.dtype).chunk(1 if exponent is None else 2, dim=1)[0]
        eps = torch.where(scale == 1.0, eps, uncond + scale * (eps - uncond))
    start = c["x0_x"] * x + c["x0_out"] * eps
    inside = (start.abs() <= c["clip"]).to(x.dtype) * c["next_x0"]
    mean = c["next_x0"] * start.clamp(-c["clip"], c["clip"]) + c["next_x"] * x + c["next_out"] * eps
    active = launch.per_lane((rows >= 0).to(x.dtype) * gradient.to(x.dtype), x)
    weight = launch.per_lane(launch.gather(transitions, rows.clamp(min=0))[:, 0].to(x.dtype), x)
    precision = 2 * weight if exponent is None else 2 * weight * torch.exp(-2 * exponent)
    by_mean = active * precision * (x_next - mean)
    by_eps = by_mean * (inside * c["x0_out"] + c["next_out"])
    by_v = None
    if exponent is not None:
        by_v = active * (precision * (x_next - mean) ** 2 - 1) * (0.5 * c["half_log_span"])
    by_uncond = None if out_uncond is None else _doubled((1 - scale) * by_eps, None if by_v is None else 0 * by_v)
    return (
        by_mean * (inside * c["x0_x"] + c["next_x"]),
        -by_mean,
        _doubled(scale * by_eps, by_v).to(out.dtype),
        None,
        None,
        None,
        None if by_uncond is None else by_uncond.to(out.dtype),
        None,
    )


def _doubled(by_eps: torch.Tensor, by_v: torch.Tensor | None) -> torch.Tensor:
    return by_eps if by_v is None else torch.cat((by_eps, by_v), dim=1)


def check_transition(
    x: torch.Tensor,
    x_next: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    transitions: torch.Tensor,
    out_uncond: torch.Tensor | None,
    guidance: torch.Tensor | None,
) -> None:
    """Check every argument of a log-probability."""
    launch.check_dtype("coefficients", coefficients, (torch.float32, torch.float64))
    launch.check_like(
        "transitions",
        transitions,
        (len(coefficients), 2) if coefficients.ndim else (0, 2),
        coefficients.device,
        (torch.float64,),
    )
    steps = torch.empty(len(coefficients), dtype=torch.int64, device=coefficients.device)
    nothing = (None,) * 3
    check_arguments(x, out, rows, coefficients, steps, *nothing, out_uncond, guidance, *nothing, *nothing)
    launch.check_like("x_next", x_next, tuple(x.shape), x.device, (x.dtype,))
