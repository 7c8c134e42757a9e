"""A schedule's tables as tensors, for methods that take a batch of timesteps."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from stepfusion.diffusion.memo import Memo
from stepfusion.kernels import launch
from stepfusion.samplers.schedule import NoiseSchedule

POSTERIOR = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped")


class ScheduleTables:
    """The tables of a schedule by their names in :class:`stepfusion.NoiseSchedule`, uploaded once for each device."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self._memo = Memo()

    @cached_property
    def with_signal(self) -> int:
        """How many timesteps have a signal, so that eps tells x0 there: 1 / sqrt(abar) is a finite float32.

        They are the first ones. With zero terminal SNR, T - 1 is not among them.
        """
        with np.errstate(over="ignore"):
            return int(np.isfinite(self.schedule.sqrt_recip_alphas_cumprod.astype(np.float32)).sum())

    def on(self, device: torch.device, *names: str) -> list[torch.Tensor]:
        """Tables on a device, each float32 [T]."""
        return [self._on(device, name) for name in names]

    def at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A table's entries at t, float32 [B, 1, ...], to broadcast over ``like`` [B, ...]."""
        self.check(t, like)
        return launch.per_lane(self.gather(name, t), like)

    def gather(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """A table's entries at t, float32 [B], NaN if t lies outside the schedule."""
        return launch.gather(self._on(t.device, name), t)

    def check(self, t: torch.Tensor, like: torch.Tensor, name: str = "x", *, last: int | None = None) -> None:
        """TypeError or ValueError unless t is int64 [B] in [0, ``last``], by default [0, T - 1].

        On a device the range is not looked at, which would wait for it (a t outside the range gives NaN).
        """
        launch.check_lanes(name, like, (*launch.FLOATS, torch.float64))
        launch.check_like("t", t, (len(like),), like.device, (torch.int64,))
        last = self.schedule.num_timesteps - 1 if last is None else last
        if t.device.type == "cpu" and len(t) and not (int(t.min()) >= 0 and int(t.max()) <= last):
            raise ValueError(f"t must lie in [0, {last}], got {int(t.min())} to {int(t.max())}")

    def check_signal(self, t: torch.Tensor) -> None:
        """ValueError if eps cannot tell x0 at one of t, int64 [B]; on a device it gives NaN, as for :meth:`check`."""
        if t.device.type == "cpu" and len(t) and int(t.max()) >= self.with_signal:
            raise ValueError(
                f"x0 cannot be told from eps at t = {int(t.max())}, where the signal is zero (zero terminal SNR): "
                "use a model with prediction 'v_prediction' or 'sample'"
            )

    def _on(self, device: torch.device, name: str) -> torch.Tensor:
        def upload() -> torch.Tensor:
            return torch.from_numpy(np.array(getattr(self.schedule, name))).to(device, torch.float32)

        return self._memo.get((name, device), upload)
