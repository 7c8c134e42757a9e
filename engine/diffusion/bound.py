"""The variational bound of -log p(x_0), term by term (Ho et al. 2020, equation 5)."""

from __future__ import annotations

import math
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.diffusion.forward import diffuse
from stepfusion.diffusion.gaussians import discretized_gaussian_log_likelihood, normal_kl
from stepfusion.diffusion.model_calls import Model, Step
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.diffusion.reverse import ReverseProcess
from stepfusion.kernels import launch
from stepfusion.lanes.runner import as_int64


class VariationalBound(ReverseProcess):
    """How well a model's reverse process codes images, in bits per dimension."""

    def prior_bpd(self, x_start: torch.Tensor) -> torch.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) of each image in bits per dimension, float32 [B] (Ho et al. 2020, L_T)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, dtype=torch.int64, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros((), dtype=torch.float32, device=x_start.device)
        return _bits(normal_kl(mean, log_variance, zero, zero))

    def vb_terms_bpd(
        self, model: Model, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> Step:
        """The term L_t of the variational bound in bits per dimension: ``output`` [B], and ``pred_xstart`` [B, ...].

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 -log p(x_0 | x_1) of discrete pixels (Ho et al.
        2020, equations 5 and 13). ``x_start`` and ``x_t``: [B, ...], x_0 in [-1, 1].
        """
        parts = self.p_mean_variance(model, x_t, t, **model_kwargs)
        return {"output": bound_terms(self, parts, x_start, x_t, t), "pred_xstart": parts["pred_xstart"]}

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        first_index: int = 0,
        **model_kwargs: Any,
    ) -> Step:
        """The variational bound of each image in bits per dimension, term by term (Nichol & Dhariwal 2021).

        Args:
            x_start: [B, ...] in [-1, 1], from uint8 pixels.
            noise: [T, B, ...], the eps with which the timesteps T - 1, ..., 0 are reached; by default drawn from
                ``seed`` for the images ``first_index``, ``first_index`` + 1, ...

        Returns:
            float32: ``total_bpd`` [B]; ``prior_bpd`` [B]; and, timesteps from T - 1 to 0, ``vb`` [B, T],
            ``xstart_mse`` [B, T], the mean squared error of the predicted x_0, and ``mse`` [B, T], that of its eps.
        """
        launch.check_lanes("x_start", x_start)
        batch, device = len(x_start), x_start.device
        seed = _checks.integer("seed", seed, 0, (1 << 64) - 1)
        first_index = _checks.integer("first_index", first_index, 0, (1 << 32) - batch)
        if noise is not None:
            launch.check_like("noise", noise, (self.num_timesteps, *x_start.shape), device)
        if self.prediction == "epsilon":
            self.tables.check_signal(torch.tensor([self.num_timesteps - 1], device="cpu"))
        seeds = torch.full((batch,), as_int64(seed), dtype=torch.int64, device=device)
        indices = torch.arange(first_index, first_index + batch, device=device)
        terms: dict[str, list[torch.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for row, timestep in enumerate(range(self.num_timesteps - 1, -1, -1)):
            t = torch.full_like(indices, timestep)
            source = NoiseSource(None, seeds, indices) if noise is None else NoiseSource(noise[row])
            x_t, eps = diffuse(self, x_start, t, source)
            step = self.vb_terms_bpd(model, x_start, x_t, t, **model_kwargs)
            x0 = step["pred_xstart"]
            terms["vb"].append(step["output"])
            terms["xstart_mse"].append(((x0 - x_start) ** 2).flatten(1).mean(1))
            terms["mse"].append(((self.predict_eps_from_x0(x_t, t, x0) - eps) ** 2).flatten(1).mean(1))
        stacked = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        prior = self.prior_bpd(x_start)
        return {"total_bpd": stacked["vb"].sum(1) + prior, "prior_bpd": prior, **stacked}


def bound_terms(
    process: ReverseProcess, parts: Step, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """L_t of the variational bound in bits per dimension, [B], of what ``p_mean_variance`` returned for x_t and t."""
    x_start = x_start.to(torch.float32)
    mean, _, log_variance = process.q_posterior_mean_variance(x_start, x_t.to(torch.float32), t)
    divergence = _bits(normal_kl(mean, log_variance, parts["mean"], parts["log_variance"]))
    log_scales = 0.5 * parts["log_variance"]
    likelihood = discretized_gaussian_log_likelihood(x_start, means=parts["mean"], log_scales=log_scales)
    return torch.where(t == 0, -_bits(likelihood), divergence)


def _bits(nats: torch.Tensor) -> torch.Tensor:
    """Nats of elements [B, ...] as bits per dimension [B]."""
    return nats.flatten(1).mean(1) / math.log(2)
