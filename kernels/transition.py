"""The log-probability of a step that was made: the density of a lane's next state, given its state and the network.

    mean    = next_x0 * x0 + next_x * x + next_out * out          with out and x0 as in the step, guidance included
    std     = sigma, and sigma * exp(e), e = half_log_min + (v + 1) / 2 * half_log_span, if the network returned v
    logprob = sum over all E elements of  -(x_next - mean)^2 / (2 std^2) - log(std) - log(2 pi) / 2

in nats. A row with noise makes x_next ~ N(mean, std^2 I) (Black et al. 2023, section 4.3), so this is what a policy
gradient needs of it. It is made of the stored states, and not of the noise that was drawn: whoever has them computes
it again, to the bit. So it is a launch of its own, and not a part of the step, whose other users pay nothing for it.

The mean has the bits of the step: float32, no contraction. The rest is float64: of an image of 786,432 elements the
sum is near 10^6, where float32 rounds to 0.06 nats. All implementations add in one order: terms are padded with zeros
to runs of 1024, a run's second half is added to its first until one is left, and the runs' sums likewise. So a lane's
bits depend neither on the other lanes nor on how a batch is cut into programs, and are the reference's and the C++
kernel's (if the network learned its variance an exp is involved, and they agree within rounding).

Cost: 4 B (x) + 4 B (x_next) + s (out) an element, s the size of the network's dtype, and 8 B for every 1024 elements:
10 B in bfloat16, where the step moves 12 B. Eager PyTorch moves some 200 B.
"""

from __future__ import annotations

import math

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton
from stepfusion.kernels.coefficients import COLUMNS
from stepfusion.kernels.step import nhwc_place
from stepfusion.kernels.transition_reference import (
    RUN,
    check_transition,
    runs_of,
    save_for_backward,
    transition_gradients,
    transition_logprob_reference,
)

WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit  # type: ignore[untyped-decorator]
def folded(terms, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of 2**LEVELS terms: the second half is added to the first until one is left."""
    for _ in tl.static_range(LEVELS):
        terms = tl.sum(tl.reshape(terms, (2, terms.shape[0] // 2)), axis=0)  # of two, which has one order
    return tl.sum(terms, axis=0)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=launch.SCALARS)  # type: ignore[untyped-decorator]
def transition_terms_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, E] float32
    next_ptr,  # [B, E] float32
    out_ptr,  # [B, E] or [B, 2 E] with LEARNED
    uncond_ptr,  # like out, or None
    sum_ptr,  # [B, RUNS] float64, zeros
    row_ptr,  # [B] int64
    table_ptr,  # [R, WIDTH] float32
    transition_ptr,  # [R, 2] float64
    guidance_ptr,  # [B] float32, or None
    E,
    R,
    RUNS: tl.constexpr,
    LEARNED: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,  # of out and uncond if these are NHWC, else 0
    PIXELS: tl.constexpr,  # H W if they are, else 0
    EVEN: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the terms of one run of one lane."""
    lane = tl.program_id(0)
    block = tl.program_id(1)
    start = lane.to(tl.int64) * E
    out_start = 2 * start if LEARNED else start
    offs = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = None if EVEN else offs < E
    row = tl.load(row_ptr + lane)
    if row < 0:
        return
    inside = row < R
    coefficient_ptr = table_ptr + row * WIDTH
    x0_x = tl.load(coefficient_ptr, mask=inside, other=float("nan"))
    x0_out = tl.load(coefficient_ptr + 1, mask=inside, other=0.0)
    clip = tl.load(coefficient_ptr + 2, mask=inside, other=0.0)
    next_x0 = tl.load(coefficient_ptr + 3, mask=inside, other=0.0)
    next_x = tl.load(coefficient_ptr + 4, mask=inside, other=float("nan"))
    next_out = tl.load(coefficient_ptr + 5, mask=inside, other=0.0)
    # these take the whole image: NaN, and no wrong one
    threshold = tl.load(coefficient_ptr + 12, mask=inside, other=0.0)
    rescale = tl.load(coefficient_ptr + 20, mask=inside, other=0.0)
    x0_x = tl.where((threshold == 0.0) & (rescale == 0.0), x0_x, float("nan"))
    weight = tl.load(transition_ptr + row * 2, mask=inside, other=float("nan"))

    x = tl.load(x_ptr + start + offs, mask=mask)
    x_next = tl.load(next_ptr + start + offs, mask=mask)
    out_offs = nhwc_place(offs, PIXELS, OUT_CHANNELS)
    out = tl.load(out_ptr + out_start + out_offs, mask=mask).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + out_start + out_offs, mask=mask).to(tl.float32)
        guidance = tl.load(guidance_ptr + lane).to(tl.float32)
        unguided = tl.load(coefficient_ptr + 19, mask=inside, other=0.0)
        guidance = tl.where(unguided == 0.0, guidance, 1.0)
        out = tl.where(guidance == 1.0, out, uncond + guidance * (out - uncond))

    x0 = tl.clamp(x0_x * x + x0_out * out, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    mean = next_x0 * x0 + next_x * x + next_out * out
    deviation = x_next.to(tl.float64) - mean.to(tl.float64)
    if LEARNED:
        half_log_min = tl.load(coefficient_ptr + 7, mask=inside, other=0.0)
        half_log_span = tl.load(coefficient_ptr + 8, mask=inside, other=0.0)
        v_ptr = out_ptr + out_start + (OUT_CHANNELS // 2 if OUT_CHANNELS else E)
        v = tl.load(v_ptr + out_offs, mask=mask).to(tl.float32)
        exponent = half_log_min + (v * 0.5 + 0.5) * half_log_span
        deviation = deviation * tl.exp(-exponent).to(tl.float64)
        terms = weight * (deviation * deviation) + exponent.to(tl.float64)
    else:
        terms = weight * (deviation * deviation)
    if not EVEN:
        terms = tl.where(mask, terms, 0.0)
    tl.store(sum_ptr + lane * RUNS + block, folded(terms, LEVELS))


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=launch.SCALARS)  # type: ignore[untyped-decorator]
def transition_sum_kernel(  # type: ignore[no-untyped-def]
    sum_ptr,  # [B, BLOCK] float64
    row_ptr,  # [B] int64
    transition_ptr,  # [R, 2] float64
    result_ptr,  # [B] float64
    E,
    R,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The log-probability of one lane, of the sums of its runs; 0 if it is parked."""
    lane = tl.program_id(0)
    row = tl.load(row_ptr + lane)
    normalizer = tl.load(transition_ptr + row * 2 + 1, mask=(row >= 0) & (row < R), other=float("nan"))
    total = folded(tl.load(sum_ptr + lane.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)), LEVELS)
    tl.store(result_ptr + lane, tl.where(row < 0, 0.0, -total - normalizer * E))


@torch.library.custom_op("stepfusion::transition_logprob", mutates_args=())
def _transition_logprob(
    x: torch.Tensor,
    x_next: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    transitions: torch.Tensor,
    out_uncond: torch.Tensor | None,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    require_triton(x.device)
    lanes, elements = len(x), x[:1].numel()
    result = torch.zeros(lanes, dtype=torch.float64, device=x.device)
    if lanes == 0:
        return result
    runs = runs_of(elements)
    sums = torch.zeros((lanes, runs), dtype=torch.float64, device=x.device)
    nhwc = launch.is_nhwc(out) and (out_uncond is None or launch.is_nhwc(out_uncond))
    if not nhwc:
        out, out_uncond = out.contiguous(), launch.contiguous(out_uncond)
    rows, transitions = rows.contiguous(), transitions.contiguous()
    with launch.on(x.device):
        if elements:
            transition_terms_kernel[(lanes, -(-elements // RUN))](
                x.contiguous(),
                x_next.contiguous(),
                out,
                out_uncond,
                sums,
                rows,
                coefficients.contiguous(),
                transitions,
                launch.contiguous(guidance),
                elements,
                len(coefficients),
                RUNS=runs,
                LEARNED=out.numel() != x.numel(),
                OUT_CHANNELS=out.shape[1] if nhwc else 0,
                PIXELS=math.prod(x.shape[2:]) if nhwc else 0,
                EVEN=elements % RUN == 0,
                LEVELS=RUN.bit_length() - 1,
                BLOCK=RUN,
                num_warps=4,
                enable_fp_fusion=False,
            )
        transition_sum_kernel[(lanes,)](
            sums,
            rows,
            transitions,
            result,
            elements,
            len(coefficients),
            LEVELS=runs.bit_length() - 1,
            BLOCK=runs,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return result


@_transition_logprob.register_fake
def transition_logprob_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    """Room for the log-probabilities of a batch."""
    return x.new_empty(len(x), dtype=torch.float64)


_transition_logprob.register_autograd(transition_gradients, setup_context=save_for_backward)


def transition_logprob(
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
    """The log-probability of every lane's step from x to x_next, in nats, summed over the elements of an image.

    It has a gradient by x, x_next, out and out_uncond, in closed form: autograd keeps these four, and no intermediate
    result. Its bits do not depend on whether a gradient is asked for.

    Args:
        x, x_next: float32 [B, ...], the states before and after the step.
        out: float16, bfloat16 or float32, what the network returned for x: [B, ...], or [B, 2 C, ...] with learned
            variance. Read as it lies if it is contiguous or channels_last.
        rows: int64 [B], each lane's row of the table; :data:`PARKED` for a lane that made no step, which gives 0.
        coefficients: float32 [R, 21], the columns :data:`stepfusion.kernels.COLUMNS`.
        transitions: float64 [R, 2], :func:`stepfusion.kernels.transitions_of` the coefficients, on the device of x.
        out_uncond, guidance: as for :func:`stepfusion.kernels.diffusion_step`.

    Returns:
        float64 [B]. NaN for rows beyond the table, for rows that are no Gaussian of x and out alone (no noise, or a
        history), and for rows with a threshold or with rescale, which are for
        :func:`stepfusion.kernels.reference.transition_logprob`.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    launch.check_dtype("x", x, (torch.float32,))
    launch.check_dtype("coefficients", coefficients, (torch.float32,))
    launch.check_dtype("out", out, launch.FLOATS)
    check_transition(x, x_next, out, rows, coefficients, transitions, out_uncond, guidance)
    given = (x, x_next, out, rows, coefficients, transitions)
    if launch.has_tangent(*given, out_uncond) or launch.needs_gradient(coefficients, guidance):
        return transition_logprob_reference(*given, out_uncond=out_uncond, guidance=guidance)
    result: torch.Tensor = _transition_logprob(*given, out_uncond, guidance)
    return result
