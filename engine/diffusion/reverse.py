"""The reverse process: p(x_{t-1} | x_t) as a model describes it, and single steps of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stepfusion import _checks, kernels
from stepfusion.diffusion.forward import ForwardProcess
from stepfusion.diffusion.model_calls import Condition, Model, ModelCaller, Step
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.diffusion.schedule_tables import POSTERIOR
from stepfusion.diffusion.single_steps import SingleSteps, check_noise, take_step
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.samplers.schedule import NoiseSchedule

LEARNED = ("learned", "learned_range")


class ReverseProcess(ForwardProcess):
    """p(x_{t-1} | x_t) of a model, one timestep at a time.

    The arguments are those of :class:`stepfusion.GaussianDiffusion`, and so are the models.

    Attributes:
        call: calls models and conditions with the timesteps that they know.
        single_steps: the fused steps as tables.
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
        super().__init__(schedule, backend=backend)
        self.prediction = _checks.choice("prediction", prediction, algebra.PREDICTIONS)
        self.variance = _checks.choice("variance", variance, algebra.VARIANCES)
        self.clip = None if clip is None else _checks.number("clip", clip, 0.0, open_low=True)
        self.v_posterior = _checks.number("v_posterior", v_posterior, 0.0, 1.0)
        if self.v_posterior and self.variance != "fixed_small":
            raise ValueError(f"v_posterior must be 0 with variance {variance!r}, got {v_posterior:g}")
        self.call = ModelCaller()
        self.single_steps = SingleSteps(schedule)

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
        self.tables.check(t, x)
        return moments(self, self.call(model, x, t, model_kwargs), x, t, denoised_fn)

    def condition_mean(
        self, cond_fn: Condition, p_mean_var: Step, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> torch.Tensor:
        """The mean of p(x_{t-1} | x_t, y), float32 [B, ...]: that of ``p_mean_var`` plus variance times gradient.

        Source: Dhariwal & Nichol 2021, algorithm 1.
        """
        self.tables.check(t, x)
        return p_mean_var["mean"] + p_mean_var["variance"] * self.call.gradient(cond_fn, x, t, model_kwargs)

    def condition_score(
        self, cond_fn: Condition, p_mean_var: Step, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> Step:
        """``p_mean_var`` with the ``mean`` and ``pred_xstart`` of the score of p(x_t | y).

        eps - sqrt(1 - abar) gradient takes the place of the eps of ``pred_xstart``, which is not clipped again.
        Source: Dhariwal & Nichol 2021, algorithm 2; Song et al. 2020.
        """
        self.tables.check(t, x)
        eps = self.predict_eps_from_x0(x, t, p_mean_var["pred_xstart"])
        scale = self.tables.at("sqrt_one_minus_alphas_cumprod", t, x)
        eps = eps - scale * self.call.gradient(cond_fn, x, t, model_kwargs)
        x0 = self.predict_start_from_noise(x, t, eps)
        return {**p_mean_var, "pred_xstart": x0, "mean": posterior_mean(self, x0, x, t)}

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
        source = NoiseSource(noise, seeds, indices)
        given = cond_fn is not None or denoised_fn is not None
        table = self.single_steps.ddpm(**ddpm_options(self, x0_given=given))
        self.tables.check(t, x)
        check_noise(table, source, x)
        if _checks.boolean("repeat_noise", repeat_noise):
            source = source.repeated()
        out, shift = self.call(model, x, t, model_kwargs), None
        if given:
            parts = moments(self, out, x, t, denoised_fn)
            if cond_fn is not None:
                shift = parts["variance"] * self.call.gradient(cond_fn, x, t, model_kwargs)
            v = out.to(torch.float32).chunk(2, dim=1)[1:] if self.variance in LEARNED else ()
            out = torch.cat((parts["pred_xstart"], *v), dim=1) if v else parts["pred_xstart"]
        on_device = self.single_steps.on(table, x.device)
        step = take_step(self.ops.on(x.device), on_device, self.num_timesteps - 1 - t, out, x, source)
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
        source = NoiseSource(noise, seeds, indices)
        given = cond_fn is not None or denoised_fn is not None
        table = self.single_steps.ddim(eta, **x0_options(self, x0_given=given))
        self.tables.check(t, x)
        check_noise(table, source, x)
        out = self.call(model, x, t, model_kwargs)
        if given:
            parts = moments(self, out, x, t, denoised_fn)
            if cond_fn is not None:
                parts = self.condition_score(cond_fn, parts, x, t, **model_kwargs)
            out = parts["pred_xstart"]
        on_device = self.single_steps.on(table, x.device)
        return take_step(self.ops.on(x.device), on_device, self.num_timesteps - 1 - t, out, x, source)

    def ddim_reverse_sample(self, model: Model, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any) -> Step:
        """One DDIM step up, from t to t + 1 for t < T - 1: ``sample`` and ``pred_xstart``, float32 [B, ...].

        The model is evaluated at t.
        """
        self.tables.check(t, x, last=self.num_timesteps - 2)
        table = self.single_steps.on(self.single_steps.ddim_reverse(self.prediction), x.device)
        out = self.call(model, x, t, model_kwargs)
        return take_step(self.ops.on(x.device), table, t, out, x, NoiseSource())


def x0_options(process: ReverseProcess, *, x0_given: bool = False) -> dict[str, Any]:
    """The options of a sampler's table that say how x0 comes from the model's output, or from an x0 that is final."""
    if x0_given:
        return {"prediction": "sample", "clip": None}
    return {"prediction": process.prediction, "clip": process.clip}


def ddpm_options(process: ReverseProcess, *, x0_given: bool = False) -> dict[str, Any]:
    """The options of :func:`stepfusion.ddpm` for the ancestral steps of a process."""
    options = x0_options(process, x0_given=x0_given)
    return {**options, "variance": process.variance, "v_posterior": process.v_posterior}


def moments(
    process: ReverseProcess,
    out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    clipped: bool = True,
) -> Step:
    """What :meth:`ReverseProcess.p_mean_variance` returns, from what the model returned.

    With ``clipped=False`` the predicted x0 is not clipped, as losses take it.
    """
    x, out = x.to(torch.float32), out.to(torch.float32)
    v: torch.Tensor | None = None
    if process.variance in LEARNED:
        out, v = out.chunk(2, dim=1)
    variance, log_variance = _variances(process, v, x, t)
    if out.shape != x.shape:
        raise ValueError(f"the model must return an x0, eps or v of shape {list(x.shape)}, got {list(out.shape)}")
    x0 = _predicted_start(process, out, x, t)
    if denoised_fn is not None:
        x0 = denoised_fn(x0).to(torch.float32)
        if x0.shape != x.shape:
            raise ValueError(f"denoised_fn must return shape {list(x.shape)}, got {list(x0.shape)}")
    if clipped and process.clip is not None:
        x0 = x0.clamp(-process.clip, process.clip)
    return {
        "mean": posterior_mean(process, x0, x, t),
        "variance": variance.expand_as(x),
        "log_variance": log_variance.expand_as(x),
        "pred_xstart": x0,
    }


def _variances(
    process: ReverseProcess, v: torch.Tensor | None, x: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and log variance of p(x_{t-1} | x_t), which broadcast over x; v is the model's second half."""
    tables = process.tables
    small, large = tables.at("posterior_log_variance_clipped", t, x), tables.at("betas", t, x).log()
    if v is not None:
        log_variance = v if process.variance == "learned" else small + (v * 0.5 + 0.5) * (large - small)
        return log_variance.exp(), log_variance
    if process.variance == "fixed_large":
        log_variance = torch.where(launch.per_lane(t, x) == 0, small, large)
        return log_variance.exp(), log_variance
    variance = tables.at("posterior_variance", t, x)
    if not process.v_posterior:
        return variance, small
    variance = (1 - process.v_posterior) * variance + process.v_posterior * tables.at("betas", t, x)
    return variance, variance.log()


def _predicted_start(process: ReverseProcess, out: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The x0 that a model's output means."""
    if process.prediction == "epsilon":
        return process.predict_start_from_noise(x, t, out)
    return out if process.prediction == "sample" else process.predict_start_from_v(x, t, out)


def posterior_mean(process: ReverseProcess, x0: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The mean of q(x_{t-1} | x_t, x_0), by the reference where a gradient has to pass: kernels have none."""
    ops = kernels.reference if x0.requires_grad else process.ops.on(x.device)
    tables = process.tables.on(x.device, *POSTERIOR)
    mean: torch.Tensor = ops.q_posterior_mean_variance(x0, x.to(torch.float32), t, *tables)[0]
    return mean
