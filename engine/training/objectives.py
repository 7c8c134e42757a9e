"""What a network learns: a path from images to noise, the levels of it that are drawn, and the loss at a level.

The losses are mean squared errors: in eps (Ho et al. 2020, eq. 14), x0 or v (Salimans & Ho 2022, appendix D) of

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0;

in the raw output of EDM's preconditioned network (Karras et al. 2022); in the velocity of the straight path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from stepfusion.diffusion.gaussian_diffusion import GaussianDiffusion
from stepfusion.diffusion.path_losses import drawn_times, edm_loss, flow_loss
from stepfusion.diffusion.step_draws import log_normal
from stepfusion.samplers.path import FlowPath, Path, SigmaPath
from stepfusion.samplers.schedule import NoiseSchedule

_DISCRETE: dict[str, tuple[str, Callable[[int], NoiseSchedule]]] = {
    "linear": ("linear", NoiseSchedule.linear),
    "cosine": ("squaredcos_cap_v2", NoiseSchedule.cosine),
    "course": ("linear", partial(NoiseSchedule.linear, scaled=False)),
}
#: What networks may learn to return, by the name of the schedule.
SCHEDULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_DISCRETE, NoiseSchedule.predictions),
    "edm": ("edm",),
    "flow": ("flow",),
}
TOLD_SCALE = 1000.0  # a network is told 1000 t on the straight path, as those of diffusers are

Predict = Callable[..., Tensor]
"""x [B, C, H, W], what a network is told [B], ``labels`` int64 [B] if there are any -> its output [B, C, H, W]."""


class Objective(ABC):
    """One path, and the loss of a network along it."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The noise schedule, or another path."""

    @abstractmethod
    def levels(self, u: Tensor) -> Tensor:
        """The quantiles ``u``, float64 [B] in [0, 1), of the levels that are trained on: timesteps int64 [B], or
        float64 [B]."""

    @abstractmethod
    def losses(self, predict: Predict, x0: Tensor, levels: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of each image, float32 [B]: x0 and noise float32 [B, C, H, W] on one device, levels on the CPU."""

    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """The diffusers scheduler config of a network trained so."""


@dataclass(frozen=True)
class DiscreteObjective(Objective):
    """The timesteps of a variance-preserving schedule, all as often.

    Attributes:
        schedule: "cosine", "linear" or "course".
        timesteps: how many it has.
        prediction: "epsilon", "sample" or "v_prediction".
    """

    schedule: str
    timesteps: int
    prediction: str

    @cached_property
    def path(self) -> NoiseSchedule:
        return _DISCRETE[self.schedule][1](self.timesteps)

    @cached_property
    def diffusion(self) -> GaussianDiffusion:
        """What makes noisy images, and knows their targets."""
        return GaussianDiffusion(self.path, prediction=self.prediction)

    def levels(self, u: Tensor) -> Tensor:
        return (u * self.timesteps).long().clamp_(max=self.timesteps - 1)

    def losses(self, predict: Predict, x0: Tensor, levels: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        return self.diffusion.training_losses(predict, x0, levels.to(x0.device), noise=noise, labels=labels)

    def scheduler_config(self) -> dict[str, Any]:
        beta_schedule = _DISCRETE[self.schedule][0]
        scale = 1.0 if self.schedule == "course" else 1000 / self.timesteps
        ends = {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.timesteps,
            "beta_schedule": beta_schedule,
            **(ends if beta_schedule == "linear" else {}),
            "prediction_type": self.prediction,
            "variance_type": "fixed_small",
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "timestep_spacing": "trailing",
        }


@dataclass(frozen=True)
class EDMObjective(Objective):
    """EDM's preconditioned network at levels whose logarithm is N(p_mean, p_std^2) (Karras et al. 2022)."""

    sigma_data: float
    p_mean: float
    p_std: float

    @cached_property
    def path(self) -> SigmaPath:
        return SigmaPath(sigma_data=self.sigma_data)

    def levels(self, u: Tensor) -> Tensor:
        return log_normal(u, self.p_mean, self.p_std)

    def losses(self, predict: Predict, x0: Tensor, levels: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        return edm_loss(predict, self.path, x0, sigma=levels, noise=noise, labels=labels)

    def scheduler_config(self) -> dict[str, Any]:
        """What diffusers calls "epsilon" there is the raw output of the preconditioned network."""
        path = self.path
        return {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": 1000,
            "sigma_min": path.sigma_min,
            "sigma_max": path.sigma_max,
            "sigma_data": path.sigma_data,
            "sigma_schedule": "karras",
            "rho": path.rho,
            "prediction_type": "epsilon",
            "final_sigmas_type": "zero",
        }


@dataclass(frozen=True)
class FlowObjective(Objective):
    """The velocity of the straight path (Liu et al. 2023; Lipman et al. 2023).

    Attributes:
        times: "uniform", or "logit-normal" with ``logit_mean`` and ``logit_std`` (Esser et al. 2024).
    """

    times: str
    logit_mean: float
    logit_std: float

    @cached_property
    def path(self) -> FlowPath:
        return FlowPath(told_scale=TOLD_SCALE)

    def levels(self, u: Tensor) -> Tensor:
        return drawn_times(self.path, u, self.times, self.logit_mean, self.logit_std)

    def losses(self, predict: Predict, x0: Tensor, levels: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        return flow_loss(predict, self.path, x0, t=levels, noise=noise, labels=labels)

    def scheduler_config(self) -> dict[str, Any]:
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": int(TOLD_SCALE),
            "shift": self.path.shift,
        }
