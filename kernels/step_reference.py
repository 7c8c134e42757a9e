"""The fused sampling step in eager PyTorch: the twin of :mod:`stepfusion.kernels.step`, which has the equations."""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.coefficients import COLUMNS, HISTORY
from stepfusion.kernels.philox import normal_reference

PARKED = -1  #: the ``row`` of a lane that has nothing to do
FINITE = -1  #: the ``flag`` of a lane that never met a non-finite value


def diffusion_step_reference(
    x: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    seeds: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    out_uncond: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    x_next: torch.Tensor | None = None,
    x_net: torch.Tensor | None = None,
    x0: torch.Tensor | None = None,
    flags: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of :func:`stepfusion.kernels.diffusion_step` in eager PyTorch: same arguments, same result.

    Also in float64, with float64 x, out and coefficients. Rows with a threshold replace the clip by dynamic
    thresholding (Saharia et al. 2022, section 2.3): with s the quantile ``threshold`` of a lane's |x0|, in [1,
    ``threshold_max``], x0 becomes clip(x0, -s, s) / s. Rows with rescale = phi rescale what guidance made of a guided
    lane (Lin et al. 2024, equations 15 and 16): out becomes phi * out * std(cond) / std(out) + (1 - phi) * out, with
    the standard deviations of all elements of the lane.
    """
    given = (seeds, indices, noise, out_uncond, guidance, x_next, x_net, x0, flags, known, history)
    check_arguments(x, out, rows, coefficients, timesteps, *given)
    active = launch.per_lane(rows >= 0, x)
    safe = rows.clamp(min=0)
    columns = launch.gather(coefficients, safe).to(x.dtype).unbind(1)
    c = {name: launch.per_lane(column, x) for name, column in zip(COLUMNS, columns, strict=True)}
    sigma, threshold = c["sigma"], c["threshold"]

    eps = out.to(x.dtype)
    v: torch.Tensor | None = None
    if out.numel() != x.numel():
        eps, v = eps.chunk(2, dim=1)
    if out_uncond is not None and guidance is not None:
        uncond = out_uncond.to(x.dtype)
        uncond = uncond if v is None else uncond.chunk(2, dim=1)[0]
        scale = launch.per_lane(guidance.to(x.dtype), x)
        guided = (scale != 1.0) & (c["unguided"] == 0)
        mixed = _rescaled(uncond + scale * (eps - uncond), eps, c["rescale"])
        eps = torch.where(guided, mixed, eps)

    # In place wherever it can be: on a CPU fresh memory costs more than arithmetic. Autograd refuses out=.
    start = c["x0_x"] * x
    term = c["x0_out"] * eps
    start += term
    room = None if launch.needs_gradient(start, *given) else term
    start = _clipped(start, c["clip"], room is not None)
    if bool((threshold > 0).any()):
        largest = torch.where(threshold > 0, c["threshold_max"], 1.0)  # 0 / 0 would be a gradient of NaN elsewhere
        bounded = _thresholded(start, threshold.nan_to_num(), largest)
        start = torch.where(threshold > 0, bounded, start)
    result = c["next_x0"] * start
    result += torch.mul(c["next_x"], x, out=room)
    result += torch.mul(c["next_out"], eps, out=room)
    if history is not None:
        earlier = history.clone() if room is None else history  # autograd may still need what is overwritten
        for name, kept in zip(HISTORY, earlier, strict=False):
            if bool((c[name] != 0).any()):
                result = torch.where(c[name] != 0, result + torch.mul(c[name], kept, out=room), result)
        keeps = active & ((c["keep_x"] != 0) | (c["keep_x0"] != 0))
        if bool(keeps.any()):
            _keep(history, c["keep_x"] * x + c["keep_x0"] * start, keeps)
    noisy = (sigma != 0) & active
    renoised = (c["known_sigma"] != 0) & active & (known is not None)
    fixed = None if known is None else c["known_x"] * known
    if (noise is not None or seeds is not None) and bool((noisy | renoised).any()):
        z = noise.to(x.dtype) if noise is not None else _draw(seeds, indices, timesteps, safe, x)
        if fixed is not None:
            fixed = torch.where(renoised, fixed + c["known_sigma"] * z, fixed)
        std = sigma if v is None else sigma * (c["half_log_min"] + (v * 0.5 + 0.5) * c["half_log_span"]).exp()
        term = torch.mul(std, z, out=room)
        result = result.add_(term) if bool(noisy.all()) else torch.where(noisy, result + term, result)
    if fixed is not None and known is not None:
        result = torch.where(known.isnan(), result, fixed)

    if flags is not None and x.numel():
        total = result.reshape(len(x), -1).sum(1)  # finite if every term is
        broken = ~total.isfinite() & (flags < 0) & (rows >= 0)
        flags.copy_(torch.where(broken, rows, flags))
    everywhere = bool(active.all())
    if x_net is not None and x.numel():
        copies, shown = x_net.view(-1, *x.shape), torch.mul(c["net_scale"], result, out=room)
        copies.copy_(shown if everywhere else torch.where(active, shown.to(x_net.dtype), copies))
    if x0 is not None:
        x0.copy_(start if everywhere else torch.where(active, start, x0))
    if x_next is None:
        return (result if everywhere else torch.where(active, result, x)).contiguous()
    return x_next.copy_(result if everywhere else torch.where(active, result, x_next))


def _rescaled(mixed: torch.Tensor, cond: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """Guided outputs ``mixed`` [B, ...], brought as near to the deviation of ``cond`` as ``phi`` says."""
    if mixed.numel() == 0 or not bool((phi != 0).any()):
        return mixed
    wanted, found = (_deviation(value) for value in (cond, mixed))
    factor = torch.where(found > 0, wanted / torch.where(found > 0, found, 1.0), 1.0).to(mixed.dtype)
    return torch.where(phi != 0, phi * mixed * factor + (1 - phi) * mixed, mixed)


def _deviation(x: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each lane's elements, float64 [B, 1, ...]."""
    return launch.per_lane(x.double().reshape(len(x), -1).std(dim=1, correction=0), x)


