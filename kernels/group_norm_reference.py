"""GroupNorm and SiLU in eager PyTorch: the twin of :mod:`stepfusion.kernels.group_norm`."""

from __future__ import annotations

import math

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.group_norm_geometry import MOST_OF_A_GROUP


def group_norm_silu_reference(
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
    """The twin of :func:`stepfusion.kernels.group_norm_silu`: same arguments, same result. Also in float64."""
    check_arguments(x, weight, bias, groups, eps, skip, time, scale, shift, (*launch.FLOATS, torch.float64))
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x.to(compute) if skip is None else torch.cat((x, skip), dim=1).to(compute)
    if time is not None:
        h = h + time.to(compute)[:, :, None, None]
    h = h.contiguous()  # aten sums squares of channels_last tensors on a CPU, which cancels if the mean is large
    y = _group_norm(h, groups, weight.to(compute), bias.to(compute), eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift.to(compute)[:, :, None, None], y, 1 + scale.to(compute)[:, :, None, None])
    if silu:
        y = torch.nn.functional.silu(y)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _group_norm(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    if 0 in x.shape[2:]:  # PyTorch 2.14 refuses images without pixels; their gradients are zeros, as before
        return x * weight[:, None, None] + bias[:, None, None]
    return torch.nn.functional.group_norm(x, groups, weight, bias, eps)


def add_group_norm_silu_reference(
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
    """The twin of :func:`stepfusion.kernels.add_group_norm_silu`: same arguments, same result. Also in float64."""
    check_arguments(x, weight, bias, groups, eps, skip, time, None, None, (*launch.FLOATS, torch.float64))
    check_residual(x, residual)
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x.to(compute) if residual is None else x.to(compute) + residual.to(compute)
    if skip is not None:
        h = torch.cat((h, skip.to(compute)), dim=1)
    if time is not None:
        h = h + time.to(compute)[:, :, None, None]
    joined = h.to(x.dtype, memory_format=torch.channels_last, copy=True)
    return group_norm_silu_reference(joined, weight, bias, groups, eps, silu=silu), joined


def check_residual(x: torch.Tensor, residual: torch.Tensor | None) -> None:
    """TypeError or ValueError unless a residual is like x."""
    if residual is not None:
        launch.check_like("residual", residual, tuple(x.shape), x.device, (x.dtype,))


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    skip: torch.Tensor | None,
    time: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """TypeError or ValueError unless the arguments of the op fit each other and are of these dtypes."""
    launch.check_dtype("x", x, dtypes)
    channels, accepted = launch.check_joined(x, skip), launch.of_parameters(x.dtype)
    for name, parameter in (("weight", weight), ("bias", bias)):
        launch.check_like(name, parameter, (channels,), x.device, accepted)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got one of them")
    for name, modulation in (("time", time), ("scale", scale), ("shift", shift)):
        if modulation is not None:
            launch.check_like(name, modulation, (len(x), channels), x.device, accepted)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an integer, got {type(groups).__name__}")
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"groups must be a positive divisor of the {channels} channels, got {groups}")
    if channels // groups > MOST_OF_A_GROUP:
        raise ValueError(f"groups must have at most {MOST_OF_A_GROUP} channels each, got {channels // groups}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
