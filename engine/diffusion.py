"""Gaussian diffusion under the literature's names, for code written against them.

The names and shapes are those of Ho et al. 2020 and the code that followed it: every method takes batched timesteps
t, int64 [B], and tensors [B, ...] in float16, bfloat16 or float32. Whole loops over a table are
:class:`stepfusion.Engine`'s; the loops here are for research code that wants a method a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stepfusion import _checks, kernels, samplers
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.plan import choose_device, make_plan
from stepfusion.runner import as_int64
from stepfusion.schedule import NoiseSchedule
from stepfusion.table import DeviceTable, StepTable

Model = Callable[..., torch.Tensor]
Step = dict[str, torch.Tensor]

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


class GaussianDiffusion:
    """The forward process, its posterior, the reverse process and the losses of one schedule.

    Args:
        schedule: the noise schedule.
        prediction: what the model returns: "epsilon", "sample" (x0) or "v_prediction".
        variance: "fixed_small", "fixed_large" or "learned_range" (the model returns twice the channels).
        clip: the bound of the predicted |x0|, or None.
        backend: "auto", "triton" or "reference", decided for each tensor's device.

    Models are callables ``model(x, t, **model_kwargs)``.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction: str = "epsilon",
        variance: str = "fixed_small",
        clip: float | None = 1.0,
        backend: str = "auto",
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        self.schedule = schedule
        self.prediction = _checks.choice("prediction", prediction, algebra.PREDICTIONS)
        self.variance = _checks.choice("variance", variance, algebra.VARIANCES)
        self.clip = None if clip is None else _checks.number("clip", clip, 0.0, open_low=True)
        self.backend = _checks.choice("backend", backend, ("auto", "triton", "reference"))
        self._tables: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._step_tables: dict[str, StepTable] = {}
        self._device_tables: dict[tuple[int, torch.device], DeviceTable] = {}
        self._backends: dict[torch.device, ModuleType] = {}

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.schedule.num_timesteps

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
        names = (
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_variance",
            "posterior_log_variance_clipped",
        )
        tables = [self._table(name, x_t.device) for name in names]
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

    def p_mean_variance(self, model: Model, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any) -> Step:
        """One look at the model: ``mean``, ``variance``, ``log_variance`` and ``pred_xstart``, each float32 [B, ...].

        The first three are those of p(x_{t-1} | x_t).
        At t = 0 the log variance is that of t = 1, as in Ho et al.'s code, where fixed_small's variance is 0.
        """
        self._check_t(t, x)
        return self._mean_variance(model(x, t, **model_kwargs), x, t)

    def p_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Step:
        """One ancestral step from t to t - 1: ``sample`` and ``pred_xstart``, float32 [B, ...]; no noise at t = 0."""
        table = self._step_table(
            "ddpm", lambda: samplers.ddpm(self.schedule, **self._options(), variance=self.variance)
        )
        rows = self.num_timesteps - 1 - t
        return self._step(table, rows, model, x, t, noise, seeds, indices, model_kwargs)

    def ddim_sample(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        *,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
        seeds: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Step:
        """One DDIM step from t to t - 1: ``sample`` and ``pred_xstart``, float32 [B, ...].

        Source: Song et al. 2021, equation 12.
        """
        table = self._step_table(f"ddim {eta}", lambda: samplers.ddim(self.schedule, eta=eta, **self._options()))
        rows = self.num_timesteps - 1 - t
        return self._step(table, rows, model, x, t, noise, seeds, indices, model_kwargs)

    def ddim_reverse_sample(self, model: Model, x: torch.Tensor, t: torch.Tensor, **model_kwargs: Any) -> Step:
        """One DDIM step up, from t to t + 1 for t < T - 1: ``sample`` and ``pred_xstart``, float32 [B, ...].

        The model is evaluated at t.
        """
        self._check_t(t, x, last=self.num_timesteps - 2)
        table = self._step_table("ddim reverse", self._reverse_table)
        return self._step(table, t, model, x, t, None, None, None, model_kwargs)

    def p_sample_loop(self, model: Model, shape: tuple[int, ...], **arguments: Any) -> torch.Tensor:
        """The last sample of :meth:`p_sample_loop_progressive`, float32 ``shape``."""
        return self._last(self.p_sample_loop_progressive(model, shape, **arguments))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        steps: int | None = None,
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
            start: [B, ...], the state to start from; by default drawn from ``seed``, in [0, 2**64).
            noise: [steps, B, ...], the z of every step; by default drawn from ``seed``.
            device: where the loop runs.
        """
        table = samplers.ddpm(self.schedule, steps, **self._options(), variance=self.variance)
        return self._loop(table, model, shape, start, noise, seed, device, model_kwargs)

    def ddim_sample_loop(self, model: Model, shape: tuple[int, ...], **arguments: Any) -> torch.Tensor:
        """The last sample of :meth:`ddim_sample_loop_progressive`, float32 ``shape``."""
        return self._last(self.ddim_sample_loop_progressive(model, shape, **arguments))

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        steps: int | None = None,
        eta: float = 0.0,
        start: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        **model_kwargs: Any,
    ) -> Iterator[Step]:
        """DDIM sampling; arguments and results as for :meth:`p_sample_loop_progressive`."""
        table = samplers.ddim(self.schedule, steps, eta=eta, **self._options())
        return self._loop(table, model, shape, start, noise, seed, device, model_kwargs)

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
                says: eps, x0 or v.
            min_snr_gamma: weight by min(snr, gamma) over the weight that the target implies (Hang et al. 2023); None
                for equal weights.
            noise, or seeds and indices: as for :meth:`q_sample`.
        """
        function = LOSSES[_checks.choice("loss", loss, LOSSES)]
        if min_snr_gamma is not None:
            min_snr_gamma = _checks.number("min_snr_gamma", min_snr_gamma, 0.0, open_low=True)
        x_t, noise = self._q_sample(x_start, t, noise, seeds, indices)
        out = model(x_t, t, **model_kwargs)
        if self.variance == "learned_range":
            out = out.chunk(2, dim=1)[0]
        target = self._target(x_start, t, noise)
        if out.shape != target.shape:
            raise ValueError(f"the model must return shape {list(target.shape)}, got {list(out.shape)}")
        losses = function(out.to(torch.float32), target, reduction="none").flatten(1).mean(1)
        if min_snr_gamma is None:
            return losses
        return losses * self._min_snr_weight(launch.gather(self._table("snr", t.device), t), min_snr_gamma)

    # Inside

    def _min_snr_weight(self, snr: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(snr, gamma) over the weight of x0's error that the target implies: snr, 1 or snr + 1."""
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1.0)
        return snr.clamp(max=gamma) / (1.0 if self.prediction == "sample" else snr + 1.0)

    def _options(self) -> dict[str, Any]:
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

    def _mean_variance(self, out: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> Step:
        x = x.to(torch.float32)
        out = out.to(torch.float32)
        small = self._at("posterior_log_variance_clipped", t, x)
        large = self._at("betas", t, x).log()
        if self.variance == "fixed_small":
            variance, log_variance = self._at("posterior_variance", t, x), small
        elif self.variance == "fixed_large":
            log_variance = torch.where(launch.per_lane(t, x) == 0, small, large)
            variance = log_variance.exp()
        else:
            out, v = out.chunk(2, dim=1)
            log_variance = small + (v * 0.5 + 0.5) * (large - small)
            variance = log_variance.exp()
        if self.prediction == "epsilon":
            x0 = self.predict_start_from_noise(x, t, out)
        else:
            x0 = out if self.prediction == "sample" else self.predict_start_from_v(x, t, out)
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        mean = self.q_posterior_mean_variance(x0, x, t)[0]
        return {
            "mean": mean,
            "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x),
            "pred_xstart": x0,
        }

    def _step(
        self,
        table: StepTable,
        rows: torch.Tensor,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None,
        seeds: torch.Tensor | None,
        indices: torch.Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> Step:
        """Every lane one row of ``table`` on, the state in float32."""
        self._check_t(t, x)
        if noise is None and seeds is None and table.stochastic:
            raise ValueError("this step adds noise: give noise, or seeds and indices")
        launch.check_source(noise, seeds, indices, x)
        state = x.to(torch.float32)
        x0 = torch.empty_like(state, memory_format=torch.contiguous_format)
        on_device = self._on(table, x.device)
        sample = self._ops(x.device).diffusion_step(
            state,
            model(x, t, **model_kwargs),
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
        model: Model,
        shape: tuple[int, ...],
        start: torch.Tensor | None,
        noise: torch.Tensor | None,
        seed: int,
        device: str | torch.device,
        model_kwargs: dict[str, Any],
    ) -> Iterator[Step]:
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
        drawn = {"seeds": seeds, "indices": indices}
        for i, timestep in enumerate(table.timesteps):
            t = torch.full((batch,), int(timestep), dtype=torch.int64, device=where)
            rows = torch.full_like(t, i)
            x0 = torch.empty_like(x)
            source = drawn if noise is None else {"noise": noise[i]}
            out = model(x, t, **model_kwargs)
            x = ops.diffusion_step(x, out, rows, on_device.coefficients, on_device.timesteps, x0=x0, **source)
            yield {"sample": x, "pred_xstart": x0}

    @staticmethod
    def _last(steps: Iterator[Step]) -> torch.Tensor:
        for step in steps:
            last = step["sample"]
        return last
