"""Single steps by table: every step of a schedule from one timestep to the next is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from stepfusion import _checks, samplers
from stepfusion.diffusion.memo import Memo
from stepfusion.diffusion.model_calls import Step
from stepfusion.diffusion.noise_source import NoiseSource
from stepfusion.diffusion.schedule_tables import ScheduleTables
from stepfusion.diffusion.timestep_map import TimestepMap
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import launch
from stepfusion.samplers.table import DeviceTable, StepTable


class SingleSteps:
    """The tables of all single steps of a schedule, each made once and uploaded once for each device.

    With prediction "epsilon", timesteps without a signal have no step.
    """

    def __init__(self, tables: ScheduleTables) -> None:
        self.tables = tables
        self._memo = Memo()

    def ddpm(self, **options: Any) -> StepTable:
        """Ancestral steps by the options of :func:`stepfusion.ddpm`; the last row starts at t = 0."""
        return self._downwards(samplers.ddpm, options)

    def ddim(self, *, eta: float, **options: Any) -> StepTable:
        """DDIM steps by the options of :func:`stepfusion.ddim`; the last row starts at t = 0."""
        return self._downwards(samplers.ddim, {**options, "eta": _checks.number("eta", eta, 0.0, 1.0)})

    def ddim_reverse(self, prediction: str) -> StepTable:
        """DDIM steps up without a clip; row t goes from t to t + 1, the model evaluated at t."""
        return self._memo.get(("ddim reverse", prediction), lambda: self._upwards(prediction))

    def on(self, table: StepTable, device: torch.device, told: TimestepMap) -> DeviceTable:
        """One of these tables on a device, as :func:`place` puts it there."""
        return self._memo.get((id(table), device), lambda: place(table, device, told))  # the tables live as long

    def _downwards(self, sampler: Callable[..., StepTable], options: dict[str, Any]) -> StepTable:
        def make() -> StepTable:
            timesteps = np.arange(self._starts(options["prediction"]))[::-1]
            return sampler(self.tables.schedule, timesteps=timesteps, **options)

        return self._memo.get((sampler.__name__, *sorted(options.items())), make)

    def _upwards(self, prediction: str) -> StepTable:
        schedule = self.tables.schedule
        timesteps = np.arange(min(self._starts(prediction), schedule.num_timesteps - 1), dtype=np.int64)
        abar, abar_next = schedule.alphas_cumprod[timesteps], schedule.alphas_cumprod[timesteps + 1]
        columns = algebra.ddim_inversion(abar, abar_next, abar, prediction=prediction)
        columns["clip"] = np.full(len(timesteps), np.inf)
        return StepTable.from_columns("ddim reverse", prediction, schedule, timesteps, columns)

    def _starts(self, prediction: str) -> int:
        """At how many timesteps, 0 being the first, a step may start."""
        return self.tables.with_signal if prediction == "epsilon" else self.tables.schedule.num_timesteps


def place(table: StepTable, device: torch.device, told: TimestepMap) -> DeviceTable:
    """A table on a device, its noise keyed by the training timesteps that its own stand for."""
    placed = table.on(device)
    return replace(placed, timesteps=told(placed.timesteps))


def within(table: StepTable, rows: torch.Tensor) -> torch.Tensor:
    """Rows, int64 [B], those before the table put beyond it: both give NaN, where a negative row would do nothing."""
    return torch.where(rows < 0, len(table), rows)


def check_noise(table: StepTable, source: NoiseSource, x: torch.Tensor) -> None:
    """TypeError or ValueError unless ``source`` has the noise that a step of ``table`` adds to x."""
    if source.noise is None and source.seeds is None and table.stochastic:
        raise ValueError("this step adds noise: give noise, or seeds and indices")
    launch.check_source(*source, x)


def take_step(
    ops: ModuleType, table: DeviceTable, rows: torch.Tensor, out: torch.Tensor, x: torch.Tensor, source: NoiseSource
) -> Step:
    """Take every image by one row of a table: ``sample`` and ``pred_xstart``, float32 like x."""
    state = x.to(torch.float32)
    x0 = torch.empty_like(state, memory_format=torch.contiguous_format)
    given = (state, out, rows, table.coefficients, table.timesteps)
    return {"sample": ops.diffusion_step(*given, x0=x0, **source._asdict()), "pred_xstart": x0}
