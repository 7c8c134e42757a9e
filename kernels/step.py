"""The table walker: one kernel that executes any row of any sampler, for every lane of a batch.

    out    = uncond + guidance * (out - uncond)                   if guidance is given and not 1, and unguided is 0
    x0     = clip(x0_x * x + x0_out * out, -clip, clip)
    x_next = next_x0 * x0 + next_x * x + next_out * out +
             next_prev * h[0] + next_prev2 * h[1] + next_prev3 * h[2] + sigma * z
    sigma  = sigma * exp(half_log_min + (v + 1) / 2 * half_log_span)               if the network returns v as well
    x_next = known_x * known + known_sigma * z                                     if a part of the image is known
    h      = (keep_x * x + keep_x0 * x0, h[0], h[1])                               if keep_x or keep_x0 is not 0
    x_net  = net_scale * x_next

h is the lane's history, what the rows before left there: predictions (multistep solvers), or a mixture with the state
(solvers that evaluate the network twice a step). Terms of weight 0 are not read. x_net is what the network is shown
next. An element is either known or free, so that one z serves both: a known region costs no noise of its own.

A lane is one image: its ``row`` says which line of the table applies to it (-1: the lane is parked and nothing of it
is read or written). The next state and the network-dtype copy of it that the next network call wants leave in the
same pass.

Cost, no noise: 4 B (x) + s (out) + 4 B (x_next) + s (network copy) an element, s the size of the network's dtype: 12
B in bfloat16. Eager schedulers move that 7 to 22 times. Rows with sigma = 0 do no RNG work and read no noise. An x0
buffer adds 4 B, and so does each entry of the history that a row weighs; a row that keeps something writes H entries
and reads H - 1. A known region adds 4 B for every lane of the batch.

Kernels are compiled without FMA contraction, so that the fused step and the reference agree bit for bit.
"""

from __future__ import annotations

import math

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton
from stepfusion.kernels.coefficients import COLUMNS
from stepfusion.kernels.philox import STREAM_STEP, normal_block
from stepfusion.kernels.step_reference import check_arguments, diffusion_step_reference

_OPTIONAL = (
    *("seeds", "indices", "noise", "out_uncond", "guidance"),
    *("x_next", "x_net", "x0", "flags", "known", "history"),
)
_WIDTH = len(COLUMNS)
WIDTH = tl.constexpr(_WIDTH)
STREAM = tl.constexpr(STREAM_STEP)


