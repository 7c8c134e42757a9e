"""The forward process of a schedule: q(x_t | x_0), its posterior, and the changes between x_0, eps and v."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from stepfusion import _checks, kernels
from stepfusion.diffusion.memo import Memo
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.diffusion.schedule_tables import POSTERIOR, ScheduleTables
from stepfusion.diffusion.timestep_map import TimestepMap
from stepfusion.execution.plan import BACKENDS, make_plan
from stepfusion.kernels import launch
from stepfusion.samplers.schedule import NoiseSchedule


class BackendOps:
    """The functions of a backend: for each device the fused ones or the reference, under the same names."""

    def __init__(self, backend: str) -> None:
        self.backend = _checks.choice("backend", backend, BACKENDS)
        self._memo = Memo()

    def on(self, device: torch.device) -> ModuleType:
        """The module whose functions run on this device."""
        return self._memo.get(device, lambda: make_plan(device, "float32", self.backend, "eager").ops)


class ForwardProcess:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), and what follows from it (Ho et al. 2020, equation 4).

    Args:
        schedule: the noise schedule.
        backend: "auto", "triton", "cpu" or "reference", decided for each tensor's device.

    Attributes:
        schedule: the noise schedule, which cannot be changed.
        backend: may be changed at any time.
        tables: the schedule's tables, float32 on each device.
        ops: the functions that compute on each device.
        told: the training timestep that each t stands for.
    """

    ops: BackendOps

    def __init__(self, schedule: NoiseSchedule, *, backend: str = "auto") -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        self.schedule = schedule
        self.backend = backend
        self.tables = ScheduleTables(schedule)
        self.told = TimestepMap()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "schedule" and name in vars(self):
            raise AttributeError(f"schedule cannot be changed: make another {type(self).__name__}")
        if name == "backend":
            super().__setattr__("ops", BackendOps(value))
        super().__setattr__(name, value)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return self.schedule.num_timesteps

    def q_mean_variance(
        self, x_start: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean [B, ...], variance and log variance [B, 1, ...], float32, of q(x_t | x_0).

        Source: Ho et al. 2020, equation 4.
        """
        mean = self.tables.at("sqrt_alphas_cumprod", t, x_start) * x_start.to(torch.float32)
        scale = self.tables.at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return mean, scale**2, self.tables.at("log_one_minus_alphas_cumprod", t, x_start)

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

        From the given noise [B, ...], or the counter-based noise of (seeds, t, indices), t as a training timestep.
        """
        return diffuse(self, x_start, t, NoiseSource(noise, seeds, indices))[0]

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean [B, ...], variance and clipped log variance [B, 1, ...] of q(x_{t-1} | x_t, x_0).

        Source: Ho et al. 2020, equations 6 and 7.
        """
        self.tables.check(t, x_t, "x_t")
        tables = self.tables.on(x_t.device, *POSTERIOR)
        return self.ops.on(x_t.device).q_posterior_mean_variance(x_start, x_t, t, *tables)  # type: ignore[no-any-return]

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps, float32 [B, ...].

        ValueError at T - 1 with zero terminal SNR, where no eps tells x0 (on a device, which is not waited for, NaN).
        """
        self.tables.check(t, x_t)
        self.tables.check_signal(t)
        scaled = self.tables.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t.to(torch.float32)
        return scaled - self.tables.at("sqrt_recipm1_alphas_cumprod", t, x_t) * noise.to(torch.float32)

    def predict_start_from_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x0 = sqrt(abar) x_t - sqrt(1 - abar) v, float32 [B, ...] (Salimans & Ho 2022, appendix D)."""
        scaled = self.tables.at("sqrt_alphas_cumprod", t, x_t) * x_t.to(torch.float32)
        return scaled - self.tables.at("sqrt_one_minus_alphas_cumprod", t, x_t) * v.to(torch.float32)

    def predict_v(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """v = sqrt(abar) eps - sqrt(1 - abar) x0, float32 [B, ...] (Salimans & Ho 2022, appendix D).

        Args:
            x_start: x0 [B, ...]. t: int64 [B].
            noise: eps, the noise [B, ...] that makes x_t of x0.
        """
        self.tables.check(t, x_start, "x_start")
        launch.check_like("noise", noise, tuple(x_start.shape), x_start.device, (*launch.FLOATS, torch.float64))
        signal = self.tables.at("sqrt_alphas_cumprod", t, x_start) * noise.to(torch.float32)
        return signal - self.tables.at("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start.to(torch.float32)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """:meth:`predict_v` under the name, and with the order of arguments, of diffusers' schedulers.

        ``sample`` is x0 [B, ...], and the result is in its dtype, as theirs is.
        """
        return self.predict_v(sample, timesteps, noise).to(sample.dtype)

    def predict_eps_from_x0(self, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar), float32 [B, ...]."""
        signal = self.tables.at("sqrt_alphas_cumprod", t, x_t) * x0.to(torch.float32)
        return (x_t.to(torch.float32) - signal) / self.tables.at("sqrt_one_minus_alphas_cumprod", t, x_t)


def diffuse(
    process: ForwardProcess, x_start: torch.Tensor, t: torch.Tensor, source: NoiseSource
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t ~ q(x_t | x_0) in the dtype of x_start, and the eps that made it: as it was given, or drawn in float32."""
    process.tables.check(t, x_start, "x_start")
    tables = process.tables.on(t.device, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    ops, told = process.ops.on(t.device), process.told(t)
    if told is not t and source.seeds is not None:  # q_sample would draw by the t that it gathers by
        launch.check_source(*source, x_start)
        source = NoiseSource(
            ops.normal(source.seeds, source.indices, told, tuple(x_start.shape[1:]), kernels.STREAM_FORWARD)
        )
    return ops.q_sample(x_start, t, *tables, **source._asdict())  # type: ignore[no-any-return]
