"""Gaussian diffusion under the literature's names, for code written against them.

The names and shapes are those of Ho et al. 2020 and the code that followed it: every method takes batched timesteps
t, int64 [B], and tensors [B, ...] in float16, bfloat16 or float32. Whole loops over a table are
:class:`stepfusion.Engine`'s; the loops here are for research code that wants a method a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stepfusion import _checks, kernels, samplers
from stepfusion.diffusion.gaussians import discretized_gaussian_log_likelihood, normal_kl
from stepfusion.execution.plan import choose_device, make_plan
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.lanes.runner import as_int64
from stepfusion.samplers import timesteps as spacing_rules
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import DeviceTable, StepTable

Model = Callable[..., torch.Tensor]
Condition = Callable[..., torch.Tensor]
Step = dict[str, torch.Tensor]

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}
VARIATIONAL_LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")
_POSTERIOR = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped")
_LEARNED = ("learned", "learned_range")


class GaussianDiffusion:
    """The forward process, its posterior, the reverse process and the losses of one schedule.

    Args:
        schedule: the noise schedule.
        prediction: what the model returns: "epsilon", "sample" (x0) or "v_prediction".
        variance: "fixed_small", "fixed_large", or with a model that returns twice the channels "learned" (the second
            half is the log variance) or "learned_range" (its place between the two; Nichol & Dhariwal 2021, eq. 15).
        clip: the bound of the predicted |x0|, or None.
        v_posterior: with "fixed_small", the weight of beta in a variance (1 - v) beta-tilde + v beta (latent
            diffusion's; Rombach et al. 2022).
        backend: "auto", "triton" or "reference", decided for each tensor's device.

    Models are callables ``model(x, t, **model_kwargs)``, and so are the conditions ``cond_fn`` that guide sampling,
    which return the gradient of log p(y | x) with respect to x, [B, ...] (Dhariwal & Nichol 2021, section 4).
    ``denoised_fn`` maps every predicted x0 [B, ...] before the clip. A step without these two is one fused step; with
    them, the fused step follows what they do.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction: str = "epsilon",
        variance: str = "fixed_small",
        clip: float | None = 1.0,
        v_posterior: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        self.schedule = schedule
        self.prediction = _checks.choice("prediction", prediction, algebra.PREDICTIONS)
        self.variance = _checks.choice("variance", variance, algebra.VARIANCES)
        self.clip = None if clip is None else _checks.number("clip", clip, 0.0, open_low=True)
        self.v_posterior = _checks.number("v_posterior", v_posterior, 0.0, 1.0)
        if self.v_posterior and self.variance != "fixed_small":
            raise ValueError(f"v_posterior must be 0 with variance {variance!r}, got {v_posterior:g}")
        self.backend = _checks.choice("backend", backend, ("auto", "triton", "reference"))
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._step_tables: dict[str, StepTable] = {}
        self._device_tables: dict[tuple[int, torch.device], DeviceTable] = {}
        self._backends: dict[torch.device, ModuleType] = {}
        self._timestep_map: torch.Tensor | None = None

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.schedule.num_timesteps

    @property
    def lvlb_weights(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Latent diffusion's weights of the variational loss, float64 [T], entry 1 in place of entry 0.

        For "epsilon" beta^2 / (2 sigma^2 alpha (1 - abar)), sigma^2 with :attr:`v_posterior` in it; for "sample" its
        code's sqrt(abar) / 2 / (2 - abar); for "v_prediction" 1.
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
            weights = s.betas**2 / (2 * variance * s.alphas * (1 - s.alphas_cumprod))
        weights[0] = weights[1]
        return weights

    def respaced(self, timesteps: Sequence[int] | str) -> GaussianDiffusion:
        """This diffusion over a subsequence of its timesteps, whose own t counts from 0 to K - 1.

        ``timesteps`` is a strictly decreasing list or, as guided-diffusion writes it, "250" or "ddim25"
        (:func:`stepfusion.samplers.timesteps.sections`). Models and conditions are told this diffusion's timesteps.
        Source: Nichol & Dhariwal 2021, section 4.
        """
        visits = spacing_rules.given(self.num_timesteps, timesteps)[::-1].copy()
        abar = self.schedule.alphas_cumprod[visits]
        schedule = NoiseSchedule.from_betas(1 - abar / np.append(1.0, abar[:-1]))
        spaced = GaussianDiffusion(
            schedule,
            prediction=self.prediction,
            variance=self.variance,
            clip=self.clip,
            v_posterior=self.v_posterior,
            backend=self.backend,
        )
        told = torch.from_numpy(visits)
        spaced._timestep_map = told if self._timestep_map is None else self._timestep_map[told]
        return spaced

    # The forward process

    def q_mean_variance(
        self, x_start: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean [B, ...], variance and log variance [B, 1, ...], float32, of q(x_t | x_0).

        Source: Ho et al. 2020, equation 4.
        """
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start.to(torch.float32)
        scale = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return mean, scale**2, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        *,
        seeds: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_t ~ q(x_t | x_0), in the dtype of x_start.

        From the given noise [B, ...], or the counter-based noise of (seeds, t, indices).
        """
        return self._q_sample(x_start, t, noise, seeds, indices)[0]

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean [B, ...], variance and clipped log variance [B, 1, ...] of q(x_{t-1} | x_t, x_0).

        Source: Ho et al. 2020, equations 6 and 7.
        """
        self._check_t(t, x_t, "x_t")
        tables = [self._table(name, x_t.device) for name in _POSTERIOR]
        return self._ops(x_t.device).q_posterior_mean_variance(x_start, x_t, t, *tables)  # type: ignore[no-any-return]

    # Changes of prediction type

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps, float32 [B, ...]."""
        return self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t.to(torch.float32) - self._at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        ) * noise.to(torch.float32)

    def predict_start_from_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x0 = sqrt(abar) x_t - sqrt(1 - abar) v, float32 [B, ...] (Salimans & Ho 2022, appendix D)."""
        return self._at("sqrt_alphas_cumprod", t, x_t) * x_t.to(torch.float32) - self._at(
            "sqrt_one_minus_alphas_cumprod", t, x_t
        ) * v.to(torch.float32)

    def predict_eps_from_x0(self, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """eps = (x_t / sqrt(abar) - x0) / sqrt(1 / abar - 1), float32 [B, ...]."""
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t.to(torch.float32)
        return (scaled - x0.to(torch.float32)) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    # The reverse process

    def p_mean_variance(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        *,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **model_kwargs: Any,
    ) -> Step:
        """One look at the model: ``mean``, ``variance``, ``log_variance`` and ``pred_xstart``, each float32 [B, ...].

        The first three are those of p(x_{t-1} | x_t).
        At t = 0 the log variance is that of t = 1, as in Ho et al.'s code, where fixed_small's variance is 0.
        """
        self._check_t(t, x)
        return self._mean_variance(self._ask(model, x, t, model_kwargs), x, t, denoised_fn)

    def condition_mean(
        self, cond_fn: Condition, p_mean_var: Step, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> torch.Tensor:
        """The mean of p(x_{t-1} | x_t, y), float32 [B, ...]: that of ``p_mean_var`` plus variance times gradient.

        Source: Dhariwal & Nichol 2021, algorithm 1.
        """
        self._check_t(t, x)
        return p_mean_var["mean"] + p_mean_var["variance"] * self._gradient(cond_fn, x, t, model_kwargs)

    def condition_score(
        self, cond_fn: Condition, p_mean_var: Step, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> Step:
        """``p_mean_var`` with the ``mean`` and ``pred_xstart`` of the score of p(x_t | y).

        eps - sqrt(1 - abar) gradient takes the place of the eps of ``pred_xstart``, which is not clipped again.
        Source: Dhariwal & Nichol 2021, algorithm 2; Song et al. 2020.
        """
        self._check_t(t, x)
        eps = self.predict_eps_from_x0(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * self._gradient(cond_fn, x, t, model_kwargs)
        x0 = self.predict_start_from_noise(x, t, eps)
        return {**p_mean_var, "pred_xstart": x0, "mean": self._posterior_mean(x0, x, t)}

    def p_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        *,
        cond_fn: Condition | None = None,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        repeat_noise: bool = False,
        noise: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Step:
        """One ancestral step from t to t - 1: ``sample`` and ``pred_xstart``, float32 [B, ...]; no noise at t = 0.

        Args:
            cond_fn: guide by :meth:`condition_mean`.
            denoised_fn: as in the class.
            repeat_noise: every image gets the noise of the first one.
            noise, or seeds and indices: the z, [B, ...], or what to draw it by, int64 [B].
        """
        given = cond_fn is not None or denoised_fn is not None
        table = self._ddpm_table(given)
        self._check_step(table, x, t, noise, seeds, indices)
        if _checks.boolean("repeat_noise", repeat_noise):
            noise, seeds, indices = (_repeated(value) for value in (noise, seeds, indices))
        out, shift = self._ask(model, x, t, model_kwargs), None
        if given:
            parts = self._mean_variance(out, x, t, denoised_fn)
            if cond_fn is not None:
                shift = parts["variance"] * self._gradient(cond_fn, x, t, model_kwargs)
            out = (
                torch.cat((parts["pred_xstart"], *out.to(torch.float32).chunk(2, dim=1)[1:]), dim=1)
                if self.variance in _LEARNED
                else parts["pred_xstart"]
            )
        step = self._step(table, self.num_timesteps - 1 - t, out, x, noise, seeds, indices)
        return step if shift is None else {**step, "sample": step["sample"] + shift}

    def ddim_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        *,
        eta: float = 0.0,
        cond_fn: Condition | None = None,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Step:
        """One DDIM step from t to t - 1: ``sample`` and ``pred_xstart``, float32 [B, ...].

        ``cond_fn`` guides by :meth:`condition_score`; the rest as for :meth:`p_sample`. Source: Song et al. 2021,
        equation 12.
        """
        given = cond_fn is not None or denoised_fn is not None
        table = self._ddim_table(eta, given)
        self._check_step(table, x, t, noise, seeds, indices)
        out = self._ask(model, x, t, model_kwargs)
        if given:
            parts = self._mean_variance(out, x, t, denoised_fn)
            if cond_fn is not None:
                parts = self.condition_score(cond_fn, parts, x, t, **model_kwargs)
            out = parts["pred_xstart"]
        return self._step(table, self.num_timesteps - 1 - t, out, x, noise, seeds, indices)

    def ddim_reverse_sample(self, model: Model, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any) -> Step:
        """One DDIM step up, from t to t + 1 for t < T - 1: ``sample`` and ``pred_xstart``, float32 [B, ...].

        The model is evaluated at t.
        """
        self._check_t(t, x, last=self.num_timesteps - 2)
        table = self._step_table("ddim reverse", self._reverse_table)
        return self._step(table, t, self._ask(model, x, t, model_kwargs), x, None, None, None)

    def p_sample_loop(self, model: Model, shape: tuple[int, ...], **arguments: Any) -> torch.Tensor:
        """The last sample of :meth:`p_sample_loop_progressive`, float32 ``shape``."""
        return self._last(self.p_sample_loop_progressive(model, shape, **arguments))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        steps: int | None = None,
        timesteps: Sequence[int] | str | None = None,
        cond_fn: Condition | None = None,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        repeat_noise: bool = False,
        start: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        **model_kwargs: Any,
    ) -> Iterator[Step]:
        """Ancestral sampling: yields ``sample`` and ``pred_xstart``, float32 ``shape``, after every step.

        Args:
            shape: [B, ...].
            steps: visit a leading subsequence of so many timesteps; all by default.
            timesteps: or these, as for :meth:`respaced`.
            cond_fn, denoised_fn, repeat_noise: as for :meth:`p_sample`.
            start: [B, ...], the state to start from; by default drawn from ``seed``, in [0, 2**64).
            noise: [steps, B, ...], the z of every step; by default drawn from ``seed``.
            device: where the loop runs.
        """
        options = {**self._options(), "variance": self.variance, "v_posterior": self.v_posterior}
        table = samplers.ddpm(self.schedule, steps, timesteps=timesteps, **options)
        repeat_noise = _checks.boolean("repeat_noise", repeat_noise)

        def hooked(spaced: GaussianDiffusion, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> Step:
            return spaced.p_sample(model, x, t, cond_fn=cond_fn, denoised_fn=denoised_fn, noise=z, **model_kwargs)

        hook = None if cond_fn is None and denoised_fn is None else hooked
        return self._loop(table, hook, model, shape, start, noise, seed, device, repeat_noise, model_kwargs)

    def p_sample_loop_intermediates(
        self, model: Model, shape: tuple[int, ...], *, log_every_t: int = 100, **arguments: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last sample of ancestral sampling over all timesteps, and intermediates, as latent diffusion logs them.

        The intermediates are the samples after t = T - 1 and after every t that ``log_every_t`` divides, each float32
        ``shape``. ``arguments`` are those of :meth:`p_sample_loop_progressive` without ``steps`` and ``timesteps``.
        """
        log_every_t = _checks.integer("log_every_t", log_every_t, 1, 1 << 31)
        for name in ("steps", "timesteps"):
            if name in arguments:
                raise TypeError(f"{name} cannot be given: intermediates are those of all timesteps")
        intermediates: list[torch.Tensor] = []
        steps = self.p_sample_loop_progressive(model, shape, **arguments)
        for t, step in zip(range(self.num_timesteps - 1, -1, -1), steps, strict=True):
            if t % log_every_t == 0 or t == self.num_timesteps - 1:
                intermediates.append(step["sample"])
        return step["sample"], intermediates

    def ddim_sample_loop(self, model: Model, shape: tuple[int, ...], **arguments: Any) -> torch.Tensor:
        """The last sample of :meth:`ddim_sample_loop_progressive`, float32 ``shape``."""
        return self._last(self.ddim_sample_loop_progressive(model, shape, **arguments))

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        steps: int | None = None,
        timesteps: Sequence[int] | str | None = None,
        eta: float = 0.0,
        cond_fn: Condition | None = None,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        start: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        **model_kwargs: Any,
    ) -> Iterator[Step]:
        """DDIM sampling; arguments and results as for :meth:`p_sample_loop_progressive`."""
        table = samplers.ddim(self.schedule, steps, timesteps=timesteps, eta=eta, **self._options())

        def hooked(spaced: GaussianDiffusion, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> Step:
            return spaced.ddim_sample(
                model, x, t, eta=eta, cond_fn=cond_fn, denoised_fn=denoised_fn, noise=z, **model_kwargs
            )

        hook = None if cond_fn is None and denoised_fn is None else hooked
        return self._loop(table, hook, model, shape, start, noise, seed, device, False, model_kwargs)

    # Training

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
        x_t, noise = self._q_sample(x_start, t, noise, seeds, indices)
        out = self._ask(model, x_t, t, model_kwargs)
        if loss in ("kl", "rescaled_kl"):
            bound = self._vb_terms(self._mean_variance(out, x_t, t, None, clipped=False), x_start, x_t, t)
            return bound * self.num_timesteps if loss == "rescaled_kl" else bound
        losses = self._errors(out, x_start, t, noise, loss)
        if loss in VARIATIONAL_LOSSES and self.variance in _LEARNED:
            predicted, v = out.chunk(2, dim=1)
            frozen = torch.cat((predicted.detach(), v), dim=1)
            bound = self._vb_terms(self._mean_variance(frozen, x_t, t, None, clipped=False), x_start, x_t, t)
            losses = losses + (bound * (self.num_timesteps / 1000) if loss == "rescaled_mse" else bound)
        if min_snr_gamma is None:
            return losses
        return losses * self._min_snr_weight(launch.gather(self._table("snr", t.device), t), min_snr_gamma)

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
        ``loss`` is l_simple_weight loss_simple + original_elbo_weight loss_vlb (Rombach et al. 2022, its code).
        """
        _checks.choice("loss", loss, ("l1", "l2"))
        simple = _checks.number("l_simple_weight", l_simple_weight, 0.0)
        elbo = _checks.number("original_elbo_weight", original_elbo_weight, 0.0)
        _, noise = self._q_sample(x_start, t, noise, seeds, indices)
        errors = self.training_losses(model, x_start, t, loss=loss, noise=noise, **model_kwargs)
        weights = torch.from_numpy(self.lvlb_weights).to(t.device, torch.float32)
        loss_simple, loss_vlb = errors.mean(), (launch.gather(weights, t) * errors).mean()
        return {
            "loss": simple * loss_simple + elbo * loss_vlb,
            "loss_simple": loss_simple,
            "loss_vlb": loss_vlb,
        }

    # Likelihood

    def prior_bpd(self, x_start: torch.Tensor) -> torch.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) of each image in bits per dimension, float32 [B] (Ho et al. 2020, L_T)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, dtype=torch.int64, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros((), device=x_start.device)
        return _bits(normal_kl(mean, log_variance, zero, zero))

    def vb_terms_bpd(
        self, model: Model, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> Step:
        """The term L_t of the variational bound in bits per dimension: ``output`` [B], and ``pred_xstart`` [B, ...].

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 -log p(x_0 | x_1) of discrete pixels (Ho et al.
        2020, equations 5 and 13). ``x_start`` and ``x_t``: [B, ...], x_0 in [-1, 1].
        """
        parts = self.p_mean_variance(model, x_t, t, **model_kwargs)
        return {"output": self._vb_terms(parts, x_start, x_t, t), "pred_xstart": parts["pred_xstart"]}

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
        seeds = torch.full((batch,), as_int64(seed), dtype=torch.int64, device=device)
        indices = torch.arange(first_index, first_index + batch, device=device)
        terms: dict[str, list[torch.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for row, timestep in enumerate(range(self.num_timesteps - 1, -1, -1)):
            t = torch.full_like(indices, timestep)
            source = (None, seeds, indices) if noise is None else (noise[row], None, None)
            x_t, eps = self._q_sample(x_start, t, *source)
            step = self.vb_terms_bpd(model, x_start, x_t, t, **model_kwargs)
            x0 = step["pred_xstart"]
            terms["vb"].append(step["output"])
            terms["xstart_mse"].append(((x0 - x_start) ** 2).flatten(1).mean(1))
            terms["mse"].append(((self.predict_eps_from_x0(x_t, t, x0) - eps) ** 2).flatten(1).mean(1))
        stacked = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        prior = self.prior_bpd(x_start)
        return {"total_bpd": stacked["vb"].sum(1) + prior, "prior_bpd": prior, **stacked}

    # Inside

    def _min_snr_weight(self, snr: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(snr, gamma) over the weight of x0's error that the target implies: snr, 1 or snr + 1."""
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (1.0 if self.prediction == "sample" else snr + 1.0)

    def _ask(
        self, model: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Call a model or condition with the timestep that it knows."""
        if self._timestep_map is not None:
            t = self._timestep_map.to(t.device)[t]
        return model(x, t, **kwargs)

    def _gradient(self, cond_fn: Condition, x: torch.Tensor, t: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        gradient = self._ask(cond_fn, x, t, kwargs)
        if not isinstance(gradient, torch.Tensor) or gradient.shape != x.shape:
            given = list(gradient.shape) if isinstance(gradient, torch.Tensor) else type(gradient).__name__
            raise ValueError(f"cond_fn must return shape {list(x.shape)}, got {given}")
        return gradient.to(torch.float32)

    def _errors(
        self, out: torch.Tensor, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, loss: str
    ) -> torch.Tensor:
        """The mean error of each image's prediction, [B]."""
        if self.variance in _LEARNED:
            out = out.chunk(2, dim=1)[0]
        target = self._target(x_start, t, noise)
        if out.shape != target.shape:
            raise ValueError(f"the model must return shape {list(target.shape)}, got {list(out.shape)}")
        function = LOSSES.get(loss, F.mse_loss)
        return function(out.to(torch.float32), target, reduction="none").flatten(1).mean(1)

    def _vb_terms(self, parts: Step, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """L_t of the variational bound, [B], in bits per dimension."""
        x_start = x_start.to(torch.float32)
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t.to(torch.float32), t)
        divergence = _bits(normal_kl(mean, log_variance, parts["mean"], parts["log_variance"]))
        likelihood = discretized_gaussian_log_likelihood(
            x_start, means=parts["mean"], log_scales=0.5 * parts["log_variance"]
        )
        return torch.where(t == 0, -_bits(likelihood), divergence)

    def _posterior_mean(self, x0: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The mean of q(x_{t-1} | x_t, x_0), by the reference where a gradient has to pass: kernels have none."""
        ops = kernels.reference if x0.requires_grad else self._ops(x.device)
        tables = [self._table(name, x.device) for name in _POSTERIOR]
        mean: torch.Tensor = ops.q_posterior_mean_variance(x0, x.to(torch.float32), t, *tables)[0]
        return mean

    def _ddpm_table(self, x0_given: bool) -> StepTable:
        """All single ancestral steps, from the model's output or from an x0 that is final."""
        options = {**self._options(x0_given), "variance": self.variance, "v_posterior": self.v_posterior}
        return self._step_table(f"ddpm {x0_given}", lambda: samplers.ddpm(self.schedule, **options))

    def _ddim_table(self, eta: float, x0_given: bool) -> StepTable:
        return self._step_table(
            f"ddim {eta} {x0_given}", lambda: samplers.ddim(self.schedule, eta=eta, **self._options(x0_given))
        )

    def _options(self, x0_given: bool = False) -> dict[str, Any]:
        if x0_given:
            return {"prediction": "sample", "clip": None}
        return {"prediction": self.prediction, "clip": self.clip}

    def _step_table(self, name: str, make: Callable[[], StepTable]) -> StepTable:
        """A table of all single steps, made once."""
        if name not in self._step_tables:
            self._step_tables[name] = make()
        return self._step_tables[name]

    def _on(self, table: StepTable, device: torch.device) -> DeviceTable:
        """One of the single-step tables on a device, uploaded once."""
        key = (id(table), device)
        if key not in self._device_tables:
            self._device_tables[key] = table.on(device)
        return self._device_tables[key]

    def _reverse_table(self) -> StepTable:
        """Row t goes from t to t + 1, the model evaluated at t."""
        abar, abar_next = self.schedule.alphas_cumprod[:-1], self.schedule.alphas_cumprod[1:]
        columns = algebra.ddim_inversion(abar, abar_next, abar, prediction=self.prediction)
        columns["clip"] = np.full(len(abar), np.inf)
        timesteps = np.arange(len(abar), dtype=np.int64)
        return StepTable.from_columns("ddim reverse", self.prediction, self.schedule, timesteps, columns)

    def _ops(self, device: torch.device) -> ModuleType:
        """The module whose functions run on this device: the fused ones or the reference."""
        if device not in self._backends:
            self._backends[device] = make_plan(device, "float32", self.backend, "eager").ops
        return self._backends[device]

    def _table(self, name: str, device: torch.device) -> torch.Tensor:
        """A table of the schedule on a device, float32 [T]."""
        if (name, device) not in self._tables:
            values = torch.from_numpy(np.array(getattr(self.schedule, name)))
            self._tables[name, device] = values.to(device, torch.float32)
        return self._tables[name, device]

    def _at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A table's entries at t, [B, 1, ...]."""
        self._check_t(t, like)
        return launch.per_lane(launch.gather(self._table(name, like.device), t), like)

    def _check_t(self, t: torch.Tensor, like: torch.Tensor, name: str = "x", *, last: int | None = None) -> None:
        """TypeError or ValueError unless t is int64 [B] in range.

        On a device the range is not looked at (a t outside it gives NaN).
        """
        launch.check_lanes(name, like, (*launch.FLOATS, torch.float64))
        launch.check_like("t", t, (len(like),), like.device, (torch.int64,))
        last = self.num_timesteps - 1 if last is None else last
        if t.device.type == "cpu" and len(t) and not (int(t.min()) >= 0 and int(t.max()) <= last):
            raise ValueError(f"t must lie in [0, {last}], got {int(t.min())} to {int(t.max())}")

    def _q_sample(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None,
        seeds: torch.Tensor | None,
        indices: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_t(t, x_start, "x_start")
        tables = [self._table(name, t.device) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")]
        function = self._ops(t.device).q_sample
        return function(x_start, t, *tables, noise=noise, seeds=seeds, indices=indices)  # type: ignore[no-any-return]

    def _target(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        x_start, noise = x_start.to(torch.float32), noise.to(torch.float32)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x_start
        signal, scale = self._at("sqrt_alphas_cumprod", t, noise), self._at("sqrt_one_minus_alphas_cumprod", t, noise)
        return signal * noise - scale * x_start

    def _mean_variance(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None,
        *,
        clipped: bool = True,
    ) -> Step:
        """What :meth:`p_mean_variance` returns, from what the model returned."""
        x = x.to(torch.float32)
        out = out.to(torch.float32)
        small, large = self._at("posterior_log_variance_clipped", t, x), self._at("betas", t, x).log()
        if self.variance in _LEARNED:
            out, v = out.chunk(2, dim=1)
            log_variance = v if self.variance == "learned" else small + (v * 0.5 + 0.5) * (large - small)
            variance = log_variance.exp()
        elif self.variance == "fixed_large":
            log_variance = torch.where(launch.per_lane(t, x) == 0, small, large)
            variance = log_variance.exp()
        else:
            variance, log_variance = self._at("posterior_variance", t, x), small
            if self.v_posterior:
                variance = (1 - self.v_posterior) * variance + self.v_posterior * self._at("betas", t, x)
                log_variance = variance.log()
        if out.shape != x.shape:
            raise ValueError(f"the model must return an x0, eps or v of shape {list(x.shape)}, got {list(out.shape)}")
        if self.prediction == "epsilon":
            x0 = self.predict_start_from_noise(x, t, out)
        else:
            x0 = out if self.prediction == "sample" else self.predict_start_from_v(x, t, out)
        if denoised_fn is not None:
            x0 = denoised_fn(x0).to(torch.float32)
            if x0.shape != x.shape:
                raise ValueError(f"denoised_fn must return shape {list(x.shape)}, got {list(x0.shape)}")
        if clipped and self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        return {
            "mean": self._posterior_mean(x0, x, t),
            "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x),
            "pred_xstart": x0,
        }

    def _check_step(
        self,
        table: StepTable,
        x: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None,
        seeds: torch.Tensor | None,
        indices: torch.Tensor | None,
    ) -> None:
        """TypeError or ValueError before the model is asked anything."""
        self._check_t(t, x)
        if noise is None and seeds is None and table.stochastic:
            raise ValueError("this step adds noise: give noise, or seeds and indices")
        launch.check_source(noise, seeds, indices, x)

    def _step(
        self,
        table: StepTable,
        rows: torch.Tensor,
        out: torch.Tensor,
        x: torch.Tensor,
        noise: torch.Tensor | None,
        seeds: torch.Tensor | None,
        indices: torch.Tensor | None,
    ) -> Step:
        """Every lane one row of ``table`` on, the state in float32."""
        state = x.to(torch.float32)
        x0 = torch.empty_like(state, memory_format=torch.contiguous_format)
        on_device = self._on(table, x.device)
        sample = self._ops(x.device).diffusion_step(
            state,
            out,
            rows,
            on_device.coefficients,
            on_device.timesteps,
            noise=noise,
            seeds=seeds,
            indices=indices,
            x0=x0,
        )
        return {"sample": sample, "pred_xstart": x0}

    @torch.no_grad()
    def _loop(
        self,
        table: StepTable,
        hooked: Callable[[GaussianDiffusion, torch.Tensor, torch.Tensor, torch.Tensor], Step] | None,
        model: Model,
        shape: tuple[int, ...],
        start: torch.Tensor | None,
        noise: torch.Tensor | None,
        seed: int,
        device: str | torch.device,
        repeat_noise: bool,
        model_kwargs: dict[str, Any],
    ) -> Iterator[Step]:
        """Walk a table; with ``hooked`` by single steps of the respaced diffusion, with the same noise."""
        where = choose_device(device)[0]
        if not isinstance(shape, (tuple, list, torch.Size)) or not shape:
            raise TypeError(f"shape must be a tuple of sizes, e.g. (4, 3, 32, 32), got {shape!r}")
        batch, *_ = (_checks.integer("shape", size, 0, 1 << 31) for size in shape)
        seed = _checks.integer("seed", seed, 0, (1 << 64) - 1)
        seeds = torch.full((batch,), as_int64(seed), dtype=torch.int64, device=where)
        indices = torch.arange(batch, device=where)
        ops = self._ops(where)
        if start is None:
            start = ops.normal(seeds, indices, torch.zeros_like(indices), tuple(shape[1:]), kernels.STREAM_INITIAL)
        launch.check_like("start", start, tuple(shape), where)
        if noise is not None:
            launch.check_like("noise", noise, (len(table), *shape), where)
        on_device, x = table.on(where), start.to(torch.float32)
        spaced = None if hooked is None else self.respaced(table.timesteps.tolist())
        if repeat_noise:
            indices = torch.zeros_like(indices)
        for i, timestep in enumerate(table.timesteps):
            t = torch.full((batch,), int(timestep), dtype=torch.int64, device=where)
            z = None if noise is None else _repeated(noise[i]) if repeat_noise else noise[i]
            if hooked is not None and spaced is not None:
                z = ops.normal(seeds, indices, t, tuple(shape[1:]), kernels.STREAM_STEP) if z is None else z
                step = hooked(spaced, x, torch.full_like(t, len(table) - 1 - i), z)
                x = step["sample"]
                yield step
                continue
            source = {"seeds": seeds, "indices": indices} if z is None else {"noise": z}
            x0 = torch.empty_like(x)
            out, rows = self._ask(model, x, t, model_kwargs), torch.full_like(t, i)
            x = ops.diffusion_step(x, out, rows, on_device.coefficients, on_device.timesteps, x0=x0, **source)
            yield {"sample": x, "pred_xstart": x0}

    @staticmethod
    def _last(steps: Iterator[Step]) -> torch.Tensor:
        for step in steps:
            last = step["sample"]
        return last


def _bits(nats: torch.Tensor) -> torch.Tensor:
    """Nats of elements [B, ...] as bits per dimension [B]."""
    return nats.flatten(1).mean(1) / math.log(2)


def _repeated(values: torch.Tensor | None) -> torch.Tensor | None:
    """The first of a batch for every lane."""
    return None if values is None else values[:1].expand_as(values)