@triton.jit  # type: ignore[untyped-decorator]
def nhwc_place(offs, PIXELS: tl.constexpr, OF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the elements ``offs`` of an image [C, PIXELS] lie in NHWC memory of OF channels; as is, if OF is 0."""
    place = offs.to(tl.uint32)  # whose divisions need no care for negative numbers
    if OF != 0:
        place = place % PIXELS * OF + place // PIXELS
    return place


# B must stay a tensor for a batch of one too, and neither size may recompile.
@triton.jit(do_not_specialize=["B", "R"], do_not_specialize_on_alignment=launch.SCALARS)  # type: ignore[untyped-decorator]
def diffusion_step_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, E] float32
    out_ptr,  # [B, E] or [B, 2 E] with LEARNED
    uncond_ptr,  # like out, or None
    noise_ptr,  # [B, E], or None: draw it
    next_ptr,  # [B, E] float32
    net_ptr,  # [COPIES * B, E] in the network's dtype, or None
    x0_ptr,  # [B, E] float32, or None
    history_ptr,  # [HISTORY, B, E] float32, or None
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
    HISTORY: tl.constexpr,  # 0 to 3
    OUT_CHANNELS: tl.constexpr,  # of out and uncond if these are NHWC, else 0
    NET_CHANNELS: tl.constexpr,  # of net if it is NHWC, else 0
    PIXELS: tl.constexpr,  # H W if either is NHWC, else 0
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
    if net_ptr is not None:
        net_scale = tl.load(coefficient_ptr + 14, mask=inside, other=0.0)
    # these take the whole image: NaN, and no wrong one
    threshold = tl.load(coefficient_ptr + 12, mask=inside, other=0.0)
    rescale = tl.load(coefficient_ptr + 20, mask=inside, other=0.0)
    x0_x = tl.where((threshold == 0.0) & (rescale == 0.0), x0_x, float("nan"))

    x = tl.load(x_ptr + start + offs, mask=mask)
    out_offs = nhwc_place(offs, PIXELS, OUT_CHANNELS)
    out = tl.load(out_ptr + out_start + out_offs, mask=mask).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + out_start + out_offs, mask=mask).to(tl.float32)
        guidance = tl.load(guidance_ptr + lane).to(tl.float32)
        unguided = tl.load(coefficient_ptr + 19, mask=inside, other=0.0)
        guidance = tl.where(unguided == 0.0, guidance, 1.0)
        out = tl.where(guidance == 1.0, out, uncond + guidance * (out - uncond))

    x0 = tl.clamp(x0_x * x + x0_out * out, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    x_next = next_x0 * x0 + next_x * x + next_out * out
    if HISTORY > 0:
        kept_ptr = history_ptr + start
        age = B.to(tl.int64) * E  # from an entry of the history to the one before
        next_prev = tl.load(coefficient_ptr + 9, mask=inside, other=0.0)
        if next_prev != 0.0:
            x_next += next_prev * tl.load(kept_ptr + offs, mask=mask)
        if HISTORY > 1:
            next_prev2 = tl.load(coefficient_ptr + 15, mask=inside, other=0.0)
            if next_prev2 != 0.0:
                x_next += next_prev2 * tl.load(kept_ptr + age + offs, mask=mask)
        if HISTORY > 2:
            next_prev3 = tl.load(coefficient_ptr + 16, mask=inside, other=0.0)
            if next_prev3 != 0.0:
                x_next += next_prev3 * tl.load(kept_ptr + 2 * age + offs, mask=mask)
        keep_x = tl.load(coefficient_ptr + 17, mask=inside, other=float("nan"))
        keep_x0 = tl.load(coefficient_ptr + 18, mask=inside, other=float("nan"))
        if (keep_x != 0.0) | (keep_x0 != 0.0):
            if HISTORY > 2:
                tl.store(kept_ptr + 2 * age + offs, tl.load(kept_ptr + age + offs, mask=mask), mask=mask)
            if HISTORY > 1:
                tl.store(kept_ptr + age + offs, tl.load(kept_ptr + offs, mask=mask), mask=mask)
            tl.store(kept_ptr + offs, keep_x * x + keep_x0 * x0, mask=mask)
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
                v_ptr = out_ptr + out_start + (OUT_CHANNELS // 2 if OUT_CHANNELS else E)
                v = tl.load(v_ptr + out_offs, mask=mask).to(tl.float32)
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
        copy = (net_scale * x_next).to(net_ptr.dtype.element_ty)
        net_offs = nhwc_place(offs, PIXELS, NET_CHANNELS)
        for i in tl.static_range(COPIES):
            tl.store(net_ptr + i * B.to(tl.int64) * E + start + net_offs, copy, mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + start + offs, x0, mask=mask)
    if flag_ptr is not None:
        # a sum of terms below 2**125 is finite; thread by thread first, which costs an addition an element
        total = tl.sum(tl.reshape(x_next if EVEN else tl.where(mask, x_next, 0.0), (BLOCK // VEC, VEC)), axis=1)
        broken = (total - total != 0.0) & (tl.load(flag_ptr + lane) < 0)  # inf - inf and NaN - NaN are NaN
        zeros = tl.full((BLOCK // VEC,), 0, tl.int64)
        tl.store(flag_ptr + lane + zeros, row + zeros, mask=broken)


@torch.library.custom_op("stepfusion::diffusion_step_", mutates_args=("x_next", "x_net", "x0", "flags", "history"))
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
    history: torch.Tensor | None,
    fill: bool,
) -> None:
    require_triton(x.device)
    lanes, elements = len(x), x[:1].numel()
    if x.numel() == 0:
        return
    shape = launch.geometry(lanes, elements, out.dtype, x.dtype if x_net is None else x_net.dtype)
    out_nhwc = launch.is_nhwc(out) and (out_uncond is None or launch.is_nhwc(out_uncond))
    net_nhwc = x_net is not None and launch.is_nhwc(x_net)
    if not out_nhwc:
        out, out_uncond = out.contiguous(), launch.contiguous(out_uncond)
    with launch.on(x.device):
        diffusion_step_kernel[shape.grid](
            x.contiguous(),
            out,
            out_uncond,
            None if noise is None else noise.to(torch.float32).contiguous(),
            x_next,
            x_net,
            x0,
            history,
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
            HISTORY=0 if history is None else len(history),
            OUT_CHANNELS=out.shape[1] if out_nhwc else 0,
            NET_CHANNELS=x.shape[1] if net_nhwc else 0,
            PIXELS=math.prod(x.shape[2:]) if out_nhwc or net_nhwc else 0,
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
    history: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move every lane one row on, in one pass.

    Args:
        x: float32 [B, ...], the state of B lanes.
        out: float16, bfloat16 or float32, what the network returned: [B, ...] like x, or twice as many channels
            [B, 2 C, ...] for a network that learned its variance (its second half is v). Read as it lies if it is
            contiguous or channels_last.
        rows: int64 [B], each lane's row of the table; :data:`PARKED` leaves the lane alone.
        coefficients: float32 [R, 21], the columns :data:`stepfusion.kernels.COLUMNS`.
        timesteps: int64 [R], the number that keys a row's noise.
        seeds, indices: int64 [B]: draw the noise of (seed, timestep, index).
        noise: [B, ...] like x, the z to use instead. With neither, every row in use must have sigma = 0: no noise is
            added.
        out_uncond, guidance: like out, the network's output without the condition, and float32 [B]: out becomes
            out_uncond + guidance * (out - out_uncond) (Ho & Salimans 2022); exactly out if guidance is 1, or if the
            row is unguided.
        x_next: float32 like x, receives the next state (x itself will do); a new tensor without it.
        x_net: [B, ...] or [2 B, ...] in the network's dtype, contiguous or channels_last, receives net_scale times
            the next state, once or twice.
        x0: float32 like x, receives the predicted (clipped) x0.
        flags: int64 [B], receives the row at which a lane first became non-finite, where it is still :data:`FINITE`.
        known: float32 like x, the pixels of an image that are known, and NaN where the sampler is free. The next
            state of what is known is known_x * known + known_sigma * z, with the same z as the sampler's.
        history: float32 [H, B, ...], H = 1, 2 or 3, contiguous: what a lane's earlier rows kept, the latest first.
            Read by rows with next_prev, next_prev2 or next_prev3 other than 0, and written by those with keep_x or
            keep_x0 other than 0. Terms of entries that are not there are left out.

    Returns:
        x_next. Rows beyond the table give NaN, and so do rows with a threshold or with rescale, which take a quantile
        and standard deviations of the whole image: those are for
        :func:`stepfusion.kernels.reference.diffusion_step`, which also runs inputs that require a gradient.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    for name, tensor in (("x", x), ("coefficients", coefficients)):
        launch.check_dtype(name, tensor, (torch.float32,))
    launch.check_dtype("out", out, launch.FLOATS)
    given = (seeds, indices, noise, out_uncond, guidance, x_next, x_net, x0, flags, known, history)
    check_arguments(x, out, rows, coefficients, timesteps, *given)
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
        history,
        fill=x_next is None,
    )
    return into
