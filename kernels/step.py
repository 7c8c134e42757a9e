"""The table walker: one kernel that executes any row of any sampler, for every lane of a batch.

    out    = uncond + guidance * (out - uncond)                                    where guidance is given
    x0     = clip(x0_x * x + x0_out * out, -clip, clip)
    x_next = next_x0 * x0 + next_x * x + next_out * out + next_prev * x0_prev + sigma * z
    sigma  = sigma * exp(half_log_min + (v + 1) / 2 * half_log_span)               where the network returns v as well
    x_next = known_x * known + known_sigma * z                                     where a part of the image is known

x0_prev is what the lane's x0 buffer holds, the prediction of the row before (multistep solvers). An element is either
known or free, so that one z serves both: a known region costs no noise of its own.

A lane is one image: its ``row`` says which line of the table applies to it (-1: the lane is parked and nothing of it
is read or written). The next state and the network-dtype copy of it that the next network call wants leave in the
same pass.

Cost, no noise: 4 B (x) + s (out) + 4 B (x_next) + s (network copy) an element, s the size of the network's dtype: 12
B in bfloat16. Eager schedulers move that 7 to 22 times. Rows with sigma = 0 do no RNG work and read no noise. An x0
buffer adds 4 B, and 4 B on rows with next_prev != 0, which alone read it; a known region adds 4 B for every lane of
the batch.

Kernels are compiled without FMA contraction, so that the fused step and the reference agree bit for bit.
"""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton
from stepfusion.kernels.coefficients import COLUMNS
from stepfusion.kernels.philox import STREAM_STEP, normal_block, normal_reference

PARKED = -1  #: the ``row`` of a lane that has nothing to do
FINITE = -1  #: the ``flag`` of a lane that never met a non-finite value

_OPTIONAL = ("seeds", "indices", "noise", "out_uncond", "guidance", "x_next", "x_net", "x0", "flags", "known")
_WIDTH = len(COLUMNS)
WIDTH = tl.constexpr(_WIDTH)
STREAM = tl.constexpr(STREAM_STEP)


