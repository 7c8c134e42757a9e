"""GroupNorm and SiLU over NHWC memory, with what stands around them in a UNet's residual block.

    h     = concat(x + residual, skip) + time                             residual, skip and time if given
    norm  = (h - mean) / sqrt(var + eps) * weight + bias                  Wu & He 2018; var over a group, biased
    y     = norm * (1 + scale) + shift                                    Dhariwal & Nichol 2021, if given
    out   = y * sigmoid(y)                                                SiLU: Elfwing et al. 2017

An image is cut by C, H, W and the dtype alone, its channels into blocks of whole groups and its pixels into splits:
lanes are independent, and no bit depends on the batch. Two launches: the statistics of every split, then their union
and the result. A block of at most 128 KB is one split, and one launch does: its program reads tile after tile, and
again, to normalise them, from the last, which it still holds, to the first. No atomics.

If h is wanted as well (:mod:`stepfusion.kernels.add_group_norm`), the launch that reads x first writes it, rounded to
the dtype of x, and what is normalised is what was written.

Cost, s the size of the dtype: two launches move 3 s an element, of which the second reading comes from L2, and one
launch 2 s: it reads again from L1 or L2; the statistics that a program of the second launch reads come from L2 and
are at most a third of its pixels. Batches beyond L2 are cut into pairs of launches for some lanes each: the second
reading begins with what the first ended with, and finds all of it there. Eager PyTorch moves at least 7 s.
On sm_90 the first launch takes 10 and the second 18 instructions an element, 2 of these on the special-function
units: an H200 can issue that at 6 TB/s or more in half precision, so memory is the limit.
"""

from __future__ import annotations

