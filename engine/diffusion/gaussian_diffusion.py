"""Gaussian diffusion under the literature's names, for code written against them.

The names and shapes are those of Ho et al. 2020 and the code that followed it: every method takes batched timesteps
t, int64 [B], and tensors [B, ...] in float16, bfloat16 or float32. Whole loops over a table are
:class:`stepfusion.Engine`'s; the loops here are for research code that wants a method a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stepfusion import _checks, samplers
from stepfusion.diffusion.loops import LoopArguments, last_sample, walk, walk_guided
from stepfusion.diffusion.losses import TrainingLosses
from stepfusion.diffusion.model_calls import Condition, Model, Step
from stepfusion.diffusion.reverse import ddpm_options, x0_options
from stepfusion.samplers import timesteps as spacing_rules
from stepfusion.samplers.schedule import NoiseSchedule


class GaussianDiffusion(TrainingLosses):
    """The forward process, its posterior, the reverse process and the losses of one schedule.

    The methods are those of its parts, each of which stands for itself:
    :class:`~stepfusion.diffusion.forward.ForwardProcess` (``q_sample`` and what follows from the schedule alone),
    :class:`~stepfusion.diffusion.reverse.ReverseProcess` (``p_mean_variance`` and single steps),
    :class:`~stepfusion.diffusion.bound.VariationalBound`, :class:`~stepfusion.diffusion.losses.TrainingLosses`, and
    here the loops and respacing.

    Args:
        schedule: the noise schedule.
        prediction: what the model returns: "epsilon", "sample" (x0) or "v_prediction".
        variance: "fixed_small", "fixed_large", or with a model that returns twice the channels "learned" (the second
            half is the log variance) or "learned_range" (its place between the two; Nichol & Dhariwal 2021, eq. 15).
        clip: the bound of the predicted |x0|, or None.
        v_posterior: with "fixed_small", the weight of beta in a variance (1 - v) beta-tilde + v beta (latent
            diffusion's; Rombach et al. 2022).
        backend: "auto", "triton", "cpu" or "reference", decided for each tensor's device.

    All but the schedule are attributes too, and may be changed at any time: every method follows them. A diffusion
    may be copied and pickled.

    Models are callables ``model(x, t, **model_kwargs)``, and so are the conditions ``cond_fn`` that guide sampling,
    which return the gradient of log p(y | x) with respect to x, [B, ...] (Dhariwal & Nichol 2021, section 4).
    ``denoised_fn`` maps every predicted x0 [B, ...] before the clip. A step without these two is one fused step; with
    them, the fused step follows what they do.

    Single steps and losses are differentiable in their inputs and in a model's parameters. What requires a gradient
    runs as the reference on every backend, for kernels have none; loops run without autograd. Noise that is drawn is
    keyed by the training timestep, in a respaced diffusion too. With zero terminal SNR, prediction "epsilon" has no
    x0 at T - 1: methods that need it there raise a ValueError (on a device, where t is not looked at, it is NaN).
    """

    def __repr__(self) -> str:
        clip = "no clip" if self.clip is None else f"clip {self.clip:g}"
        return f"GaussianDiffusion({self.schedule!r}, {self.prediction}, {self.variance}, {clip})"

    def respaced(self, timesteps: Sequence[int] | str) -> GaussianDiffusion:
        """This diffusion over a subsequence of its timesteps, whose own t counts from 0 to K - 1.

        ``timesteps`` is a strictly decreasing list or, as guided-diffusion writes it, "250" or "ddim25"
        (:func:`stepfusion.samplers.timesteps.sections`). Models and conditions are told this diffusion's timesteps.
        Source: Nichol & Dhariwal 2021, section 4.
        """
        visits = spacing_rules.given(self.num_timesteps, timesteps)[::-1].copy()
        abar = self.schedule.alphas_cumprod[visits]
        schedule = NoiseSchedule.from_betas(1 - abar / np.append(1.0, abar[:-1]))
        options: dict[str, Any] = {name: getattr(self, name) for name in ("prediction", "variance", "clip")}
        spaced = GaussianDiffusion(schedule, **options, v_posterior=self.v_posterior, backend=self.backend)
        spaced.told = self.told.of(torch.from_numpy(visits))
        return spaced

    def p_sample_loop(self, model: Model, shape: tuple[int, ...], **arguments: Any) -> torch.Tensor:
        """The last sample of :meth:`p_sample_loop_progressive`, float32 ``shape``."""
        return last_sample(self.p_sample_loop_progressive(model, shape, **arguments))

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
        table = samplers.ddpm(self.schedule, steps, timesteps=timesteps, **ddpm_options(self))
        repeat_noise = _checks.boolean("repeat_noise", repeat_noise)
        arguments = LoopArguments(shape, start, noise, seed, device, repeat_noise)
        if cond_fn is None and denoised_fn is None:
            return walk(self, table, arguments, model, model_kwargs)
        spaced = self.respaced(table.timesteps.tolist())
        hooks: dict[str, Any] = {"cond_fn": cond_fn, "denoised_fn": denoised_fn}

        def guided(x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> Step:
            return spaced.p_sample(model, x, t, noise=z, **hooks, **model_kwargs)

        return walk_guided(self, table, arguments, guided)

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
        return last_sample(self.ddim_sample_loop_progressive(model, shape, **arguments))

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
        table = samplers.ddim(self.schedule, steps, timesteps=timesteps, eta=eta, **x0_options(self))
        arguments = LoopArguments(shape, start, noise, seed, device)
        if cond_fn is None and denoised_fn is None:
            return walk(self, table, arguments, model, model_kwargs)
        spaced = self.respaced(table.timesteps.tolist())
        hooks: dict[str, Any] = {"cond_fn": cond_fn, "denoised_fn": denoised_fn}

        def guided(x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> Step:
            return spaced.ddim_sample(model, x, t, eta=eta, noise=z, **hooks, **model_kwargs)

        return walk_guided(self, table, arguments, guided)
