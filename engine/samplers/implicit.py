"""Denoising diffusion implicit models: DDIM, and its inversion from images to noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers.grid import Grid, complete_options, make_grid, prediction_of, row_options, schedule_levels
from stepfusion.samplers.levels import Visits, ending_known, float32_levels
from stepfusion.samplers.levels import final_level as _final_alpha_cumprod
from stepfusion.samplers.path import Path
from stepfusion.samplers.row_levels import RowLevels
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


def ddim(
    schedule: Path,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    timesteps: Sequence[int] | Visits | str | None = None,
    levels: Sequence[float] | NDArray[Any] | None = None,
    spacing: str | None = None,
    steps_offset: int = 0,
    rho: float | None = None,
    prediction: str | None = None,
    clip: float | None = 1.0,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
    rederive_eps: bool | None = None,
    final_alpha_cumprod: float | None = None,
    final_level: float | None = None,
    lambda_min_clipped: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    compat: str | None = None,
) -> StepTable:
    """Denoising diffusion implicit sampling (Song et al. 2021, equation 12), on any path.

    From a level with signal a and noise s to one with a', s':

        sigma = eta s' / s sqrt(s^2 - (a / a')^2 s'^2)
        x' = a' x0 + sqrt(s'^2 - sigma^2) eps + sigma z

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM's fixed_small.
        spacing: on a schedule "leading" by default.
        rederive_eps: move along the eps that belongs to the clipped x0 (the default: without a clip it makes no
            difference, and with one it keeps x0 and eps consistent, so that eta = 1 is DDPM); False takes the
            network's own eps, as ``compat="diffusers"`` does by default; on a schedule alone.
        final_alpha_cumprod: abar where the last row ends, 1 by default; latent diffusion uses
            ``schedule.alphas_cumprod[0]``.
        compat: as in :func:`ddpm`.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    eta = _checks.number("eta", eta, 0.0, 1.0)
    given: dict[str, Any] = {"timesteps": timesteps, "levels": levels, "spacing": spacing, "rho": rho}
    given |= {"steps_offset": steps_offset, "prediction": prediction, "clip": clip, "threshold": threshold}
    given |= {"sample_max_value": sample_max_value, "final_alpha_cumprod": final_alpha_cumprod}
    given |= {"final_level": final_level, "lambda_min_clipped": lambda_min_clipped}
    given |= {"guidance_interval": guidance_interval, "guidance_rescale": guidance_rescale}
    if isinstance(schedule, NoiseSchedule):
        return _on_schedule(schedule, steps, eta, rederive_eps, compat, given)
    if rederive_eps is not None or compat is not None:
        name = "rederive_eps" if rederive_eps is not None else "compat"
        raise ValueError(f"{name} is an option of a NoiseSchedule, got it with {schedule!r}")
    return _on_path(make_grid(schedule, steps, given), eta)


def _on_path(grid: Grid, eta: float) -> StepTable:
    """:func:`ddim` by signal and noise."""
    (a, a_next), (s, s_next) = ((pair[:-1], pair[1:]) for pair in (grid.signal, grid.noise))
    left = np.maximum(s**2 - (a / a_next) ** 2 * s_next**2, 0.0)
    sigma = eta * s_next / s * np.sqrt(left)
    direction = np.sqrt(np.maximum(s_next**2 - sigma**2, 0.0))
    sigma[-1], direction[-1] = 0.0, s_next[-1]
    columns = {"next_x": direction / s, "next_x0": a_next - direction / s * a, "sigma": sigma}
    return grid.table(f"ddim, eta {eta:g}", columns)


def _on_schedule(
    schedule: NoiseSchedule,
    steps: int | None,
    eta: float,
    rederive_eps: bool | None,
    compat: str | None,
    given: Mapping[str, Any],
) -> StepTable:
    """:func:`ddim` by alphas_cumprod."""
    options = complete_options(given)
    prediction = prediction_of(schedule, options)
    visits, abar = schedule_levels(schedule, steps, options, "leading", compat=compat)
    bounds = row_options(options, visits)
    rederive = compat != "diffusers" if rederive_eps is None else _checks.boolean("rederive_eps", rederive_eps)
    final = _final_alpha_cumprod(schedule, options["final_alpha_cumprod"], abar.dtype)
    if compat == "diffusers":
        stride = schedule.num_timesteps // len(visits)
        table = float32_levels(schedule)
        abar_prev = np.where(visits >= stride, table[np.maximum(visits - stride, 0)], final)
    else:
        abar_prev = np.append(abar[1:], final)
    columns = algebra.ddim(abar, abar_prev, eta=eta, prediction=prediction, rederive_eps=rederive)
    if compat is None:
        columns["sigma"][-1] = 0.0
        last = algebra.ddim(abar[-1:], abar_prev[-1:], eta=0.0, prediction=prediction, rederive_eps=rederive)
        for name in ("next_x0", "next_x", "next_out"):
            columns[name][-1] = last[name][0]
    columns |= bounds
    return StepTable.from_columns(f"ddim, eta {eta:g}", prediction, schedule, visits, ending_known(columns))


def ddim_inversion(
    schedule: Path,
    steps: int | None = None,
    *,
    timesteps: Sequence[int] | Visits | str | None = None,
    levels: Sequence[float] | NDArray[Any] | None = None,
    spacing: str | None = None,
    steps_offset: int = 0,
    rho: float | None = None,
    prediction: str | None = None,
    evaluate_at: str = "source",
    final_alpha_cumprod: float | None = None,
    final_level: float | None = None,
) -> StepTable:
    """From an image to the noise that :func:`ddim` turns back into it, with eta = 0 and the same levels, on any path.

    (Song et al. 2021, section 4.3.) The rows climb from the level where :func:`ddim` ends through the levels of its
    list. There is no clip: it would break the round trip.

    Args:
        evaluate_at: the level that the network is told: where the row starts ("source", as guided-diffusion does; the
            first row, which starts at a clean image, takes its target), or where it ends ("target", as diffusers
            does).
        Others: as in :func:`ddim`; ``timesteps`` and ``levels`` are the decreasing lists of :func:`ddim`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _checks.choice("evaluate_at", evaluate_at, ("source", "target"))
    given: dict[str, Any] = {"timesteps": timesteps, "levels": levels, "spacing": spacing, "rho": rho}
    given |= {"steps_offset": steps_offset, "prediction": prediction, "final_level": final_level}
    given |= {"final_alpha_cumprod": final_alpha_cumprod}
    if not isinstance(schedule, NoiseSchedule):
        return _inversion_on_path(make_grid(schedule, steps, given), evaluate_at)
    options = complete_options(given)
    prediction = prediction_of(schedule, options)
    visits, visited = schedule_levels(schedule, steps, options, "leading")
    if visited[0] == 0:
        raise ValueError("ddim_inversion cannot reach a level with zero SNR: leave the last timestep out")
    target, abar_next = visits[::-1], visited[::-1]
    abar = np.append(_final_alpha_cumprod(schedule, final_alpha_cumprod, visited.dtype), abar_next[:-1])
    told = _told(target, evaluate_at)
    columns = algebra.ddim_inversion(abar, abar_next, schedule.alphas_cumprod[told], prediction=prediction)
    columns["clip"] = np.full(len(visits), np.inf)
    return StepTable.from_columns("ddim inversion", prediction, schedule, told, columns)


def _told(target: NDArray[Any], evaluate_at: str) -> NDArray[Any]:
    """The level that the network is told in rows that end at ``target``, each of which starts where one ended."""
    return target if evaluate_at == "target" else np.append(target[0], target[:-1])


def _inversion_on_path(grid: Grid, evaluate_at: str) -> StepTable:
    """:func:`ddim_inversion` by signal and noise.

    The network's output becomes eps at the level that it was told, and x0 follows from x and eps at the level of x.
    """
    told = _told(grid.levels[::-1], evaluate_at)
    a_told, s_told = grid.path.pair(told)
    if not a_told.all():
        raise ValueError(
            f"ddim_inversion cannot tell the network the level {told[-1]:g}, where the signal is zero: take "
            "two steps or more, and evaluate_at 'source'"
        )
    (a, a_next), (s, s_next) = ((pair[:0:-1], pair[-2::-1]) for pair in (grid.signal, grid.noise))
    x0_x, x0_out = grid.path.predict(grid.prediction, told)
    eps_x, eps_out = (1 - a_told * x0_x) / s_told, -a_told * x0_out / s_told
    columns = {
        "x0_x": (1 - s * eps_x) / a,
        "x0_out": -s * eps_out / a,
        "next_x0": a_next,
        "next_x": s_next * eps_x,
        "next_out": s_next * eps_out,
        "clip": np.full(len(grid), np.inf),
    }
    at = RowLevels.at(grid.path, grid.prediction, told)
    keys = grid.path.keys(told)
    return StepTable.from_columns("ddim inversion", grid.prediction, grid.path, keys, columns, levels=at)