# B must stay a tensor for a batch of one too, and neither size may recompile.
@triton.jit(do_not_specialize=["B", "R"])  # type: ignore[untyped-decorator]
def diffusion_step_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, E] float32
    out_ptr,  # [B, E] or [B, 2 E] with LEARNED
    uncond_ptr,  # like out, or None
    noise_ptr,  # [B, E], or None: draw it
    next_ptr,  # [B, E] float32
    net_ptr,  # [COPIES * B, E] in the network's dtype, or None
    x0_ptr,  # [B, E] float32, or None
    known_ptr,  # [B, E] float32, NaN where free, or None
    flag_ptr,  # [B] int64, or None
    row_ptr,  # [B] int64
    table_ptr,  # [R, WIDTH] float32
    timestep_ptr,  # [R] int64
    seed_ptr,  # [B] int64, or None with noise given
    index_ptr,  # [B] int64, or None with noise given
    guidance_ptr,  # [B] float32, or None
    E,
    B,
    R,
    FILL: tl.constexpr,  # next is fresh memory: parked lanes are copied to it
    LEARNED: tl.constexpr,
    COPIES: tl.constexpr,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0)
    block = tl.program_id(1)
    start = lane.to(tl.int64) * E
    out_start = 2 * start if LEARNED else start
    offs = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = None if EVEN else offs < E
    row = tl.load(row_ptr + lane)
    if row < 0:
        if FILL:
            tl.store(next_ptr + start + offs, tl.load(x_ptr + start + offs, mask=mask), mask=mask)
        return

    inside = row < R  # a row beyond the table gives NaN, and no access outside it
    coefficient_ptr = table_ptr + row * WIDTH
    x0_x = tl.load(coefficient_ptr, mask=inside, other=float("nan"))
    x0_out = tl.load(coefficient_ptr + 1, mask=inside, other=0.0)
    clip = tl.load(coefficient_ptr + 2, mask=inside, other=0.0)
    next_x0 = tl.load(coefficient_ptr + 3, mask=inside, other=0.0)
    next_x = tl.load(coefficient_ptr + 4, mask=inside, other=float("nan"))
    next_out = tl.load(coefficient_ptr + 5, mask=inside, other=0.0)
    sigma = tl.load(coefficient_ptr + 6, mask=inside, other=0.0)
    threshold = tl.load(coefficient_ptr + 12, mask=inside)  # it takes the whole image: NaN, and no wrong one
    x0_x = tl.where(threshold == 0.0, x0_x, float("nan"))

    x = tl.load(x_ptr + start + offs, mask=mask)
    out = tl.load(out_ptr + out_start + offs, mask=mask).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + out_start + offs, mask=mask).to(tl.float32)
        guidance = tl.load(guidance_ptr + lane).to(tl.float32)
        out = tl.where(guidance == 1.0, out, uncond + guidance * (out - uncond))

    x0 = tl.clamp(x0_x * x + x0_out * out, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    x_next = next_x0 * x0 + next_x * x + next_out * out
    if x0_ptr is not None:
        next_prev = tl.load(coefficient_ptr + 9, mask=inside, other=0.0)
        if next_prev != 0.0:
            x_next += next_prev * tl.load(x0_ptr + start + offs, mask=mask)
    noisy = sigma != 0.0
    if known_ptr is not None:
        known_sigma = tl.load(coefficient_ptr + 11, mask=inside, other=0.0)
        noisy = noisy | (known_sigma != 0.0)
        known_x = tl.load(coefficient_ptr + 10, mask=inside, other=float("nan"))
    if noisy and (noise_ptr is not None or seed_ptr is not None):
        if noise_ptr is not None:
            z = tl.load(noise_ptr + start + offs, mask=mask).to(tl.float32)
        else:
            timestep = tl.load(timestep_ptr + row).to(tl.uint32)
            index = tl.load(index_ptr + lane).to(tl.uint32)
            z = normal_block(tl.load(seed_ptr + lane), block * (BLOCK // 4), timestep, index, STREAM, BLOCK, VEC)
        if sigma != 0.0:
            std = sigma
            if LEARNED:
                half_log_min = tl.load(coefficient_ptr + 7)
                half_log_span = tl.load(coefficient_ptr + 8)
                v = tl.load(out_ptr + out_start + E + offs, mask=mask).to(tl.float32)
                std = sigma * tl.exp(half_log_min + (v * 0.5 + 0.5) * half_log_span)
            x_next += std * z
        if known_ptr is not None:  # read here: a block of registers less while noise is made
            known = tl.load(known_ptr + start + offs, mask=mask)
            x_next = tl.where(known == known, known_x * known + known_sigma * z, x_next)
    elif known_ptr is not None:
        known = tl.load(known_ptr + start + offs, mask=mask)
        x_next = tl.where(known == known, known_x * known, x_next)

    tl.store(next_ptr + start + offs, x_next, mask=mask)
    if net_ptr is not None:
        copy = x_next.to(net_ptr.dtype.element_ty)
        for i in tl.static_range(COPIES):
            tl.store(net_ptr + i * B.to(tl.int64) * E + start + offs, copy, mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + start + offs, x0, mask=mask)
    if flag_ptr is not None:
        # a sum of terms below 2**125 is finite; thread by thread first, which costs an addition an element
        total = tl.sum(tl.reshape(x_next if EVEN else tl.where(mask, x_next, 0.0), (BLOCK // VEC, VEC)), axis=1)
        broken = (total - total != 0.0) & (tl.load(flag_ptr + lane) < 0)  # inf - inf and NaN - NaN are NaN
        zeros = tl.full((BLOCK // VEC,), 0, tl.int64)
        tl.store(flag_ptr + lane + zeros, row + zeros, mask=broken)


@torch.library.custom_op("stepfusion::diffusion_step_", mutates_args=("x_next", "x_net", "x0", "flags"))
def _diffusion_step(
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
    x_next: torch.Tensor,
    x_net: torch.Tensor | None,
    x0: torch.Tensor | None,
    flags: torch.Tensor | None,
    known: torch.Tensor | None,
    fill: bool,
) -> None:
    require_triton(x.device)
    lanes, elements = len(x), x[:1].numel()
    if x.numel() == 0:
        return
    shape = launch.geometry(lanes, elements, out.dtype, x.dtype if x_net is None else x_net.dtype)
    with launch.on(x.device):
        diffusion_step_kernel[shape.grid](
            x.contiguous(),
            out.contiguous(),
            launch.contiguous(out_uncond),
            None if noise is None else noise.to(torch.float32).contiguous(),
            x_next,
            x_net,
            x0,
            launch.contiguous(known),
            flags,
            rows.contiguous(),
            coefficients.contiguous(),
            timesteps.contiguous(),
            launch.contiguous(seeds),
            launch.contiguous(indices),
            launch.contiguous(guidance),
            elements,
            lanes,
            len(coefficients),
            FILL=fill,
            LEARNED=out.numel() != x.numel(),
            COPIES=0 if x_net is None else len(x_net) // lanes,
            EVEN=shape.even,
            VEC=shape.vec,
            BLOCK=shape.block,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )


@_diffusion_step.register_fake
def _diffusion_step_fake(*_: object, **__: object) -> None:
    return None


def diffusion_step(
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
) -> torch.Tensor:
    """Move every lane one row on, in one pass.

    Args:
        x: float32 [B, ...], the state of B lanes.
        out: float16, bfloat16 or float32, what the network returned: [B, ...] like x, or twice as many channels
            [B, 2 C, ...] for a network that learned its variance (its second half is v).
        rows: int64 [B], each lane's row of the table; :data:`PARKED` leaves the lane alone. coefficients: float32 [R,
        14], the columns :data:`stepfusion.kernels.COLUMNS`. timesteps: int64 [R], the training timestep that keys a
        row's noise. seeds, indices: int64 [B]: draw the noise of (seed, timestep, index). Or noise: [B, ...] like x,
        the z to use. With neither, every row in use must have sigma = 0: no noise is added. out_uncond: like out, the
        network's output without the condition; with guidance: float32 [B], out becomes out_uncond + guidance * (out -
        out_uncond) (Ho & Salimans 2022); exactly out
            where it is 1.
        x_next: float32 like x, receives the next state (x itself will do); a new tensor without it.
        x_net: [B, ...] or [2 B, ...] in the network's dtype, receives the next state once or twice.
        x0: float32 like x, receives the predicted (clipped) x0. Where a row has next_prev != 0 it holds the x0 of the
            lane's row before, and is read first; without this buffer every row in use must have next_prev = 0: the
            term is left out.
        flags: int64 [B], receives the row at which a lane first became non-finite, where it is still :data:`FINITE`.
        known: float32 like x, the pixels of an image that are known, and NaN where the sampler is free. The next
            state of what is known is known_x * known + known_sigma * z, with the same z as the sampler's.

    Returns:
        x_next. Rows beyond the table give NaN, and so do rows with a threshold, which takes a quantile of the whole
        image: those are for :func:`stepfusion.kernels.reference.diffusion_step`, which also runs inputs that require
        a gradient.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    for name, tensor in (("x", x), ("coefficients", coefficients)):
        launch.check_dtype(name, tensor, (torch.float32,))
    launch.check_dtype("out", out, launch.FLOATS)
    given = (seeds, indices, noise, out_uncond, guidance, x_next, x_net, x0, flags, known)
    _check(x, out, rows, coefficients, timesteps, *given)
    if launch.needs_gradient(x, out, coefficients, *given):
        optional = dict(zip(_OPTIONAL, given, strict=True))
        return diffusion_step_reference(x, out, rows, coefficients, timesteps, **optional)
    into = torch.empty_like(x, memory_format=torch.contiguous_format) if x_next is None else x_next
    _diffusion_step(
        x,
        out,
        rows,
        coefficients,
        timesteps,
        seeds,
        indices,
        noise,
        out_uncond,
        guidance,
        into,
        x_net,
        x0,
        flags,
        known,
        fill=x_next is None,
    )
    return into


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
) -> torch.Tensor:
    """The twin of :func:`diffusion_step` in eager PyTorch: same arguments, same result.

    Also in float64, with float64 x, out and coefficients. Rows with a threshold replace the clip by dynamic
    thresholding (Saharia et al. 2022, section 2.3): with s the quantile ``threshold`` of a lane's |x0|, in [1,
    ``threshold_max``], x0 becomes clip(x0, -s, s) / s.
    """
    given = (seeds, indices, noise, out_uncond, guidance, x_next, x_net, x0, flags, known)
    _check(x, out, rows, coefficients, timesteps, *given)
    active = launch.per_lane(rows >= 0, x)
    safe = rows.clamp(min=0)
    columns = launch.gather(coefficients, safe).to(x.dtype).unbind(1)
    c = {name: launch.per_lane(column, x) for name, column in zip(COLUMNS, columns, strict=True)}
    sigma, next_prev, threshold = c["sigma"], c["next_prev"], c["threshold"]

    eps = out.to(x.dtype)
    v: torch.Tensor | None = None
    if out.numel() != x.numel():
        eps, v = eps.chunk(2, dim=1)
    if out_uncond is not None and guidance is not None:
        uncond = out_uncond.to(x.dtype)
        uncond = uncond if v is None else uncond.chunk(2, dim=1)[0]
        scale = launch.per_lane(guidance.to(x.dtype), x)
        eps = torch.where(scale == 1.0, eps, uncond + scale * (eps - uncond))

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
    if x0 is not None and bool((next_prev != 0).any()):
        result = torch.where(next_prev != 0, result + torch.mul(next_prev, x0, out=room), result)
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
        total = result.reshape(len(x), -1).sum(1)  # finite where every term is
        broken = ~total.isfinite() & (flags < 0) & (rows >= 0)
        flags.copy_(torch.where(broken, rows, flags))
    everywhere = bool(active.all())
    if x_net is not None and x.numel():
        copies = x_net.view(-1, *x.shape)
        copies.copy_(result if everywhere else torch.where(active, result.to(x_net.dtype), copies))
    if x0 is not None:
        x0.copy_(start if everywhere else torch.where(active, start, x0))
    if x_next is None:
        return (result if everywhere else torch.where(active, result, x)).contiguous()
    return x_next.copy_(result if everywhere else torch.where(active, result, x_next))


def _clipped(x0: torch.Tensor, bound: torch.Tensor, in_place: bool) -> torch.Tensor:
    """``x0`` in [-bound, bound].

    The two forms have the same bits. The first is much the faster on a CPU; the second has the gradient that clipping
    should have, 1 at the bounds themselves, where maximum and minimum share it between equals.
    """
    if in_place:
        return torch.minimum(torch.maximum(x0, -bound, out=x0), bound, out=x0)
    return x0.clamp(-bound, bound)


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


def _check(
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
    launch.check_like("coefficients", coefficients, (len(coefficients), _WIDTH), x.device, states)
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
        launch.check_output("x_net", x_net)
    for name, buffer in (("x_next", x_next), ("x0", x0)):
        if buffer is not None:
            launch.check_like(name, buffer, shape, x.device, (x.dtype,))
            launch.check_output(name, buffer)
    if known is not None:
        launch.check_like("known", known, shape, x.device, (x.dtype,))
    if flags is not None:
        launch.check_like("flags", flags, (lanes,), x.device, (torch.int64,))
        launch.check_output("flags", flags)
