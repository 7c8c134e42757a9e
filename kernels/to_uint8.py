"""The last step of sampling: float images in [-1, 1], NCHW, to uint8 pixels, NHWC, in one pass on the device.

pixel = round(255 clamp(x / 2 + 1 / 2, 0, 1)), halves to even; NaN becomes 0. Cost: 4 B read and 1 B written an
element, so that 4 times fewer bytes cross to the host.
"""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton

_BLOCK = 2048


@triton.jit
def _level(x):  # type: ignore[no-untyped-def]
    """Values in [-1, 1] to whole numbers 0 .. 255, still float32."""
    level = tl.where(x == x, x * 0.5 + 0.5, 0.0)
    level = tl.minimum(tl.maximum(level, 0.0), 1.0) * 255.0
    # 1.5 * 2**23: the sum has no fraction bits, so it rounds, halves to even
    return (level + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def to_uint8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, C, P], P = H W
    pixel_ptr,  # [B, P, C] uint8
    E,
    P,
    C: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any number of channels. Wide accesses for C = 1; else the reads gather from C planes."""
    start = tl.program_id(0).to(tl.int64) * E
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], in the order of the pixels
    mask = None if EVEN else offs < E
    source = offs if C == 1 else (offs % C) * P + offs // C
    x = tl.load(x_ptr + start + source, mask=mask).to(tl.float32)
    tl.store(pixel_ptr + start + offs, _level(x).to(tl.uint8), mask=mask)


@triton.jit
def _columns(x):  # type: ignore[no-untyped-def]
    """[4 N] as its four columns [N]: elements 4 n + 0, 1, 2 and 3."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    first, third = tl.split(tl.reshape(even, (x.shape[0] // 4, 2)))
    second, fourth = tl.split(tl.reshape(odd, (x.shape[0] // 4, 2)))
    return first, second, third, fourth


@triton.jit  # type: ignore[untyped-decorator]
def _plane(x_ptr, offs, P, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One channel of the pixels at ``offs``, as integers."""
    x = tl.load(x_ptr + offs, mask=None if EVEN else offs < P)
    return _level(x.to(tl.float32)).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def to_uint8_rgb_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, 3, P]
    word_ptr,  # [B, 3 P / 4] int32: the bytes of [B, P, 3]
    P,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Three channels, P a multiple of 16: four pixels are three words, and every access is 128 bits wide."""
    lane = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] pixels
    plane_ptr = x_ptr + lane * 3 * P
    r0, r1, r2, r3 = _columns(_plane(plane_ptr, offs, P, EVEN))  # [BLOCK / 4]
    g0, g1, g2, g3 = _columns(_plane(plane_ptr + P, offs, P, EVEN))
    b0, b1, b2, b3 = _columns(_plane(plane_ptr + 2 * P, offs, P, EVEN))
    u0, u1, u2, u3 = _columns(r0 | (g0 << 8) | (b0 << 16) | (r1 << 24))  # [BLOCK / 16]
    v0, v1, v2, v3 = _columns(g1 | (b1 << 8) | (r2 << 16) | (g2 << 24))
    w0, w1, w2, w3 = _columns(b2 | (r3 << 8) | (g3 << 16) | (b3 << 24))

    i = tl.arange(0, BLOCK // 4)
    group = tl.program_id(1) * (BLOCK // 16) + i // 4
    target = word_ptr + lane * (3 * (P // 4)) + group * 12 + i % 4
    mask = None if EVEN else group * 16 < P
    tl.store(target, tl.interleave(tl.interleave(u0, w0), tl.interleave(v0, u1)), mask=mask)
    tl.store(target + 4, tl.interleave(tl.interleave(v1, u2), tl.interleave(w1, v2)), mask=mask)
    tl.store(target + 8, tl.interleave(tl.interleave(w2, v3), tl.interleave(u3, w3)), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def to_uint8_rgba_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, 4, P]
    word_ptr,  # [B, P] int32: the bytes of [B, P, 4]
    P,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Four channels: a pixel is a word, and every access is 128 bits wide."""
    lane = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] pixels
    plane_ptr = x_ptr + lane * 4 * P
    word = _plane(plane_ptr, offs, P, EVEN)
    for c in tl.static_range(1, 4):
        word |= _plane(plane_ptr + c * P, offs, P, EVEN) << (8 * c)
    tl.store(word_ptr + lane * P + offs, word, mask=None if EVEN else offs < P)


@torch.library.custom_op("stepfusion::to_uint8", mutates_args=())
def _to_uint8(x: torch.Tensor) -> torch.Tensor:
    require_triton(x.device)
    lanes, channels, height, width = x.shape
    pixels = torch.empty((lanes, height, width, channels), dtype=torch.uint8, device=x.device)
    if pixels.numel() == 0:
        return pixels
    area = height * width
    if channels in (3, 4) and area % 16 == 0:
        kernel = to_uint8_rgb_kernel if channels == 3 else to_uint8_rgba_kernel
        with launch.on(x.device):
            kernel[(lanes, -(-area // _BLOCK))](
                x.contiguous(),
                pixels.view(-1).view(torch.int32),
                area,
                EVEN=area % _BLOCK == 0,
                BLOCK=_BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
        return pixels
    elements = channels * area
    with launch.on(x.device):
        to_uint8_kernel[(lanes, -(-elements // _BLOCK))](
            x.contiguous(),
            pixels,
            elements,
            area,
            C=channels,
            EVEN=elements % _BLOCK == 0,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return pixels


@_to_uint8.register_fake
def _to_uint8_fake(x: torch.Tensor) -> torch.Tensor:
    lanes, channels, height, width = x.shape
    return torch.empty((lanes, height, width, channels), dtype=torch.uint8, device=x.device)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] in [-1, 1], float16, bfloat16 or float32, to pixels, uint8 [B, H, W, C].

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(x, launch.FLOATS)
    pixels: torch.Tensor = _to_uint8(x)
    return pixels


def to_uint8_reference(x: torch.Tensor) -> torch.Tensor:
    """The twin of :func:`to_uint8` in eager PyTorch: same argument, same result. Also from float64."""
    check_arguments(x, (*launch.FLOATS, torch.float64))
    level = x.to(torch.promote_types(x.dtype, torch.float32)) * 0.5 + 0.5
    level = level.nan_to_num(nan=0.0).clamp(0.0, 1.0) * 255.0
    return level.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def check_arguments(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """TypeError or ValueError that names the argument, for both twins."""
    launch.check_lanes("x", x, dtypes)
    if x.ndim != 4:
        raise ValueError(f"x must be images [B, C, H, W], got shape {list(x.shape)}")
