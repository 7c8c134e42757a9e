"""Single steps by table: every step of a schedule from one timestep to the next is a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stepfusion import _checks, samplers
from stepfusion.diffusion.memo import Memo
from stepfusion.diffusion.model_calls import Step
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import DeviceTable, StepTable


class SingleSteps:
    """The tables of all single steps of a schedule, each made once and uploaded once for each device."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self._memo = Memo()

    def ddpm(self, **options: Any) -> StepTable:
        """Ancestral steps, by the options of :func:`stepfusion.ddpm`; row T - 1 - t goes from t to t - 1."""
        return self._memo.get(("ddpm", *options.items()), lambda: samplers.ddpm(self.schedule, **options))

    def ddim(self, eta: float, **options: Any) -> StepTable:
        """DDIM steps, by the options of :func:`stepfusion.ddim`; row T - 1 - t goes from t to t - 1."""
        eta = _checks.number("eta", eta, 0.0, 1.0)
        return self._memo.get(
            ("ddim", eta, *options.items()), lambda: samplers.ddim(self.schedule, eta=eta, **options)
        )

    def ddim_reverse(self, prediction: str) -> StepTable:
        """DDIM steps up without a clip; row t goes from t to t + 1, the model evaluated at t."""
        return self._memo.get(("ddim reverse", prediction), lambda: self._reverse_table(prediction))

    def on(self, table: StepTable, device: torch.device) -> DeviceTable:
        """One of these tables on a device."""
        return self._memo.get((table.digest, device), lambda: table.on(device))

    def _reverse_table(self, prediction: str) -> StepTable:
        abar, abar_next = self.schedule.alphas_cumprod[:-1], self.schedule.alphas_cumprod[1:]
        columns = algebra.ddim_inversion(abar, abar_next, abar, prediction=prediction)
        columns["clip"] = np.full(len(abar), np.inf)
        timesteps = np.arange(len(abar), dtype=np.int64)
        return StepTable.from_columns("ddim reverse", prediction, self.schedule, timesteps, columns)


def check_noise(table: StepTable, source: NoiseSource, x: torch.Tensor) -> None:
    """TypeError or ValueError unless ``source`` has the noise that a step of ``table`` adds to x."""
    if source.noise is None and source.seeds is None and table.stochastic:
        raise ValueError("this step adds noise: give noise, or seeds and indices")
    launch.check_source(*source, x)


def take_step(
    ops: Any, table: DeviceTable, rows: torch.Tensor, out: torch.Tensor, x: torch.Tensor, source: NoiseSource
) -> Step:
    """Take every image by one row of a table: ``sample`` and ``pred_xstart``, float32 like x."""
    state = x.to(torch.float32)
    x0 = torch.empty_like(state, memory_format=torch.contiguous_format)
    given = (state, out, rows, table.coefficients, table.timesteps)
    return {"sample": ops.diffusion_step(*given, x0=x0, **source._asdict()), "pred_xstart": x0}
