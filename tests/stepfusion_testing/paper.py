"""DDPM and DDIM steps as their papers state them: scalars, float64, no code of the package.

A step goes from the level ``abar`` to the level ``prev`` > ``abar``; ``prev`` = 1 is the end.
"""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray


def x0_of(x: float, out: float, abar: float, prediction: str, clip: float | None) -> float:
    """x0 from what the network returned, where x = sqrt(abar) x0 + sqrt(1 - abar) eps."""
    if prediction == "epsilon":
        x0 = (x - sqrt(1 - abar) * out) / sqrt(abar)
    elif prediction == "sample":
        x0 = out
    else:
        x0 = sqrt(abar) * x - sqrt(1 - abar) * out
    return x0 if clip is None else min(max(x0, -clip), clip)


def out_of(x0: float, x: float, abar: float, prediction: str) -> float:
    """What a network of this prediction type returns when it believes in x0."""
    eps = (x - sqrt(abar) * x0) / sqrt(1 - abar)
    return {"epsilon": eps, "sample": x0, "v_prediction": sqrt(abar) * eps - sqrt(1 - abar) * x0}[prediction]


def posterior(x: float, x0: float, abar: float, prev: float) -> tuple[float, float]:
    """Mean and variance of q(x_prev | x, x0), by Bayes' rule, which Ho et al.'s equation 7 solves.

    The prior N(sqrt(prev) x0, 1 - prev) meets the likelihood x ~ N(sqrt(alpha) x_prev, 1 - alpha), with
    alpha = abar / prev.
    """
    if prev == 1:
        return x0, 0.0
    alpha = abar / prev
    precision = 1 / (1 - prev) + alpha / (1 - alpha)
    mean = (sqrt(prev) * x0 / (1 - prev) + sqrt(alpha) * x / (1 - alpha)) / precision
    return mean, 1 / precision


def ddpm_step(
    x: float,
    out: float,
    z: float,
    abar: float,
    prev: float,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    variance: str = "fixed_small",
    v: float = 0.0,
) -> float:
    """Ho et al. 2020, algorithm 2 in the form of equations 6 and 7; no noise at the end."""
    mean, small = posterior(x, x0_of(x, out, abar, prediction, clip), abar, prev)
    if prev == 1:
        return mean
    large = 1 - abar / prev
    fraction = (v + 1) / 2  # Nichol & Dhariwal 2021, equation 15
    learned = exp(fraction * log(large) + (1 - fraction) * log(small))
    return mean + sqrt({"fixed_small": small, "fixed_large": large, "learned_range": learned}[variance]) * z


def ddim_step(
    x: float,
    out: float,
    z: float,
    abar: float,
    prev: float,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    eta: float = 0.0,
    rederive_eps: bool = True,
) -> float:
    """Song et al. 2021, equations 12 and 16; eps belongs to the clipped x0, or is what the network said."""
    x0 = x0_of(x, out, abar, prediction, clip)
    source = x0 if rederive_eps else x0_of(x, out, abar, prediction, None)
    eps = (x - sqrt(abar) * source) / sqrt(1 - abar)
    sigma = eta * sqrt((1 - prev) / (1 - abar)) * sqrt(1 - abar / prev)
    return sqrt(prev) * x0 + sqrt(max(1 - prev - sigma**2, 0.0)) * eps + sigma * z


def levels(alphas_cumprod: NDArray[np.float64], timesteps: NDArray[np.int64]) -> list[tuple[float, float]]:
    """(abar, prev) of every step over a decreasing list of timesteps, the last one ending at 1."""
    abar = [float(alphas_cumprod[t]) for t in timesteps]
    return list(zip(abar, [*abar[1:], 1.0], strict=True))
