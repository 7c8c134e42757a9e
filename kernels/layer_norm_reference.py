"""Modulated layer norms in eager PyTorch: the twins of :mod:`stepfusion.kernels.layer_norm_modulate`."""

from __future__ import annotations

import math

import torch

from stepfusion.kernels import launch

MOST_CHANNELS = 2**14  # of a token: a program holds all of them


def layer_norm_modulate_reference(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """The twin of :func:`stepfusion.kernels.layer_norm_modulate`: same arguments, same result. Also in float64."""
    check_arguments(x, scale, shift, eps, (*launch.FLOATS, torch.float64))
    compute = torch.promote_types(x.dtype, torch.float32)
    norm = torch.nn.functional.layer_norm(x.to(compute), (x.shape[2],), eps=eps)
    return torch.addcmul(shift.to(compute)[:, None], norm, 1 + scale.to(compute)[:, None]).to(x.dtype)


def add_layer_norm_modulate_reference(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, *, branch: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of :func:`stepfusion.kernels.add_layer_norm_modulate`: same arguments and result. Also in float64."""
    check_arguments(x, scale, shift, eps, (*launch.FLOATS, torch.float64))
    check_branch(x, branch, gate)
    compute = torch.promote_types(x.dtype, torch.float32)
    h = torch.addcmul(x.to(compute), gate.to(compute)[:, None], branch.to(compute)).to(x.dtype)
    return layer_norm_modulate_reference(h, scale, shift, eps), h


def check_arguments(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, dtypes: tuple[torch.dtype, ...]
) -> None:
    """TypeError or ValueError that names the argument, for both and their twins."""
    launch.check_dtype("x", x, dtypes)
    if x.ndim != 3:
        raise ValueError(f"x must be tokens [B, N, D], got shape {list(x.shape)}")
    if not 1 <= x.shape[2] <= MOST_CHANNELS:
        raise ValueError(f"x must have 1 to {MOST_CHANNELS} channels a token, got {x.shape[2]}")
    for name, modulation in (("scale", scale), ("shift", shift)):
        _check_modulation(name, modulation, x)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def check_branch(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> None:
    """TypeError or ValueError unless a branch is like x and a gate like a scale."""
    launch.check_like("branch", branch, tuple(x.shape), x.device, (x.dtype,))
    _check_modulation("gate", gate, x)


def _check_modulation(name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    accepted = (x.dtype,) if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    launch.check_like(name, value, (x.shape[0], x.shape[2]), x.device, accepted)
