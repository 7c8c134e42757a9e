"""Bits per dimension of a data set under a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepfusion import _checks
from stepfusion.diffusion.gaussian_diffusion import GaussianDiffusion
from stepfusion.diffusion.model_calls import Model

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class BitsPerDimension:
    """Means over a data set, in float64; curves are over t = 0, ..., T - 1.

    Attributes:
        total: the variational bound of -log p(x_0), in bits per dimension: the sum of ``vb``, and ``prior``.
        prior: what the last step leaves, KL(q(x_T | x_0) || N(0, 1)).
        vb: [T], the term of every timestep.
        xstart_mse, mse: [T], mean squared errors of the predicted x_0 and of its eps.
        images: how many there were.
    """

    total: float
    prior: float
    vb: Curve
    xstart_mse: Curve
    mse: Curve
    images: int


def bits_per_dimension(
    diffusion: GaussianDiffusion,
    model: Model,
    images: Tensor,
    *,
    batch: int = 64,
    seed: int = 0,
    model_kwargs: Mapping[str, Tensor] | None = None,
) -> BitsPerDimension:
    """The bits per dimension of a data set (Nichol & Dhariwal 2021, table 2): T model calls for each batch.

    Args:
        images: pixels, uint8 [N, C, H, W], e.g. those of a :class:`stepfusion.training.datasets.ImageDataset`.
        batch: images at a time. The noise of an image depends on its place in ``images`` alone.
        seed: of the noise, in [0, 2**64).
        model_kwargs: arguments of the model, each [N, ...], e.g. ``{"class_labels": labels}``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(diffusion, GaussianDiffusion):
        raise TypeError(f"diffusion must be a GaussianDiffusion, got {type(diffusion).__name__}")
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        given = _checks.describe(images) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be pixels, uint8 [N, C, H, W] with N >= 1, got {given}")
    batch = _checks.integer("batch", batch, 1, 1 << 20)
    arguments = dict(model_kwargs or {})
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(images):
            given = _checks.describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"model_kwargs[{name!r}] must have an entry for each of {len(images)} images, got {given}"
            )
    sums: dict[str, NDArray[np.float64]] = {}
    for first in range(0, len(images), batch):
        part = images[first : first + batch].to(torch.float32) / 127.5 - 1
        chosen = {name: value[first : first + batch] for name, value in arguments.items()}
        terms = diffusion.calc_bpd_loop(model, part, seed=seed, first_index=first, **chosen)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum(0).cpu().numpy()
    means = {name: value / len(images) for name, value in sums.items()}
    curves = {name: np.ascontiguousarray(means[name][::-1]) for name in ("vb", "xstart_mse", "mse")}
    return BitsPerDimension(float(means["total_bpd"]), float(means["prior_bpd"]), images=len(images), **curves)
