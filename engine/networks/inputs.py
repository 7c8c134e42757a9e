"""What the UNets check of their inputs: shapes and dtypes, never values."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion import _checks

_TIMES = (torch.int64, torch.float32, torch.float64)  # half precision would give neighbours one value


def check_timesteps(timesteps: Tensor) -> None:
    """ValueError unless timesteps are int64, float32 or float64 [B]."""
    if timesteps.ndim != 1 or timesteps.dtype not in _TIMES:
        raise ValueError(f"timesteps is {_checks.describe(timesteps)}; accepted is int64, float32 or float64 [B]")


def check_batch(x: Tensor, timesteps: Tensor, ndim: int = 4) -> None:
    """ValueError if x [B, C, H, W], or another number of dimensions, and timesteps [B] are of two batch sizes."""
    if x.ndim == ndim and timesteps.ndim == 1 and x.shape[0] != timesteps.shape[0]:
        accepted = f"{str(timesteps.dtype).removeprefix('torch.')} [{x.shape[0]}]"
        raise ValueError(f"timesteps is {_checks.describe(timesteps)}; accepted is {accepted}, as x has")


def check_image(x: Tensor, channels: int, dtype: torch.dtype, factor: int) -> None:
    """ValueError unless x is [B, channels, H, W] of this dtype, H and W multiples of `factor`."""
    if x.ndim != 4 or x.shape[1] != channels or x.dtype != dtype:
        accepted = f"{str(dtype).removeprefix('torch.')} [B, {channels}, H, W]"
        raise ValueError(f"x is {_checks.describe(x)}; accepted is {accepted}")
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"x is {_checks.describe(x)}; accepted are height and width that are multiples of {factor}")


def check_sequence(x: Tensor, channels: int, dtype: torch.dtype, factor: int) -> None:
    """ValueError unless x is [B, channels, L] of this dtype, L a multiple of `factor`."""
    if x.ndim != 3 or x.shape[1] != channels or x.dtype != dtype:
        accepted = f"{str(dtype).removeprefix('torch.')} [B, {channels}, L]"
        raise ValueError(f"x is {_checks.describe(x)}; accepted is {accepted}")
    if x.shape[2] % factor:
        raise ValueError(f"x is {_checks.describe(x)}; accepted are lengths that are multiples of {factor}")


def check_projections(projections: Tensor, x: Tensor, size: int) -> None:
    """ValueError unless projections are [B, size], as x [B, C, H, W] has B."""
    if list(projections.shape) != [x.shape[0], size]:
        accepted = f"[{x.shape[0]}, {size}]"
        raise ValueError(f"projections is {_checks.describe(projections)}; accepted is {accepted}, as x has")


def check_labels(labels: Tensor | None, timesteps: Tensor, conditioned: bool) -> None:
    """ValueError unless labels are int64 [B] where the network is `conditioned` on a class, and None elsewhere."""
    if labels is None:
        if conditioned:
            raise ValueError("class_labels is None; this network is conditioned on a class and needs them")
        return
    if not conditioned:
        raise ValueError("class_labels is given; this network takes none")
    if labels.dtype != torch.int64 or list(labels.shape) != [timesteps.shape[0]]:
        raise ValueError(
            f"class_labels is {_checks.describe(labels)}; accepted is int64 [{timesteps.shape[0]}], as timesteps has"
        )
