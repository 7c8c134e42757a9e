"""The formulas of improved-diffusion, guided-diffusion and latent diffusion in float64 NumPy, written for the tests.

Every function works on a whole batch at one timestep; nothing of the package is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Function = Callable[[Array, int], Array]


def space_timesteps(total: int, text: str) -> list[int]:
    """Increasing timesteps: sections of nearly equal length, or one stride."""
    if text.startswith("ddim"):
        for stride in range(1, total):
            if len(range(0, total, stride)) == int(text[4:]):
                return list(range(0, total, stride))
        raise ValueError(text)
    counts = [int(part) for part in text.split(",")]
    chosen, start = [], 0
    for i, count in enumerate(counts):
        length = total // len(counts) + (1 if i < total % len(counts) else 0)
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0
        for _ in range(count):
            chosen.append(start + round(at))
            at += stride
        start += length
    return chosen


@dataclass
class Diffusion:
    """A process with its own t from 0 to K - 1, of which the model is told ``told[t]``."""

    betas: Array
    prediction: str = "epsilon"
    variance: str = "fixed_small"
    clip: bool = True
    v_posterior: float = 0.0
    told: list[int] | None = None

    def __post_init__(self) -> None:
        self.alphas = 1 - self.betas
        self.abar = np.array([math.prod(self.alphas[: i + 1]) for i in range(len(self.betas))])
        self.prev = np.concatenate(([1.0], self.abar[:-1]))
        self.tilde = self.betas * (1 - self.prev) / (1 - self.abar)
        self.log_tilde = np.log(np.concatenate((self.tilde[1:2], self.tilde[1:])))

    @classmethod
    def respaced(cls, abar: Array, timesteps: list[int], **options: Any) -> Diffusion:
        chosen = abar[timesteps]
        return cls(1 - chosen / np.concatenate(([1.0], chosen[:-1])), told=timesteps, **options)

    def ask(self, function: Function, x: Array, t: int) -> Array:
        return function(x, t if self.told is None else self.told[t])

    def q_sample(self, x0: Array, t: int, eps: Array) -> Array:
        return math.sqrt(self.abar[t]) * x0 + math.sqrt(1 - self.abar[t]) * eps

    def posterior_mean(self, x0: Array, x: Array, t: int) -> Array:
        beta, prev, abar = self.betas[t], self.prev[t], self.abar[t]
        return (math.sqrt(prev) * beta * x0 + math.sqrt(1 - beta) * (1 - prev) * x) / (1 - abar)

    def eps_of(self, x: Array, x0: Array, t: int) -> Array:
        return (x - math.sqrt(self.abar[t]) * x0) / math.sqrt(1 - self.abar[t])

    def x0_of(self, x: Array, out: Array, t: int) -> Array:
        signal, noise = math.sqrt(self.abar[t]), math.sqrt(1 - self.abar[t])
        return {"epsilon": (x - noise * out) / signal, "sample": out, "v_prediction": signal * x - noise * out}[
            self.prediction
        ]

    def p_mean_variance(
        self,
        model: Function,
        x: Array,
        t: int,
        *,
        denoised_fn: Callable[[Array], Array] = lambda x0: x0,
        clip: bool | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        """Mean, variance, log variance, x0."""
        out = self.ask(model, x, t)
        if self.variance.startswith("learned"):
            out, v = np.split(out, 2, axis=1)
            frac = (v + 1) / 2
            log = v if self.variance == "learned" else frac * np.log(self.betas[t]) + (1 - frac) * self.log_tilde[t]
            variance = np.exp(log)
        elif self.variance == "fixed_large":
            log = np.full_like(x, np.log(self.betas[t]) if t else self.log_tilde[0])
            variance = np.exp(log)
        else:
            mixed = (1 - self.v_posterior) * self.tilde[t] + self.v_posterior * self.betas[t]
            variance = np.full_like(x, mixed)
            log = np.log(variance) if self.v_posterior else np.full_like(x, self.log_tilde[t])
        x0 = denoised_fn(self.x0_of(x, out, t))
        if self.clip if clip is None else clip:
            x0 = np.clip(x0, -1, 1)
        return self.posterior_mean(x0, x, t), variance, log, x0

    def p_sample(
        self, model: Function, x: Array, t: int, z: Array, *, cond_fn: Function | None = None, **how: Any
    ) -> Array:
        mean, variance, log, _ = self.p_mean_variance(model, x, t, **how)
        if cond_fn is not None:
            mean = mean + variance * self.ask(cond_fn, x, t)
        return mean + (np.exp(log / 2) * z if t else 0)

    def ddim_sample(
        self,
        model: Function,
        x: Array,
        t: int,
        z: Array,
        eta: float,
        *,
        cond_fn: Function | None = None,
        **how: Any,
    ) -> Array:
        x0 = self.p_mean_variance(model, x, t, **how)[3]
        if cond_fn is not None:
            score = self.eps_of(x, x0, t) - math.sqrt(1 - self.abar[t]) * self.ask(cond_fn, x, t)
            x0 = (x - math.sqrt(1 - self.abar[t]) * score) / math.sqrt(self.abar[t])
        sigma = eta * math.sqrt((1 - self.prev[t]) / (1 - self.abar[t]) * (1 - self.abar[t] / self.prev[t]))
        mean = math.sqrt(self.prev[t]) * x0 + math.sqrt(1 - self.prev[t] - sigma**2) * self.eps_of(x, x0, t)
        return mean + (sigma * z if t else 0)

    def vb(self, model: Function, x0: Array, x: Array, t: int, *, clip: bool | None = None) -> Array:
        """L_t in bits per dimension, [B]."""
        mean, _, log, _ = self.p_mean_variance(model, x, t, clip=clip)
        if t:
            terms = kl(self.posterior_mean(x0, x, t), self.log_tilde[t], mean, log)
        else:
            terms = -log_likelihood(x0, mean, log / 2)
        return bits(terms)

    def prior(self, x0: Array) -> Array:
        return bits(kl(math.sqrt(self.abar[-1]) * x0, np.log(1 - self.abar[-1]), 0.0, 0.0))

    def target(self, x0: Array, eps: Array, t: int) -> Array:
        v = math.sqrt(self.abar[t]) * eps - math.sqrt(1 - self.abar[t]) * x0
        return {"epsilon": eps, "sample": x0, "v_prediction": v}[self.prediction]

    def training_loss(self, model: Function, x0: Array, t: int, eps: Array, loss: str) -> Array:
        """guided-diffusion's losses, [B]."""
        x = self.q_sample(x0, t, eps)
        if loss.endswith("kl"):
            return self.vb(model, x0, x, t, clip=False) * (len(self.betas) if loss == "rescaled_kl" else 1)
        out = self.ask(model, x, t)
        result = np.zeros(len(x0))
        if self.variance.startswith("learned"):
            out = np.split(out, 2, axis=1)[0]
            result = self.vb(model, x0, x, t, clip=False) * (len(self.betas) / 1000 if loss == "rescaled_mse" else 1)
        return result + ((self.target(x0, eps, t) - out) ** 2).reshape(len(x0), -1).mean(1)

    def lvlb_weights(self) -> Array:
        """Latent diffusion's, with entry 1 in place of entry 0."""
        if self.prediction == "sample":
            weights = 0.5 * np.sqrt(self.abar) / (2.0 * 1 - self.abar)
        else:
            variance = (1 - self.v_posterior) * self.tilde + self.v_posterior * self.betas
            with np.errstate(divide="ignore"):
                weights = self.betas**2 / (2 * variance * self.alphas * (1 - self.abar))
        weights[0] = weights[1]
        return weights


def kl(mean1: Any, log1: Any, mean2: Any, log2: Any) -> Array:
    """KL(N(mean1, e^log1) || N(mean2, e^log2)) in nats."""
    return (np.exp(log1 - log2) - 1 - log1 + log2 + (mean1 - mean2) ** 2 / np.exp(log2)) / 2


def log_likelihood(x: Array, mean: Array, log_std: Array) -> Array:
    """Of a pixel's bin of 256, with the tanh form of the cumulative distribution."""

    def cdf(value: Array) -> Array:
        return (1 + np.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) / 2

    high = np.where(x > 0.999, 1.0, cdf((x + 1 / 255 - mean) / np.exp(log_std)))
    low = np.where(x < -0.999, 0.0, cdf((x - 1 / 255 - mean) / np.exp(log_std)))
    return np.log(np.maximum(high - low, 1e-12))


def bits(nats: Array) -> Array:
    return nats.reshape(len(nats), -1).mean(1) / math.log(2)
