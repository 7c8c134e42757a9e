"""What a projection adds to an image: the 1x1 convolution of a shortcut, of x and a skip input, in one launch.

    h       = image + weight [x, skip] + bias               skip and bias if given; He et al. 2016, equation 2
    doubled = every pixel of h in a square of 2 x 2         nearest neighbour

All in NHWC memory. A library's matrix product reads one matrix, so that x and skip have to be written next to each
other before, and what comes after it (a bias, resampling) is a pass of its own. Here a program takes some pixels and
some channels of the result, walks over the channels of x and then of skip, and adds to what the image holds.

Cost, s the size of the dtype, N channels of the result and K of x and skip: s (K + 2 N) bytes and 2 K N FLOP a pixel.
With a joined matrix the same product moves s K bytes more, which a norm writes. So this is faster until the products
of a kernel of ours take longer than a library's by the time of those bytes: with 540 of 700 TFLOP/s in half precision
and 4.8 TB/s of memory, up to N = 500. That is arithmetic, and was not timed.

Half precision only: float32 has no matrix units without TF32, and its products stay with cuBLAS.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.add_bias import add_bias_doubled_reference, doubled_like
from stepfusion.kernels.backend import interpreting, require_triton, tl, triton
from stepfusion.kernels.group_norm_geometry import power_of_two

HALF = (torch.float16, torch.bfloat16)
#: Channels of a result up to which one launch is taken for faster than a library's product of a joined matrix.
MOST_CHANNELS = 512
_SMALL_IMAGE = 4096  # pixels: below, programs are smaller, so that one image has enough of them


@triton.jit(do_not_specialize=["pixels"])  # type: ignore[untyped-decorator]
def add_projection_kernel(  # type: ignore[no-untyped-def]
    image_ptr,  # [pixels, N]
    x_ptr,  # [pixels, K_X]
    skip_ptr,  # [pixels, K_SKIP], or None
    weight_ptr,  # [N, K_X + K_SKIP]
    bias_ptr,  # [N], or None
    out_ptr,  # like image, which it may be; or [pixels of a batch whose sides are twice as long, N]
    pixels,
    N: tl.constexpr,
    K_X: tl.constexpr,
    K_SKIP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DOUBLES: tl.constexpr,
    ROWS: tl.constexpr,  # pixels of a program
    COLUMNS: tl.constexpr,  # channels of a program
    DEPTH: tl.constexpr,  # channels of x or skip that are read at a time
):
    BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    OF_X: tl.constexpr = (K_X + DEPTH - 1) // DEPTH
    OF_SKIP: tl.constexpr = (K_SKIP + DEPTH - 1) // DEPTH
    EVEN: tl.constexpr = K_X % DEPTH == 0 and K_SKIP % DEPTH == 0
    program = tl.program_id(0)
    start = program // BLOCKS * ROWS
    first = start.to(tl.int64)
    row = tl.arange(0, ROWS)
    there = (row < pixels - start)[:, None]
    n = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    inside = there & (n < N)[None, :]
    place = row[:, None] * N + n[None, :]

    x_ptr += first * K_X
    if skip_ptr is not None:
        skip_ptr += first * K_SKIP
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(OF_X + OF_SKIP):
        if skip_ptr is None:
            k, channels, read_ptr, columns_ptr = depth + step * DEPTH, K_X, x_ptr, weight_ptr
        else:
            of_x = step < OF_X
            k = depth + tl.where(of_x, step, step - OF_X) * DEPTH
            channels = tl.where(of_x, K_X, K_SKIP)
            read_ptr = tl.where(of_x, x_ptr, skip_ptr)
            columns_ptr = weight_ptr + tl.where(of_x, 0, K_X)
        columns = (n < N)[None, :]
        known = there
        if not EVEN:
            known = known & (k < channels)[None, :]
            columns = columns & (k < channels)[:, None]
        values = tl.load(read_ptr + (row[:, None] * channels + k[None, :]), mask=known, other=0.0)
        weights = tl.load(columns_ptr + (n[None, :] * (K_X + K_SKIP) + k[:, None]), mask=columns, other=0.0)
        total = tl.dot(values, weights, total)

    # last: as the sum's first terms they would hold registers, and leave room for one program on a multiprocessor
    total += tl.load(image_ptr + first * N + place, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    h = total.to(out_ptr.dtype.element_ty)
    if DOUBLES:
        lane, pixel = (start + row) // (HEIGHT * WIDTH), (start + row) % (HEIGHT * WIDTH)
        corner = lane.to(tl.int64) * (4 * HEIGHT * WIDTH) + (pixel // WIDTH * (4 * WIDTH) + pixel % WIDTH * 2)
        corners = out_ptr + corner[:, None] * N + n[None, :]
        for i in tl.static_range(4):
            tl.store(corners + (i // 2 * 2 * WIDTH + i % 2) * N, h, mask=inside)
    else:
        tl.store(out_ptr + first * N + place, h, mask=inside)


class _Tile(NamedTuple):
    """Pixels and channels of a program, channels that it reads at a time, and its warps."""

    rows: int
    columns: int
    depth: int
    num_warps: int


def _tile(pixels: int, channels: int, of_x: int, of_skip: int, *, doubles: bool) -> _Tile:
    """By the sizes of one image alone, so that no bit depends on the batch."""
    # at least two instructions of 16 channels: with one Triton sets sums to zero behind the fence before the product
    depth = next((d for d in (64, 32) if of_x % d == 0 and of_skip % d == 0), 32)
    columns = max(power_of_two(channels), 16)
    if pixels < _SMALL_IMAGE:
        return _Tile(64, min(columns, 64), depth, 4)
    # with the addresses of four stores 128 columns would leave room for one program on a multiprocessor
    return _Tile(128, min(columns, 64 if doubles else 128), depth, 8)


@cache
def _stages() -> int:
    """How many reads are under way at a time: three of asynchronous copies, or one through registers.

    On sm_90 matrix units see what was copied behind a fence, which Triton leaves out before its release 3.7.1
    (triton-lang/triton, pull requests 9610 and 10537). It has one behind what threads write.
    """
    release = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    return 3 if release >= (3, 7, 1) else 1


@torch.library.custom_op("stepfusion::add_projection_", mutates_args=("out",))
def _add_projection(
    image: torch.Tensor | None,  # None: it is `out`
    x: torch.Tensor,
    weight: torch.Tensor,
    skip: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    doubles: bool,
) -> None:
    require_triton(x.device)
    if out.numel() == 0:
        return
    lanes, of_x, height, width = x.shape
    of_skip = 0 if skip is None else skip.shape[1]
    tile = _tile(height * width, len(weight), of_x, of_skip, doubles=doubles)
    pixels = lanes * height * width
    if x.device.type == "cpu" and interpreting() and x.dtype == torch.bfloat16:
        # Triton's interpreter would multiply its bits as integers
        x, weight, skip = x.float(), weight.float(), None if skip is None else skip.float()
    with launch.on(x.device):
        add_projection_kernel[(-(-pixels // tile.rows) * -(-len(weight) // tile.columns),)](
            out if image is None else launch.nhwc(image),
            launch.nhwc(x),
            None if skip is None else launch.nhwc(skip),
            launch.aligned(weight),
            launch.contiguous(bias),
            out,
            pixels,
            N=len(weight),
            K_X=of_x,
            K_SKIP=of_skip,
            HEIGHT=height,
            WIDTH=width,
            DOUBLES=doubles,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=_stages(),
        )


@_add_projection.register_fake
def _add_projection_fake(*_: object, **__: object) -> None:
    return None


def add_projection_(
    image: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the 1x1 convolution of concat(x, skip) to an image, in place.

    Args:
        image: float16 or bfloat16 [B, N, H, W], channels_last; receives the sum.
        x: [B, K1, H, W] in the dtype of image, read as channels_last: anything else is copied to it. It shares no
            memory with image.
        weight: [N, K1 + K2] in that dtype. skip: like x, with K2 channels, or None, with K2 = 0.
        bias: [N] in that dtype or float32, or None.

    Returns:
        image: added in float32, rounded once. If an input requires a gradient, that of the reference.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(image, x, weight, skip, bias, HALF)
    if not image.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"image must be channels_last to be added to in place, got strides {list(image.stride())}")
    if launch.needs_gradient(image, x, weight, skip, bias):
        return add_projection_reference_(image, x, weight, skip=skip, bias=bias)
    _add_projection(None, x, weight, skip, bias, image, doubles=False)
    return image


def add_projection_doubled(
    image: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same sum with every pixel in a square of 2 x 2: [B, N, 2 H, 2 W], new; ``image`` is left alone.

    Arguments and errors of :func:`add_projection_`; image may have any layout.
    """
    check_arguments(image, x, weight, skip, bias, HALF)
    if launch.needs_gradient(image, x, weight, skip, bias):
        return add_projection_doubled_reference(image, x, weight, skip=skip, bias=bias)
    out = doubled_like(image)
    _add_projection(image, x, weight, skip, bias, out, doubles=True)
    return out