import math

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton
from stepfusion.kernels.group_norm_geometry import geometry, lanes_in_cache
from stepfusion.kernels.group_norm_reference import check_arguments, group_norm_silu_reference
from stepfusion.kernels.group_norm_statistics import chunks, inside, moments, place, reciprocal_root, unite

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit  # type: ignore[untyped-decorator]
def _read(ptr, pixel, rows, c, there, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of [P, C] from ``pixel`` on, in its own dtype; 0 where nothing is there."""
    return tl.load(ptr + pixel * C + (rows[:, None] * C + c[None, :]), mask=there, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _sum(x_ptr, residual_ptr, pixel, rows, c, there, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """x + residual, float32."""
    h = _read(x_ptr, pixel, rows, c, there, C).to(tl.float32)
    if residual_ptr is not None:
        h += _read(residual_ptr, pixel, rows, c, there, C).to(tl.float32)
    return h


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    images, pixel, rows, start, c, there, C: tl.constexpr, C_X: tl.constexpr, WIDE: tl.constexpr, WRITES: tl.constexpr
):
    """h at pixels ``pixel + rows`` and channels ``c``, float32 [T, W]; elsewhere 0.

    ``images``: pointers to x, residual, skip, time and what receives h. If the last is given, h is rounded to its
    dtype, and written there if this tile ``WRITES``.
    """
    x_ptr, residual_ptr, skip_ptr, time_ptr, joined_ptr = images
    if skip_ptr is None:
        h = _sum(x_ptr, residual_ptr, pixel, rows, c, there, C)
    elif C_X % WIDE == 0:
        if start < C_X:
            h = _sum(x_ptr, residual_ptr, pixel, rows, c, there, C_X)
        else:
            h = _read(skip_ptr, pixel, rows, c - C_X, there, C - C_X).to(tl.float32)
    else:
        of_x = (c < C_X)[None, :]
        x = _sum(x_ptr, residual_ptr, pixel, rows, c, there & of_x, C_X)
        skip = _read(skip_ptr, pixel, rows, c - C_X, there & (c >= C_X)[None, :], C - C_X)
        h = tl.where(of_x, x, skip.to(tl.float32))
    if time_ptr is not None:
        time = tl.load(time_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        h = tl.where(there, h + time[None, :], 0.0)
    if joined_ptr is not None:
        joined = h.to(joined_ptr.dtype.element_ty)
        if WRITES:
            tl.store(joined_ptr + pixel * C + (rows[:, None] * C + c[None, :]), joined, mask=there)
        h = joined.to(tl.float32)
    return h


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(  # type: ignore[no-untyped-def]
    images,
    lane,
    first,
    P,
    rows,
    channels,
    C: tl.constexpr,
    C_X: tl.constexpr,
    WIDE: tl.constexpr,
    U: tl.constexpr,
    FULL: tl.constexpr,
    EVEN: tl.constexpr,
    TILES: tl.constexpr,
):
    """Mean and M2 of every chunk of TILES tiles, the first at pixel ``first``; the last tile, and its first pixel."""
    start, c, stop = channels  # the block's first, a tile's, and the first behind the block
    T: tl.constexpr = rows.shape[0]
    there = inside(rows, c, first, P, stop, FULL, EVEN)
    h = _tile(images, lane * P + first, rows, start, c, there, C, C_X, WIDE, True)
    pixels = tl.minimum(P - first, T).to(tl.float32)
    mean, m2 = moments(h, there, pixels, U)
    for _ in range(1, TILES):
        first += T
        there = inside(rows, c, first, P, stop, FULL, EVEN)
        h = _tile(images, lane * P + first, rows, start, c, there, C, C_X, WIDE, True)
        more = tl.maximum(tl.minimum(P - first, T), 0).to(tl.float32)
        mean_of_more, m2_of_more = moments(h, there, tl.maximum(more, 1.0), U)
        apart = mean_of_more - mean
        mean += apart * (more / (pixels + more))
        m2 += m2_of_more + apart * apart * (U * pixels * more / (pixels + more))
        pixels += more
    return mean, m2, h, first


@triton.jit(do_not_specialize=["P"])  # type: ignore[untyped-decorator]
def group_norm_moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, P, C_X]
    residual_ptr,  # [B, P, C_X], or None
    skip_ptr,  # [B, P, C - C_X], or None
    time_ptr,  # [B, C], rows TIME apart, or None
    joined_ptr,  # [B, P, C], receives h, or None
    moments_ptr,  # [B, BLOCKS, 2, SPLITS, W / U] float32: means, M2
    P,
    time_stride,
    C: tl.constexpr,
    C_X: tl.constexpr,
    WIDE: tl.constexpr,  # channels of a block, of which W with padding
    W: tl.constexpr,
    U: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a tile
):
    T: tl.constexpr = BLOCK // W
    K: tl.constexpr = W // U
    FULL: tl.constexpr = W == WIDE and C % WIDE == 0
    lane, block, split = place(tl.program_id(0), BLOCKS, SPLITS)
    lane = lane.to(tl.int64)
    rows = tl.arange(0, T)
    start = block * WIDE
    channels = (start, start + tl.arange(0, W), tl.minimum(start + WIDE, C))
    if time_ptr is not None:
        time_ptr += lane * time_stride

    images = (x_ptr, residual_ptr, skip_ptr, time_ptr, joined_ptr)
    first = split * (TILES * T)
    mean, m2, _, _ = _statistics(images, lane, first, P, rows, channels, C, C_X, WIDE, U, FULL, EVEN, TILES)
    out_ptr = moments_ptr + ((lane * BLOCKS + block) * 2 * SPLITS + split) * K + tl.arange(0, K)
    tl.store(out_ptr, mean)
    tl.store(out_ptr + SPLITS * K, m2)


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    moments_ptr, P, U: tl.constexpr, SHARE: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr, K: tl.constexpr
):
    """Mean and M2 of every chunk [K] over all splits, SHARE pixels each but for the last; S pads their number."""
    s = tl.arange(0, S)
    ptr = moments_ptr + s[:, None] * K + tl.arange(0, K)[None, :]
    there = (s < SPLITS)[:, None]
    means = tl.load(ptr, mask=there, other=0.0)
    m2s = tl.load(ptr + SPLITS * K, mask=there, other=0.0)
    pixels = tl.maximum(tl.minimum(P - s * SHARE, SHARE), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * pixels, axis=0) / P.to(tl.float32)
    apart = means - mean[None, :]
    return mean, tl.sum(m2s + apart * apart * (pixels * U), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    out_ptr, h, mean, gain, offset, pixel, rows, c, there, C: tl.constexpr, U: tl.constexpr, SILU: tl.constexpr
):
    """Write (h - mean) * gain + offset, activated: h [T, W], mean [1, W / U, 1], gain and offset [1, W / U, U]."""
    y = (chunks(h, U) - mean) * gain + offset
    if SILU:
        # 1 / (1 + e) as the square of a reciprocal root: one instruction, where a division takes eight
        root = tl.rsqrt(1.0 + tl.exp2(y * -_LOG2_E))
        y = y * root * root
    ptr = out_ptr + pixel * C + (rows[:, None] * C + c[None, :])
    tl.store(ptr, tl.reshape(y, h.shape).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["P"])  # type: ignore[untyped-decorator]
def group_norm_silu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, P, C_X]
    residual_ptr,  # [B, P, C_X], or None
    skip_ptr,  # [B, P, C - C_X], or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    time_ptr,  # [B, C], or None
    scale_ptr,  # [B, C], or None
    shift_ptr,  # [B, C], or None
    joined_ptr,  # [B, P, C], receives h, or None
    moments_ptr,  # [B, BLOCKS, 2, SPLITS, W / U] float32, or None: there is one split
    out_ptr,  # [B, P, C]
    P,
    eps,
    time_stride,
    scale_stride,
    shift_stride,
    C: tl.constexpr,
    C_X: tl.constexpr,
    D: tl.constexpr,  # channels of a group
    WIDE: tl.constexpr,
    W: tl.constexpr,
    U: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,  # SPLITS, padded to a power of two
    TILES: tl.constexpr,
    EVEN: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    T: tl.constexpr = BLOCK // W
    K: tl.constexpr = W // U
    STEP: tl.constexpr = -T if moments_ptr is None else T  # backwards: the tile that was read last is at hand
    FULL: tl.constexpr = W == WIDE and C % WIDE == 0
    # backwards: what the statistics read last is still in L2
    lane, block, split = place(tl.num_programs(0) - 1 - tl.program_id(0), BLOCKS, SPLITS)
    lane = lane.to(tl.int64)
    rows = tl.arange(0, T)
    start = block * WIDE
    c = start + tl.arange(0, W)
    stop = tl.minimum(start + WIDE, C)
    if time_ptr is not None:
        time_ptr += lane * time_stride

    images = (x_ptr, residual_ptr, skip_ptr, time_ptr, joined_ptr)
    first = split * (TILES * T)
    if moments_ptr is None:
        block_of = (start, c, stop)
        mean, m2, h, first = _statistics(images, lane, first, P, rows, block_of, C, C_X, WIDE, U, FULL, EVEN, TILES)
    else:
        there = inside(rows, c, first, P, stop, FULL, EVEN)
        # before the moments: it is on its way while they unite
        h = _tile(images, lane * P + first, rows, start, c, there, C, C_X, WIDE, True)
        mean, m2 = _gather(moments_ptr + (lane * BLOCKS + block) * 2 * SPLITS * K, P, U, TILES * T, SPLITS, S, K)
    mean, variance = unite(mean, m2, P.to(tl.float32), D, U, WIDE // D)

    known = c < C
    gain = tl.load(weight_ptr + c, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias_ptr + c, mask=known, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        factor = 1.0 + tl.load(scale_ptr + lane * scale_stride + c, mask=known, other=0.0).to(tl.float32)
        gain *= factor
        offset = offset * factor + tl.load(shift_ptr + lane * shift_stride + c, mask=known, other=0.0).to(tl.float32)
    mean = mean[None, :, None]
    gain = chunks(gain[None, :], U) * reciprocal_root(variance + eps)[None, :, None]
    offset = chunks(offset[None, :], U)

    there = inside(rows, c, first, P, stop, FULL, EVEN)
    _store(out_ptr, h, mean, gain, offset, lane * P + first, rows, c, there, C, U, SILU)
    for _ in range(1, TILES):
        first += STEP
        there = inside(rows, c, first, P, stop, FULL, EVEN)
        h = _tile(images, lane * P + first, rows, start, c, there, C, C_X, WIDE, False)
        _store(out_ptr, h, mean, gain, offset, lane * P + first, rows, c, there, C, U, SILU)


def _part(x: torch.Tensor | None, lanes: slice) -> torch.Tensor | None:
    return x if x is None or lanes == slice(0, len(x)) else x[lanes]


def normalise(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    time: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    silu: bool,
    joined: torch.Tensor | None,
) -> torch.Tensor:
    """Normalise into a new tensor; h goes to ``joined``, if given."""
    require_triton(x.device)
    channels, pixels = len(weight), x.shape[2] * x.shape[3]
    out = launch.images_like(x, channels)
    if out.numel() == 0:
        return out
    cut = geometry(channels, groups, pixels, x.dtype)
    x = launch.nhwc(x)
    residual, skip = (None if image is None else launch.nhwc(image) for image in (residual, skip))
    operands = (launch.with_unit_stride(operand) for operand in (time, scale, shift))
    (time, time_stride), (scale, scale_stride), (shift, shift_stride) = operands
    common = cut.constants(channels, groups, pixels)
    some = lanes_in_cache(len(x), pixels * channels * x.element_size()) if cut.splits > 1 else len(x)
    programs = cut.blocks * cut.splits
    statistics = None
    if cut.splits > 1:
        statistics = x.new_empty(some * programs * 2 * (cut.width // cut.chunk), dtype=torch.float32)
    with launch.on(x.device):
        for first in range(0, len(x), some):
            lanes = slice(first, min(first + some, len(x)))
            of = [_part(tensor, lanes) for tensor in (x, residual, skip, time, joined)]
            grid = ((lanes.stop - first) * programs,)
            if statistics is not None:
                group_norm_moments_kernel[grid](*of, statistics, pixels, time_stride, C_X=x.shape[1], **common)
                if joined is not None:
                    of = [of[4], None, None, None, None]
            group_norm_silu_kernel[grid](
                *of[:3],
                weight.contiguous(),
                bias.contiguous(),
                of[3],
                _part(scale, lanes),
                _part(shift, lanes),
                of[4],
                statistics,
                _part(out, lanes),
                pixels,
                eps,
                time_stride,
                scale_stride,
                shift_stride,
                C_X=channels if of[2] is None else x.shape[1],
                D=channels // groups,
                S=cut.padded_splits,
                SILU=silu,
                **common,
            )
    return out


@torch.library.custom_op("stepfusion::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    time: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    return normalise(x, None, skip, weight, bias, groups, eps, time, scale, shift, silu, None)


@_group_norm_silu.register_fake
def _group_norm_silu_fake(
    x: torch.Tensor, skip: object, weight: torch.Tensor, *_: object, **__: object
) -> torch.Tensor:
    return launch.images_like(x, len(weight))


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    skip: torch.Tensor | None = None,
    time: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """Normalise groups of channels of every image, and activate.

    Args:
        x: float16, bfloat16 or float32 [B, C, H, W], read as channels_last: anything else is copied to it.
        weight, bias: [C], in the dtype of x or float32.
        groups: a divisor of C. eps: added to the variance.
        skip: like x, with any number of channels: the input is the concatenation of x and skip, C channels together,
            and no tensor holds it.
        time: [B, C], in the dtype of x or float32, added before the statistics; rows may lie apart.
        scale, shift: like time, both or neither: the normalised input times (1 + scale), plus shift.
        silu: whether to activate.

    Returns:
        [B, C, H, W] in the dtype of x, channels_last. float32 inside, rounded once. Inputs that require a gradient go
        to the reference.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(x, weight, bias, groups, eps, skip, time, scale, shift, launch.FLOATS)
    if launch.needs_gradient(x, weight, bias, skip, time, scale, shift):
        options = {"skip": skip, "time": time, "scale": scale, "shift": shift}
        return group_norm_silu_reference(x, weight, bias, groups, eps, **options, silu=silu)
    out: torch.Tensor = _group_norm_silu(x, skip, weight, bias, groups, float(eps), time, scale, shift, silu)
    return out
