"""The last step of sampling: float images in [-1, 1], NCHW, to uint8 pixels, NHWC, in one pass on the device.

pixel = round(255 clamp(x / 2 + 1 / 2, 0, 1)), halves to even; NaN becomes 0. Cost: 4 B read and 1 B written an
element, so that 4 times fewer bytes cross to the host.
"""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton

_BLOCK = 2048


@triton.jit  # type: ignore[untyped-decorator]
def to_uint8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [B, C, P] float32, P = H W
    pixel_ptr,  # [B, P, C] uint8
    E,
    P,
    C: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * E
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], in the order of the pixels
    mask = None if EVEN else offs < E
    source = offs if C == 1 else (offs % C) * P + offs // C
    x = tl.load(x_ptr + start + source, mask=mask).to(tl.float32)
    level = tl.where(x == x, x * 0.5 + 0.5, 0.0)
    level = tl.minimum(tl.maximum(level, 0.0), 1.0) * 255.0
    level = (level + 12582912.0) - 12582912.0  # 1.5 * 2**23 leaves no fraction bits: rounds halves to even
    tl.store(pixel_ptr + start + offs, level.to(tl.uint8), mask=mask)


@torch.library.custom_op("stepfusion::to_uint8", mutates_args=())
def _to_uint8(x: torch.Tensor) -> torch.Tensor:
    require_triton(x.device)
    lanes, channels, height, width = x.shape
    pixels = torch.empty((lanes, height, width, channels), dtype=torch.uint8, device=x.device)
    elements = x[:1].numel()
    if pixels.numel() == 0:
        return pixels
    with launch.on(x.device):
        to_uint8_kernel[(lanes, -(-elements // _BLOCK))](
            x.contiguous(),
            pixels,
            elements,
            height * width,
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
    _check(x, launch.FLOATS)
    pixels: torch.Tensor = _to_uint8(x)
    return pixels


def to_uint8_reference(x: torch.Tensor) -> torch.Tensor:
    """The twin of :func:`to_uint8` in eager PyTorch: same argument, same result. Also from float64."""
    _check(x, (*launch.FLOATS, torch.float64))
    level = x.to(torch.promote_types(x.dtype, torch.float32)) * 0.5 + 0.5
    level = level.nan_to_num(nan=0.0).clamp(0.0, 1.0) * 255.0
    return level.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _check(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    launch.check_lanes("x", x, dtypes)
    if x.ndim != 4:
        raise ValueError(f"x must be images [B, C, H, W], got shape {list(x.shape)}")
