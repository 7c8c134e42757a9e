"""GroupNorm and SiLU of a sum that is returned as well: what a layer left to be added is added by the norm after it.

    h   = concat(x + residual, skip) + time                               residual, skip and time if given
    out = silu(norm(h))                                                   as in :mod:`stepfusion.kernels.group_norm`

A bias of a convolution and the residual of a block cost launches of their own in eager PyTorch, which read and write
the whole image. The norm that comes next reads it anyway.

Cost, s the size of the dtype: that of the norm, s an element for the residual, and s for h.
"""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.group_norm import normalise
from stepfusion.kernels.group_norm_reference import add_group_norm_silu_reference, check_arguments, check_residual


@torch.library.custom_op("stepfusion::add_group_norm_silu", mutates_args=())
def _add_group_norm_silu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    time: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    joined = launch.images_like(x, len(weight))
    return normalise(x, residual, skip, weight, bias, groups, eps, time, None, None, silu, joined), joined


@_add_group_norm_silu.register_fake
def _add_group_norm_silu_fake(
    x: torch.Tensor, residual: object, skip: object, weight: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch.images_like(x, len(weight)), launch.images_like(x, len(weight))


def add_group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    time: torch.Tensor | None = None,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add what a layer left to be added, normalise the sum, and return both.

    Args:
        x, weight, bias, groups, eps, skip, time, silu: as of :func:`group_norm_silu`.
        residual: like x, added to it.

    Returns:
        The norm of h = concat(x + residual, skip) + time, and h itself: [B, C, H, W] in the dtype of x, in
        channels_last. h is rounded once, from float32, and what is normalised is h as it was rounded.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(x, weight, bias, groups, eps, skip, time, None, None, launch.FLOATS)
    check_residual(x, residual)
    if launch.needs_gradient(x, weight, bias, residual, skip, time):
        options = {"residual": residual, "skip": skip, "time": time}
        return add_group_norm_silu_reference(x, weight, bias, groups, eps, **options, silu=silu)
    sums: tuple[torch.Tensor, torch.Tensor] = _add_group_norm_silu(
        x, residual, skip, weight, bias, groups, float(eps), time, silu
    )
    return sums
