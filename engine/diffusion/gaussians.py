"""Terms of the variational bound: distances between Gaussians, and the likelihood of pixels under one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) of every element, in nats; arguments broadcast."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """The log probability, in nats, of pixels x under a Gaussian that is cut into 256 bins (Ho et al. 2020, eq. 13).

    x [B, ...] holds uint8 pixels rescaled to [-1, 1]; a pixel's bin reaches 1/255 to either side, that of the first
    and of the last one to infinity. ``log_scales`` is the log of the standard deviation. The cumulative distribution
    is the tanh approximation of Ho et al.'s code, and probabilities below 1e-12 count as that.
    """
    centred, inverse = x - means, (-log_scales).exp()
    distance = centred.abs()  # the tail of small probabilities: near 1, they would drown in rounding
    inside = _standard_normal_cdf(inverse * (1 / 255 - distance)) - _standard_normal_cdf(
        -inverse * (1 / 255 + distance)
    )
    first = _standard_normal_cdf(inverse * (centred + 1 / 255))
    last = _standard_normal_cdf(inverse * (1 / 255 - centred))
    probability = torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside))
    return probability.clamp(min=1e-12).log()


def _standard_normal_cdf(x: Tensor) -> Tensor:
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (Page 1977), as a sigmoid, which keeps small values exact."""
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
