"""What models are trained on: the simple losses, the variational bound, and latent diffusion's sum of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.diffusion.bound import VariationalBound, bound_terms
from stepfusion.diffusion.forward import diffuse
from stepfusion.diffusion.model_calls import LEARNED, Model, Step, split
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.diffusion.reverse import ReverseProcess, evaluate, moments
from stepfusion.kernels import launch

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}
VARIATIONAL_LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


class TrainingLosses(VariationalBound):
    """The losses of a model that is trained for a reverse process."""

    @property
    def lvlb_weights(self) -> NDArray[np.float64]:
        """Latent diffusion's weights of the variational loss, float64 [T], entry 1 in place of entry 0.

        For "epsilon" beta^2 / (2 sigma^2 alpha (1 - abar)), sigma^2 with ``v_posterior`` in it; for "sample" its
        code's sqrt(abar) / 2 / (2 - abar); for "v_prediction" 1. With zero terminal SNR the last of "epsilon" is inf.
        """
        s = self.schedule
        if len(s.betas) < 2:
            raise ValueError("lvlb_weights needs a schedule of at least 2 timesteps, got 1")
        weights = np.ones(len(s.betas))
        if self.prediction == "sample":
            weights = 0.5 * np.sqrt(s.alphas_cumprod) / (2 - s.alphas_cumprod)
        elif self.prediction == "epsilon":
            variance = (1 - self.v_posterior) * s.posterior_variance + self.v_posterior * s.betas
            variance[0] = np.inf  # replaced below
            with np.errstate(divide="ignore"):
                weights = s.betas**2 / (2 * variance * s.alphas * (1 - s.alphas_cumprod))
        weights[0] = weights[1]
        return weights

    def training_losses(
        self,
        model: Model,
        x_start: torch.Tensor,
        t: torch.Tensor,
        *,
        loss: str = "l2",
        min_snr_gamma: float | None = None,
        noise: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """The loss of each image, float32 [B], differentiable in the model.

        Args:
            x_start: [B, ...] in [-1, 1]. t: int64 [B].
            loss: "l1", "l2" (Ho et al. 2020, equation 14) or "huber", against the target that the prediction type
                says: eps, x0 or v; a learned variance is not trained by these. Or guided-diffusion's, whose
                ``variance`` may be learned: "mse" is l2, plus with a learned variance the variational bound in bits
                per dimension, which teaches the variance alone; "rescaled_mse" takes T / 1000 of the bound (Nichol &
                Dhariwal 2021, equation 16); "kl" is the bound alone, "rescaled_kl" T times it.
            min_snr_gamma: weight by min(snr, gamma) over the weight that the target implies (Hang et al. 2023); None
                for equal weights.
            noise, or seeds and indices: as for :meth:`q_sample`.
        """
        _checks.choice("loss", loss, (*LOSSES, *VARIATIONAL_LOSSES))
        if min_snr_gamma is not None:
            min_snr_gamma = _checks.number("min_snr_gamma", min_snr_gamma, 0.0, open_low=True)
            if loss in VARIATIONAL_LOSSES:
                raise ValueError(
                    f"min_snr_gamma weights the losses {', '.join(map(repr, LOSSES))}, got loss {loss!r}"
                )
        with_bound = loss in ("kl", "rescaled_kl") or (loss in VARIATIONAL_LOSSES and self.variance in LEARNED)
        if with_bound and self.prediction == "epsilon":
            self.tables.check(t, x_start, "x_start")
            self.tables.check_signal(t)
        x_t, noise = diffuse(self, x_start, t, NoiseSource(noise, seeds, indices))
        out = evaluate(self, model, x_t, t, model_kwargs)
        if loss in ("kl", "rescaled_kl"):
            bound = bound_terms(self, moments(self, out, x_t, t, clipped=False), x_start, x_t, t)
            return bound * self.num_timesteps if loss == "rescaled_kl" else bound
        predicted, v = split(out, self.variance)
        losses = _errors(self, predicted, x_start, t, noise, loss)
        if with_bound and v is not None:
            frozen = torch.cat((predicted.detach(), v), dim=1)
            bound = bound_terms(self, moments(self, frozen, x_t, t, clipped=False), x_start, x_t, t)
            losses = losses + (bound * (self.num_timesteps / 1000) if loss == "rescaled_mse" else bound)
        if min_snr_gamma is None:
            return losses
        return losses * _min_snr_weight(self.prediction, self.tables.gather("snr", t), min_snr_gamma)

    def p_losses(
        self,
        model: Model,
        x_start: torch.Tensor,
        t: torch.Tensor,
        *,
        loss: str = "l2",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        noise: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Step:
        """Latent diffusion's loss of a batch: ``loss``, ``loss_simple`` and ``loss_vlb``, each float32 [].

        ``loss_simple`` is the mean error, ``loss_vlb`` the mean of the errors weighted by :attr:`lvlb_weights`, and
        ``loss`` is l_simple_weight loss_simple + original_elbo_weight loss_vlb (Rombach et al. 2022, its code). An
        infinite weight (zero terminal SNR) is refused unless ``original_elbo_weight`` is 0, which leaves it out.
        """
        _checks.choice("loss", loss, ("l1", "l2"))
        simple = _checks.number("l_simple_weight", l_simple_weight, 0.0)
        elbo = _checks.number("original_elbo_weight", original_elbo_weight, 0.0)
        self.tables.check(t, x_start, "x_start")
        weights = launch.gather(torch.from_numpy(self.lvlb_weights).to(t.device, torch.float32), t)
        if elbo and t.device.type == "cpu" and bool(weights.isinf().any()):
            raise ValueError(
                f"original_elbo_weight must be 0 for t = {int(t[weights.isinf()][0])}, where the signal is zero and "
                f"the weight of the bound infinite (zero terminal SNR), got {elbo:g}"
            )
        _, noise = diffuse(self, x_start, t, NoiseSource(noise, seeds, indices))
        errors = self.training_losses(model, x_start, t, loss=loss, noise=noise, **model_kwargs)
        loss_simple = errors.mean()
        loss_vlb = torch.where(errors == 0, errors, weights * errors).mean()  # no error has no weight, not even inf
        total = simple * loss_simple
        return {
            "loss": total + elbo * loss_vlb if elbo else total,
            "loss_simple": loss_simple,
            "loss_vlb": loss_vlb,
        }


def _errors(
    process: ReverseProcess,
    out: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    loss: str,
) -> torch.Tensor:
    """The mean error of each image's prediction, [B]."""
    function = LOSSES.get(loss, F.mse_loss)
    errors = function(out.to(torch.float32), _target(process, x_start, t, noise), reduction="none")
    return errors.flatten(1).mean(1)


def _target(process: ReverseProcess, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model should have returned, float32 [B, ...]."""
    if process.prediction == "v_prediction":
        return process.predict_v(x_start, t, noise)
    return (noise if process.prediction == "epsilon" else x_start).to(torch.float32)


def _min_snr_weight(prediction: str, snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(snr, gamma) over the weight of x0's error that the target implies: snr, 1 or snr + 1."""
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return snr.clamp(max=gamma) / (1.0 if prediction == "sample" else snr + 1.0)
