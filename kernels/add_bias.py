"""What a convolution or a block leaves to be added, if no norm comes next: in one pass, resampled if wanted.

    h       = x + residual + bias                                         residual and bias if given
    doubled = every pixel of h in a square of 2 x 2                       nearest neighbour
    padded  = h with a row of zeros below and a column of zeros on the right

All in NHWC memory. Cost, s the size of the dtype: s an element for x, s for the residual, s for each element written.
Eager PyTorch takes a pass for each of bias, residual and resampling, and two for a padding.
"""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton
from stepfusion.kernels.group_norm_geometry import power_of_two
from stepfusion.kernels.group_norm_reference import check_residual

_BLOCK, _MOST_CHANNELS = 2048, 128  # elements and channels of a program of 4 warps


@triton.jit  # type: ignore[untyped-decorator]
def add_bias_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, HEIGHT, WIDTH, C]
    residual_ptr,  # like x, or None
    bias_ptr,  # [C], or None
    sum_ptr,  # like x, or None
    resized_ptr,  # [B, HEIGHT + 1, WIDTH + 1, C] or [B, 2 HEIGHT, 2 WIDTH, C], or None
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    PADS: tl.constexpr,  # resized is padded, else doubled
    BLOCKS: tl.constexpr,  # of channels, W each
    SPLITS: tl.constexpr,  # of pixels
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    T: tl.constexpr = BLOCK // W
    ROW: tl.constexpr = WIDTH + 1 if PADS else WIDTH
    PIXELS: tl.constexpr = ROW * (HEIGHT + 1 if PADS else HEIGHT)
    program = tl.program_id(0)
    lane = (program // (BLOCKS * SPLITS)).to(tl.int64)
    c = program % BLOCKS * W + tl.arange(0, W)
    pixel = program // BLOCKS % SPLITS * T + tl.arange(0, T)
    if 4 * PIXELS * C >= 2**31:
        pixel = pixel.to(tl.int64)
    y, x = pixel // ROW, pixel % ROW
    inside = (pixel < PIXELS)[:, None] & (c < C)[None, :]
    there = inside
    if PADS:
        there = there & ((y < HEIGHT) & (x < WIDTH))[:, None]
    source = lane * (HEIGHT * WIDTH * C) + ((y * WIDTH + x)[:, None] * C + c[None, :])

    h = tl.load(x_ptr + source, mask=there, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + source, mask=there, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if PADS:
        h = tl.where(there, h, 0.0)
    h = h.to(x_ptr.dtype.element_ty)
    if sum_ptr is not None:
        tl.store(sum_ptr + source, h, mask=there)
    if resized_ptr is not None:
        if PADS:
            target = lane * (PIXELS * C) + (pixel[:, None] * C + c[None, :])
            tl.store(resized_ptr + target, h, mask=inside)
        else:
            corner = lane * (4 * PIXELS * C) + ((4 * WIDTH * y + 2 * x)[:, None] * C + c[None, :])
            for i in tl.static_range(4):
                tl.store(resized_ptr + corner + (i // 2 * 2 * WIDTH + i % 2) * C, h, mask=inside)


@torch.library.custom_op("stepfusion::add_bias_", mutates_args=("total", "resized"))
def _add_bias(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    total: torch.Tensor | None,
    resized: torch.Tensor | None,
    pads: bool,
) -> None:
    require_triton(x.device)
    if x.numel() == 0:
        return
    lanes, channels, height, width = x.shape
    block = min(power_of_two(channels), _MOST_CHANNELS)
    blocks, tile = -(-channels // block), _BLOCK // block
    splits = -(-(height + pads) * (width + pads) // tile)
    with launch.on(x.device):
        add_bias_kernel[(lanes * blocks * splits,)](
            launch.nhwc(x),
            None if residual is None else launch.nhwc(residual),
            launch.contiguous(bias),
            total,
            resized,
            HEIGHT=height,
            WIDTH=width,
            C=channels,
            PADS=pads,
            BLOCKS=blocks,
            SPLITS=splits,
            W=block,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )


@_add_bias.register_fake
def _add_bias_fake(*_: object, **__: object) -> None:
    return None


def add_bias(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
    """``x + residual + bias`` in one pass.

    Args:
        x: float16, bfloat16 or float32 [B, C, H, W], read as channels_last: anything else is copied to it.
        bias: [C] in the dtype of x or float32, or None. residual: like x, or None.

    Returns:
        Like x, channels_last; added in float32, rounded once. Inputs that require a gradient go to the reference.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(x, bias, residual, launch.FLOATS)
    if launch.needs_gradient(x, bias, residual):
        return add_bias_reference(x, bias, residual)
    total = launch.images_like(x, x.shape[1])
    _add_bias(x, residual, bias, total, None, pads=False)
    return total


def add_bias_doubled(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The same sum with every pixel in a square of 2 x 2: [B, C, 2 H, 2 W]. Arguments and errors of `add_bias`."""
    check_arguments(x, bias, residual, launch.FLOATS)
    if launch.needs_gradient(x, bias, residual):
        return add_bias_doubled_reference(x, bias, residual)
    resized = doubled_like(x)
    _add_bias(x, residual, bias, None, resized, pads=False)
    return resized


def add_bias_padded(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sum, and [B, C, H + 1, W + 1]: the sum with zeros on the right and below. As `add_bias` otherwise."""
    check_arguments(x, bias, residual, launch.FLOATS)
    if launch.needs_gradient(x, bias, residual):
        return add_bias_padded_reference(x, bias, residual)
    total, resized = launch.images_like(x, x.shape[1]), _larger(x, x.shape[2] + 1, x.shape[3] + 1)
    if x.numel() == 0:
        resized.zero_()
    _add_bias(x, residual, bias, total, resized, pads=True)
    return total, resized


def add_bias_reference(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of :func:`add_bias` in eager PyTorch: same arguments, same result. Also in float64."""
    check_arguments(x, bias, residual, (*launch.FLOATS, torch.float64))
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if residual is not None:
        h = h + residual.to(h.dtype)
    if bias is not None:
        h = h + bias.to(h.dtype)[:, None, None]
    return h.to(x.dtype, memory_format=torch.channels_last, copy=True)


def add_bias_doubled_reference(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The twin of :func:`add_bias_doubled`."""
    h = add_bias_reference(x, bias, residual).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return h.contiguous(memory_format=torch.channels_last)


def add_bias_padded_reference(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of :func:`add_bias_padded`."""
    h = add_bias_reference(x, bias, residual)
    return h, torch.nn.functional.pad(h, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)


def check_arguments(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """TypeError or ValueError that names the argument, for all of them and their twins."""
    launch.check_dtype("x", x, dtypes)
    if x.ndim != 4:
        raise ValueError(f"x must be images [B, C, H, W], got shape {list(x.shape)}")
    if bias is not None:
        launch.check_like("bias", bias, (x.shape[1],), x.device, launch.of_parameters(x.dtype))
    check_residual(x, residual)


def doubled_like(x: torch.Tensor) -> torch.Tensor:
    """New images with sides twice as long as those of ``x``, in NHWC memory."""
    return _larger(x, 2 * x.shape[2], 2 * x.shape[3])


def _larger(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    shape = (*x.shape[:2], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
