"""The reverse process: p(x_{t-1} | x_t) as a model describes it, and single steps of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.diffusion.forward import ForwardProcess
from stepfusion.diffusion.model_calls import Condition, Model, Step, call_model, returned_like, split
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.diffusion.single_steps import SingleSteps, check_noise, take_step, within
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


class ReverseProcess(ForwardProcess):
    """p(x_{t-1} | x_t) of a model, one timestep at a time.

    The arguments are those of :class:`stepfusion.GaussianDiffusion`, and so are the models. All but the schedule are
    attributes too, which may be changed at any time: every method follows them.

    Attributes:
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
        self.prediction, self.variance = prediction, variance
        self.clip, self.v_posterior = clip, v_posterior
        self.single_steps = SingleSteps(self.tables)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _checked(name, value, vars(self)))

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
        check_step(self, x, t)
        return moments(self, evaluate(self, model, x, t, model_kwargs), x, t, denoised_fn)

    def condition_mean(
        self, cond_fn: Condition, p_mean_var: Step, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> torch.Tensor:
        """The mean of p(x_{t-1} | x_t, y), float32 [B, ...]: that of ``p_mean_var`` plus variance times gradient.

        Source: Dhariwal & Nichol 2021, algorithm 1.
        """
        self.tables.check(t, x)
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient(self, cond_fn, x, t, model_kwargs)

    def condition_score(
        self, cond_fn: Condition, p_mean_var: Step, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any
    ) -> Step:
        """``p_mean_var`` with the ``mean`` and ``pred_xstart`` of the score of p(x_t | y).

        eps - sqrt(1 - abar) gradient takes the place of the eps of ``pred_xstart``, which so becomes pred_xstart +
        (1 - abar) / sqrt(abar) gradient, and is not clipped again. At abar = 0 (zero terminal SNR), where x_t says
        nothing of x_0 or y, both stay as they are. Source: Dhariwal & Nichol 2021, algorithm 2; Song et al. 2020.
        """
        self.tables.check(t, x)
        scale = self.tables.at("sqrt_one_minus_alphas_cumprod", t, x) ** 2
        scale = scale * self.tables.at("sqrt_recip_alphas_cumprod", t, x)
        scale = scale.masked_fill(scale.isinf(), 0.0)
        x0 = p_mean_var["pred_xstart"] + scale * gradient(self, cond_fn, x, t, model_kwargs)
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
        guided = cond_fn is not None or denoised_fn is not None
        check_step(self, x, t)
        table = self.single_steps.ddpm(**ddpm_options(self, x0_given=guided))
        check_noise(table, source, x)
        if _checks.boolean("repeat_noise", repeat_noise):
            source = source.repeated()
        out, shift = evaluate(self, model, x, t, model_kwargs), None
        if guided:
            parts = moments(self, out, x, t, denoised_fn)
            if cond_fn is not None:
                shift = parts["variance"] * gradient(self, cond_fn, x, t, model_kwargs)
            v = split(out, self.variance)[1]
            x0 = parts["pred_xstart"]
            out = x0 if v is None else torch.cat((x0, v.to(torch.float32)), dim=1)
        step = step_down(self, table, out, x, t, source)
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
        guided = cond_fn is not None or denoised_fn is not None
        check_step(self, x, t)
        table = self.single_steps.ddim(eta=eta, **x0_options(self, x0_given=guided))
        check_noise(table, source, x)
        out = evaluate(self, model, x, t, model_kwargs)
        if guided:
            parts = moments(self, out, x, t, denoised_fn)
            if cond_fn is not None:
                parts = self.condition_score(cond_fn, parts, x, t, **model_kwargs)
            out = parts["pred_xstart"]
        return step_down(self, table, out, x, t, source)

    def ddim_reverse_sample(self, model: Model, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any) -> Step:
        """One DDIM step up, from t to t + 1 for t < T - 1: ``sample`` and ``pred_xstart``, float32 [B, ...].

        The model is evaluated at t.
        """
        check_step(self, x, t, last=self.num_timesteps - 2)
        table = self.single_steps.ddim_reverse(self.prediction)
        out = evaluate(self, model, x, t, model_kwargs)
        on_device = self.single_steps.on(table, x.device, self.told)
        return take_step(self.ops.on(x.device), on_device, within(table, t), out, x, NoiseSource())


def _checked(name: str, value: Any, others: Mapping[str, Any]) -> Any:
    """The value of an attribute as it is stored; TypeError or ValueError if it does not fit, or not to the others."""
    if name == "prediction":
        return _checks.choice(name, value, algebra.PREDICTIONS)
    if name == "clip":
        return None if value is None else _checks.number(name, value, 0.0, open_low=True)
    if name == "variance":
        value, v_posterior = _checks.choice(name, value, algebra.VARIANCES), others.get("v_posterior", 0.0)
    elif name == "v_posterior":
        value = v_posterior = _checks.number(name, value, 0.0, 1.0)
    else:
        return value
    variance = value if name == "variance" else others["variance"]
    if v_posterior and variance != "fixed_small":
        raise ValueError(f"v_posterior must be 0 with variance {variance!r}, got {v_posterior:g}")
    return value


def check_step(process: ReverseProcess, x: torch.Tensor, t: torch.Tensor, *, last: int | None = None) -> None:
    """TypeError or ValueError, before the model is asked anything, unless it can tell x0 of x at t."""
    process.tables.check(t, x, last=last)
    if process.prediction == "epsilon":
        process.tables.check_signal(t)


def evaluate(
    process: ReverseProcess, model: Model, x: torch.Tensor, t: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """What a model returns for x at t, checked by :func:`stepfusion.diffusion.model_calls.call_model`."""
    return call_model(model, x, t, model_kwargs, told=process.told, variance=process.variance)


def gradient(
    process: ReverseProcess, cond_fn: Condition, x: torch.Tensor, t: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """What a condition returns for x at t, float32 like x."""
    return returned_like("cond_fn", cond_fn(x, process.told(t), **model_kwargs), x)


def step_down(
    process: ReverseProcess,
    table: StepTable,
    out: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    source: NoiseSource,
) -> Step:
    """The step of a table of single steps that starts at t; NaN if it has none."""
    on_device = process.single_steps.on(table, x.device, process.told)
    return take_step(process.ops.on(x.device), on_device, within(table, len(table) - 1 - t), out, x, source)


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
    x = x.to(torch.float32)
    prediction, v = split(out.to(torch.float32), process.variance)
    variance, log_variance = _variances(process, v, x, t)
    x0 = _predicted_start(process, prediction, x, t)
    if denoised_fn is not None:
        x0 = returned_like("denoised_fn", denoised_fn(x0), x)
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
    """The mean of q(x_{t-1} | x_t, x_0), float32 [B, ...]."""
    return process.q_posterior_mean_variance(x0, x.to(torch.float32), t)[0]
