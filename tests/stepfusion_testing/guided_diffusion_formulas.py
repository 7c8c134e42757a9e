"""What guided-diffusion computes, in NumPy and in our own words: there is no package to compare with.

Tables are float64 over the *respaced* process, rounded to float32 where a step gathers them; states are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]  # float32


def sections(total: int, count: int) -> list[int]:
    """``count`` timesteps in increasing order: a running sum of the stride, each rounded to the nearest even."""
    stride = (total - 1) / (count - 1) if count > 1 else 1
    at, chosen = 0.0, []
    for _ in range(count):
        chosen.append(round(at))
        at += stride
    return chosen


@dataclass
class GuidedDiffusion:
    """The respaced process over ``timesteps`` (increasing), whose own index i counts from 0."""

    alphas_cumprod: NDArray[np.float64]
    timesteps: list[int]
    prediction: str = "epsilon"
    variance: str = "fixed_small"
    clip: bool = True

    def __post_init__(self) -> None:
        self.abar = self.alphas_cumprod[self.timesteps]
        self.abar_prev = np.append(1.0, self.abar[:-1])
        self.abar_next = np.append(self.abar[1:], 0.0)
        self.betas = 1 - self.abar / self.abar_prev
        self.small = self.betas * (1 - self.abar_prev) / (1 - self.abar)

    def predict_x0(self, x: Image, out: Image, i: int) -> Image:
        if self.prediction == "epsilon":
            recip, recipm1 = np.float32(np.sqrt(1 / self.abar[i])), np.float32(np.sqrt(1 / self.abar[i] - 1))
            out = recip * x - recipm1 * out
        return out.clip(-1, 1) if self.clip else out

    def eps(self, x: Image, x0: Image, i: int) -> Image:
        recip, recipm1 = np.float32(np.sqrt(1 / self.abar[i])), np.float32(np.sqrt(1 / self.abar[i] - 1))
        return (recip * x - x0) / recipm1

    def log_variance(self, i: int, v: Image | None) -> Image:
        """Entry 1 stands in for the log of entry 0, whose variance is 0; fixed_large does so with the variance."""
        small, large = np.log(np.array([self.small[max(i, 1)], self.betas[i]])).astype(np.float32)
        if self.variance == "fixed_small" or (self.variance == "fixed_large" and i == 0):
            return np.array(small)
        if self.variance == "fixed_large":
            return np.array(large)
        assert v is not None
        fraction = (v + 1) / 2
        return fraction * large + (1 - fraction) * small

    def p_sample(self, x: Image, out: Image, i: int, z: Image) -> Image:
        out, v = np.split(out, 2, axis=1) if self.variance == "learned_range" else (out, None)
        x0 = self.predict_x0(x, out, i)
        coef1 = np.float32(self.betas[i] * np.sqrt(self.abar_prev[i]) / (1 - self.abar[i]))
        coef2 = np.float32((1 - self.abar_prev[i]) * np.sqrt(1 - self.betas[i]) / (1 - self.abar[i]))
        return coef1 * x0 + coef2 * x + np.float32(i != 0) * np.exp(np.float32(0.5) * self.log_variance(i, v)) * z

    def ddim_sample(self, x: Image, out: Image, i: int, z: Image, eta: float) -> Image:
        x0 = self.predict_x0(x, out, i)
        abar, prev = np.float32(self.abar[i]), np.float32(self.abar_prev[i])
        sigma = np.float32(eta) * np.sqrt((1 - prev) / (1 - abar)) * np.sqrt(1 - abar / prev)
        mean = x0 * np.sqrt(prev) + np.sqrt(1 - prev - sigma**2) * self.eps(x, x0, i)
        return mean + np.float32(i != 0) * sigma * z

    def ddim_reverse_sample(self, x: Image, out: Image, i: int) -> Image:
        """From level i to level i + 1; the network was evaluated at i."""
        x0 = self.predict_x0(x, out, i)
        abar_next = np.float32(self.abar_next[i])
        return x0 * np.sqrt(abar_next) + np.sqrt(1 - abar_next) * self.eps(x, x0, i)
