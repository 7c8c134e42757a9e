"""Models and the functions that guide them, as diffusion code calls them, and what they may return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepfusion.diffusion.timestep_map import TimestepMap
from stepfusion.kernels import launch

Model = Callable[..., torch.Tensor]
Condition = Callable[..., torch.Tensor]
Step = dict[str, torch.Tensor]

LEARNED = ("learned", "learned_range")


def call_model(
    model: Model,
    x: torch.Tensor,
    t: torch.Tensor,
    model_kwargs: Mapping[str, Any],
    *,
    told: TimestepMap,
    variance: str,
) -> torch.Tensor:
    """What a model returns for x [B, C, ...]: [B, C, ...], or [B, 2 C, ...] if it learned its variance.

    In float16, bfloat16 or float32: float64 is rounded. Of an object with a ``sample``, as diffusers' models return
    it, that is taken.

    Raises:
        TypeError, ValueError: the model returned something else.
    """
    out = model(x, told(t), **model_kwargs)
    out = getattr(out, "sample", out)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"the model must return a tensor, got {type(out).__name__}")
    wanted = tuple(x.shape)
    if variance in LEARNED:
        if x.ndim < 2:
            raise ValueError(f"x must have channels, [B, C, ...], with variance {variance!r}, got {list(x.shape)}")
        wanted = (len(x), 2 * x.shape[1], *x.shape[2:])
    if tuple(out.shape) != wanted:
        raise ValueError(
            f"the model returned shape {list(out.shape)}, and variance {variance!r} needs {list(wanted)}"
        )
    launch.check_like("the model's output", out, wanted, x.device, (*launch.FLOATS, torch.float64))
    return out.to(torch.float32) if out.dtype == torch.float64 else out


def split(out: torch.Tensor, variance: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What :func:`call_model` returned as the prediction, and v if the variance was learned."""
    if variance not in LEARNED:
        return out, None
    prediction, v = out.chunk(2, dim=1)
    return prediction, v


def returned_like(name: str, value: object, x: torch.Tensor) -> torch.Tensor:
    """What a condition or a ``denoised_fn`` returned, in float32; ValueError if it is no tensor like x."""
    if not isinstance(value, torch.Tensor) or value.shape != x.shape:
        given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must return shape {list(x.shape)}, got {given}")
    return value.to(torch.float32)