def projects(dtype: torch.dtype, channels: int) -> bool:
    """Whether a projection to so many channels is to be :func:`add_projection_`, and not a library's product."""
    return dtype in HALF and channels <= MOST_CHANNELS


def add_projection_reference_(
    image: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of :func:`add_projection_` in eager PyTorch: same arguments, same result. Also in float32, float64."""
    check_arguments(image, x, weight, skip, bias, (*launch.FLOATS, torch.float64))
    return image.copy_(_sum(image, x, weight, skip, bias))


def add_projection_doubled_reference(
    image: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin of :func:`add_projection_doubled`."""
    check_arguments(image, x, weight, skip, bias, (*launch.FLOATS, torch.float64))
    return add_bias_doubled_reference(_sum(image, x, weight, skip, bias), None)


def _sum(
    image: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    skip: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    joined = (x if skip is None else torch.cat((x, skip), dim=1)).to(compute)
    h = torch.einsum("bkhw,nk->bnhw", joined, weight.to(compute)) + image.to(compute)
    if bias is not None:
        h = h + bias.to(compute)[:, None, None]
    return h.to(image.dtype)


def check_arguments(
    image: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    skip: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """TypeError or ValueError that names the argument, for all of them and their twins."""
    launch.check_dtype("image", image, dtypes)
    launch.check_dtype("x", x, (image.dtype,))
    channels = launch.check_joined(x, skip)
    launch.check_dtype("weight", weight, (image.dtype,))
    if weight.ndim != 2 or weight.shape[1] != channels or weight.device != x.device:
        raise ValueError(f"weight must be [N, {channels}] on {x.device}, got {list(weight.shape)} on {weight.device}")
    launch.check_like("image", image, (len(x), len(weight), *x.shape[2:]), x.device, (image.dtype,))
    if bias is not None:
        launch.check_like("bias", bias, (len(weight),), x.device, launch.of_parameters(image.dtype))
