"""LayerNorm and the modulation of adaLN, with the gated residual that a transformer block adds before it.

    h    = x + gate * branch                                              Peebles & Xie 2023, figure 3, if given
    norm = (h - mean) / sqrt(var + eps)                                   Ba et al. 2016; var over a token, biased
    out  = norm * (1 + scale) + shift                                     gate, scale and shift of the image

A program has some tokens of one image, whole, in its registers: the mean first, then the squared deviations from it.
D channels are held as two blocks of powers of two, which fit the widths of the published models (1152 is 1024 and
128) without a masked element, where one block would be 2048. Up to 1536 channels a program is one warp, so that a
sum takes no barrier. Tokens are cut by D and N alone: no bit depends on the batch.

If h is wanted as well, it is written rounded to the dtype of x, and what is normalised is what was written.

Cost, s the size of the dtype: 2 s an element alone, 4 s with the residual, and the modulations, s a channel of every
program, which come from L2; 8 to 10 operations an element. Eager PyTorch moves 4 s (the norm, a product with a sum),
and 7 s with the residual. In a block of DiT-XL/2, 64 images of 256 tokens in bfloat16, that is 302 MB in place of
528 MB for both norms and both residuals: at the 4.8 TB/s of an H200 1.3 ms less in 28 blocks, beside some 25 ms of
matrix products at 600 TFLOP/s. This is a count and not a measurement. On sm_90 it takes 16 instructions an element,
and 22 with the residual, which an H200 can issue at 7 TB/s in half precision, so memory is the limit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton
from stepfusion.kernels.group_norm_geometry import power_of_two
from stepfusion.kernels.group_norm_statistics import reciprocal_root
from stepfusion.kernels.layer_norm_reference import (
    add_layer_norm_modulate_reference,
    check_arguments,
    check_branch,
    layer_norm_modulate_reference,
)

_OF_A_WARP = 2304  # elements that the 32 threads of a warp hold: 72 each
_CHANNELS_OF_A_WARP = 1024


class Cut(NamedTuple):
    """How tokens of D channels are held: blocks of ``first`` and ``second`` (or 0) channels, ``tokens`` a program."""

    first: int
    second: int
    tokens: int
    num_warps: int


def cut(channels: int) -> Cut:
    """It depends on nothing else, so that a token's bits depend on nothing else."""
    first = power_of_two(channels + 1) // 2
    second = power_of_two(channels - first) if channels > first else 0
    if second == first:  # more than three quarters of the next power of two
        first, second = 2 * first, 0
    warps = max(first // _CHANNELS_OF_A_WARP, 1)
    most = max(_OF_A_WARP * warps // (first + second), 1)
    return Cut(first, second, power_of_two(most + 1) // 2, warps)


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    x_ptr, branch_ptr, gate_ptr, sum_ptr, place, known, there, c
):
    """h at elements ``place`` [T, W] of channels ``c``, float32, written to ``sum_ptr`` if given; else 0."""
    h = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        gate = tl.load(gate_ptr + c[None, :], mask=known[None, :], other=0.0).to(tl.float32)
        h += gate * tl.load(branch_ptr + place, mask=there, other=0.0).to(tl.float32)
        rounded = h.to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, rounded, mask=there)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    out_ptr, scale_ptr, shift_ptr, deviation, root, place, known, there, c
):
    """Write the deviations [T, W] times the root [T] of each token, modulated."""
    factor = 1.0 + tl.load(scale_ptr + c[None, :], mask=known[None, :], other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + c[None, :], mask=known[None, :], other=0.0).to(tl.float32)
    y = deviation * root[:, None] * factor + shift
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])  # type: ignore[untyped-decorator]
def layer_norm_modulate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, N, D]
    branch_ptr,  # [B, N, D], or None
    gate_ptr,  # [B, D], or None
    scale_ptr,  # [B, D]
    shift_ptr,  # [B, D]
    sum_ptr,  # [B, N, D], receives h, or None
    out_ptr,  # [B, N, D]
    N,
    eps,
    gate_stride,
    scale_stride,
    shift_stride,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN: tl.constexpr,  # whether programs are whole
    BLOCK: tl.constexpr,
):
    T: tl.constexpr = BLOCK // (FIRST + SECOND)
    splits = (N + T - 1) // T
    lane = (tl.program_id(0) // splits).to(tl.int64)
    token = tl.program_id(0) % splits * T + tl.arange(0, T)
    start = (lane * N + token) * D
    c = tl.arange(0, FIRST)
    known = c < D
    present = token < N
    there = (present | EVEN)[:, None] & (known | (FIRST <= D))[None, :]
    if branch_ptr is not None:
        gate_ptr += lane * gate_stride
    scale_ptr += lane * scale_stride
    shift_ptr += lane * shift_stride

    place = start[:, None] + c[None, :]
    h = _read(x_ptr, branch_ptr, gate_ptr, sum_ptr, place, known, there, c)
    total = tl.sum(h, axis=1)
    if SECOND > 0:
        c_more = FIRST + tl.arange(0, SECOND)
        known_more = c_more < D
        there_more = (present | EVEN)[:, None] & (known_more | (FIRST + SECOND == D))[None, :]
        place_more = start[:, None] + c_more[None, :]
        more = _read(x_ptr, branch_ptr, gate_ptr, sum_ptr, place_more, known_more, there_more, c_more)
        total += tl.sum(more, axis=1)
    mean = total / D

    deviation = tl.where(known[None, :], h - mean[:, None], 0.0)
    squares = tl.sum(deviation * deviation, axis=1)
    if SECOND > 0:
        deviation_more = tl.where(known_more[None, :], more - mean[:, None], 0.0)
        squares += tl.sum(deviation_more * deviation_more, axis=1)
    root = reciprocal_root(squares / D + eps)

    _write(out_ptr, scale_ptr, shift_ptr, deviation, root, place, known, there, c)
    if SECOND > 0:
        _write(out_ptr, scale_ptr, shift_ptr, deviation_more, root, place_more, known_more, there_more, c_more)


def _normalise(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise into a new tensor; h goes to ``total``, if given."""
    require_triton(x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    batch, tokens, channels = x.shape
    how = cut(channels)
    operands = (launch.with_unit_stride(operand) for operand in (gate, scale, shift))
    (gate, gate_stride), (known_scale, scale_stride), (known_shift, shift_stride) = operands
    with launch.on(x.device):
        layer_norm_modulate_kernel[(batch * -(-tokens // how.tokens),)](
            launch.aligned(x),
            None if branch is None else launch.aligned(branch),
            gate,
            known_scale,
            known_shift,
            total,
            out,
            tokens,
            eps,
            gate_stride,
            scale_stride,
            shift_stride,
            D=channels,
            FIRST=how.first,
            SECOND=how.second,
            EVEN=tokens % how.tokens == 0,
            BLOCK=how.tokens * (how.first + how.second),
            num_warps=how.num_warps,
        )
    return out


@torch.library.custom_op("stepfusion::layer_norm_modulate", mutates_args=())
def _layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    return _normalise(x, scale, shift, eps)


@_layer_norm_modulate.register_fake
def _layer_norm_modulate_fake(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("stepfusion::add_layer_norm_modulate", mutates_args=())
def _add_layer_norm_modulate(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _normalise(x, scale, shift, eps, branch, gate, total), total


@_add_layer_norm_modulate.register_fake
def _add_layer_norm_modulate_fake(x: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
    like = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return like, torch.empty_like(like)


def layer_norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise every token, and modulate it by what its image has.

    Args:
        x: float16, bfloat16 or float32 [B, N, D], D at most 16384; copied unless it is contiguous.
        scale, shift: [B, D], in the dtype of x or float32; rows may lie apart. The normalised tokens times
            (1 + scale), plus shift.
        eps: added to the variance.

    Returns:
        [B, N, D] in the dtype of x, contiguous. float32 inside, rounded once. Inputs that require a gradient go to
        the reference.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(x, scale, shift, eps, launch.FLOATS)
    if launch.needs_gradient(x, scale, shift):
        return layer_norm_modulate_reference(x, scale, shift, eps)
    out: torch.Tensor = _layer_norm_modulate(x, scale, shift, float(eps))
    return out


def add_layer_norm_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, *, branch: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add what a branch of a block made, gated, then normalise and modulate the sum, and return both.

    Args:
        x, scale, shift, eps: as of :func:`layer_norm_modulate`.
        branch: like x. gate: like scale.

    Returns:
        The modulated norm of h = x + gate * branch, and h itself: [B, N, D] in the dtype of x. h is rounded once,
        from float32, and what is normalised is h as it was rounded.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(x, scale, shift, eps, launch.FLOATS)
    check_branch(x, branch, gate)
    if launch.needs_gradient(x, scale, shift, branch, gate):
        return add_layer_norm_modulate_reference(x, scale, shift, eps, branch=branch, gate=gate)
    sums: tuple[torch.Tensor, torch.Tensor] = _add_layer_norm_modulate(x, branch, gate, scale, shift, float(eps))
    return sums