def _keep(history: torch.Tensor, kept: torch.Tensor, keeps: torch.Tensor) -> None:
    """Put ``kept`` first in the history [H, B, ...] of the lanes that keep something, and the others one further."""
    for i in range(len(history) - 1, -1, -1):
        history[i].copy_(torch.where(keeps, history[i - 1] if i else kept, history[i]))


def _clipped(x0: torch.Tensor, bound: torch.Tensor, in_place: bool) -> torch.Tensor:
    """``x0`` in [-bound, bound].

    All forms have the same bits. The first is much the faster on a CPU. The last has the gradient that clipping
    should have, 1 at the bounds themselves: maximum and minimum, and ``clamp`` in PyTorch 2.14, share it there.
    """
    if in_place:
        return torch.minimum(torch.maximum(x0, -bound, out=x0), bound, out=x0)
    clipped = x0.clamp(-bound, bound)
    return torch.where(x0.abs() <= bound, x0, clipped) if launch.needs_gradient(x0) else clipped


def _thresholded(x0: torch.Tensor, quantile: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Clip every lane of ``x0`` [B, ...] at a quantile of its own magnitudes, and divide by it."""
    if x0.numel() == 0:
        return x0
    magnitudes = x0.abs().flatten(1).sort(dim=1).values
    position = quantile.flatten(1) * (magnitudes.shape[1] - 1)
    below, above = magnitudes.gather(1, position.floor().long()), magnitudes.gather(1, position.ceil().long())
    bound = torch.lerp(below, above, position - position.floor()).reshape(quantile.shape)
    bound = torch.minimum(bound.clamp(min=1.0), largest)
    return torch.minimum(torch.maximum(x0, -bound), bound) / bound


def _draw(
    seeds: torch.Tensor | None,
    indices: torch.Tensor | None,
    timesteps: torch.Tensor,
    rows: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    assert seeds is not None
    assert indices is not None
    keys = timesteps[rows.clamp(max=len(timesteps) - 1)]
    return normal_reference(seeds, indices, keys, tuple(x.shape[1:]), dtype=x.dtype)


def check_arguments(
    x: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    timesteps: torch.Tensor,
    seeds: torch.Tensor | None,
    indices: torch.Tensor | None,
    noise: torch.Tensor | None,
    out_uncond: torch.Tensor | None,
    guidance: torch.Tensor | None,
    x_next: torch.Tensor | None,
    x_net: torch.Tensor | None,
    x0: torch.Tensor | None,
    flags: torch.Tensor | None,
    known: torch.Tensor | None,
    history: torch.Tensor | None,
) -> None:
    """Check every argument of a step."""
    states = (torch.float32, torch.float64)
    launch.check_lanes("x", x, states)
    lanes, shape = len(x), tuple(x.shape)
    doubled = (lanes, 2 * shape[1], *shape[2:]) if x.ndim > 1 else shape
    launch.check_dtype("out", out, (*launch.FLOATS, torch.float64))
    if tuple(out.shape) not in (shape, doubled):
        raise ValueError(
            f"out must have shape {list(shape)}, or {list(doubled)} with learned variance, got {list(out.shape)}"
        )
    launch.check_like("out", out, tuple(out.shape), x.device, (*launch.FLOATS, torch.float64))
    launch.check_like("rows", rows, (lanes,), x.device, (torch.int64,))
    launch.check_dtype("coefficients", coefficients, states)
    launch.check_like("coefficients", coefficients, (len(coefficients), len(COLUMNS)), x.device, states)
    launch.check_like("timesteps", timesteps, (len(coefficients),), x.device, (torch.int64,))
    launch.check_source(noise, seeds, indices, x)
    if (out_uncond is None) != (guidance is None):
        raise ValueError("out_uncond and guidance must be given together, got one of them")
    if out_uncond is not None and guidance is not None:
        launch.check_like("out_uncond", out_uncond, tuple(out.shape), x.device, (out.dtype,))
        launch.check_like("guidance", guidance, (lanes,), x.device, (torch.float32, torch.float64))
    if x_net is not None:
        launch.check_dtype("x_net", x_net, (*launch.FLOATS, torch.float64))
        if tuple(x_net.shape) not in (shape, (2 * lanes, *shape[1:])) or x_net.device != x.device:
            raise ValueError(
                f"x_net must hold {lanes} or {2 * lanes} images like x on {x.device}, got {list(x_net.shape)}"
            )
        if not launch.is_nhwc(x_net):
            launch.check_output("x_net", x_net)
    for name, buffer in (("x_next", x_next), ("x0", x0)):
        if buffer is not None:
            launch.check_like(name, buffer, shape, x.device, (x.dtype,))
            launch.check_output(name, buffer)
    if known is not None:
        launch.check_like("known", known, shape, x.device, (x.dtype,))
    if history is not None:
        _check_history(history, x)
    if flags is not None:
        launch.check_like("flags", flags, (lanes,), x.device, (torch.int64,))
        launch.check_output("flags", flags)


def _check_history(history: torch.Tensor, x: torch.Tensor) -> None:
    """TypeError or ValueError unless ``history`` is a buffer of 1 to 3 batches like ``x``."""
    launch.check_dtype("history", history, (x.dtype,))
    if history.ndim != x.ndim + 1 or not 1 <= len(history) <= len(HISTORY):
        raise ValueError(
            f"history must hold 1 to {len(HISTORY)} batches like x, {list(x.shape)}, got {list(history.shape)}"
        )
    launch.check_like("history", history, (len(history), *x.shape), x.device, (x.dtype,))
    launch.check_output("history", history)
