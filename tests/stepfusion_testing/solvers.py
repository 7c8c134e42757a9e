"""DPM-Solver++(2M), ancestral Euler and Karras' levels as their authors state them: NumPy, float64, no code of ours.

``predict`` is the data prediction x0(x, t), clipped or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Predict = Callable[[Floats, int], Floats]


def dpm_solver_pp_2m(
    predict: Predict, x: Floats, abar: Floats, timesteps: Sequence[int], *, final: float, first_order_last: bool
) -> Floats:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, from timestep to timestep and last to the level ``final``."""
    levels = [*(float(abar[t]) for t in timesteps), final]
    alpha, sigma = [np.sqrt(a) for a in levels], [np.sqrt(1 - a) for a in levels]
    lam = [np.log(a) - np.log(s) if s > 0 else np.inf for a, s in zip(alpha, sigma, strict=True)]
    before: Floats | None = None
    for i, t in enumerate(timesteps):
        x0 = predict(x, t)
        h = lam[i + 1] - lam[i]
        data = x0
        last = i == len(timesteps) - 1
        if before is not None and not (last and (first_order_last or final == 1)):
            r = (lam[i] - lam[i - 1]) / h
            data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * data
        before = x0
    return x


def euler_ancestral(
    predict: Predict, x: Floats, abar: Floats, timesteps: Sequence[int], noise: Floats, *, eta: float
) -> Floats:
    """k-diffusion's ``sample_euler_ancestral`` where noise has variance s^2 and data is not scaled, ending at s = 0.

    ``x`` and what is returned are variance-preserving states; the loop is in y = x / sqrt(abar).
    """
    s = [*(np.sqrt((1 - abar[t]) / abar[t]) for t in timesteps), 0.0]
    y = x / np.sqrt(abar[timesteps[0]])
    for i, t in enumerate(timesteps):
        denoised = predict(y / np.sqrt(s[i] ** 2 + 1), t)
        up = min(s[i + 1], eta * np.sqrt(s[i + 1] ** 2 * (s[i] ** 2 - s[i + 1] ** 2) / s[i] ** 2))
        down = np.sqrt(s[i + 1] ** 2 - up**2)
        y = y + (y - denoised) / s[i] * (down - s[i]) + up * noise[i]
    return y


def karras_levels(low: float, high: float, steps: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + i / (steps - 1) * (b - a)) ** rho for i in range(steps)]


# On any path, of a denoiser D(x, signal, noise) or D(x, sigma)


def edm_sampler(
    denoise: Callable[[Floats, float], Floats],
    x: Floats,
    noise: Floats,
    *,
    steps: int,
    churn: tuple[float, float, float, float] = (0.0, 0.0, np.inf, 1.0),
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    corrects: bool = True,
) -> Floats:
    """Karras et al. 2022, algorithm 2, line by line; x is t_0 times the initial noise. Euler's if none corrects."""
    s_churn, s_min, s_max, s_noise = churn
    t = np.array([*karras_levels(sigma_min, sigma_max, steps), 0.0])
    for i in range(steps):
        gamma = min(s_churn / steps, np.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0.0
        eps = s_noise * noise[i]
        t_hat = t[i] + gamma * t[i]
        x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * eps
        d = (x_hat - denoise(x_hat, float(t_hat))) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if corrects and t[i + 1] != 0:
            d_prime = (x - denoise(x, float(t[i + 1]))) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


def runge_kutta(
    denoise: Callable[[Floats, float, float], Floats], x: Floats, levels: Floats, *, flow: bool
) -> Floats:
    """The classical method of fourth order for dx/du = (x - D) / u, over u = sigma or u = t."""

    def slope(x: Floats, u: float) -> Floats:
        return (x - denoise(x, 1 - u if flow else 1.0, u)) / u

    for u, following in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        h = following - u
        k1 = slope(x, u)
        k2 = slope(x + h / 2 * k1, u + h / 2)
        k3 = slope(x + h / 2 * k2, u + h / 2)
        k4 = slope(x + h * k3, following)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
