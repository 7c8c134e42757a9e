"""Denoising diffusion implicit models: DDIM, and its inversion from images to noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers.levels import (
    Visits,
    bounds_of_x0,
    ending_known,
    final_level,
    float32_levels,
    levels_to_visit,
)
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


def ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    timesteps: Sequence[int] | Visits | str | None = None,
    spacing: str = "leading",
    steps_offset: int = 0,
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
    rederive_eps: bool | None = None,
    final_alpha_cumprod: float | None = None,
    compat: str | None = None,
) -> StepTable:
    """Denoising diffusion implicit sampling (Song et al. 2021, equation 12).

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM's fixed_small.
        rederive_eps: move along the eps that belongs to the clipped x0 (the default: without a clip it makes no
            difference, and with one it keeps x0 and eps consistent, so that eta = 1 is DDPM); False takes the
            network's own eps, as ``compat="diffusers"`` does by default.
        final_alpha_cumprod: abar where the last row ends, 1 by default; latent diffusion uses
            ``schedule.alphas_cumprod[0]``.
        Others: as in :func:`ddpm`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    eta = _checks.number("eta", eta, 0.0, 1.0)
    visits, abar = levels_to_visit(schedule, steps, timesteps, spacing, steps_offset, prediction, compat)
    bounds = bounds_of_x0(clip, threshold, sample_max_value, len(visits))
    rederive = compat != "diffusers" if rederive_eps is None else _checks.boolean("rederive_eps", rederive_eps)
    final = final_level(schedule, final_alpha_cumprod, abar.dtype)
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
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Sequence[int] | Visits | str | None = None,
    spacing: str = "leading",
    steps_offset: int = 0,
    prediction: str = "epsilon",
    evaluate_at: str = "source",
    final_alpha_cumprod: float | None = None,
) -> StepTable:
    """From an image to the noise that :func:`ddim` turns back into it, with eta = 0 and the same timesteps.

    (Song et al. 2021, section 4.3.) The rows climb from abar = ``final_alpha_cumprod`` through the levels of
    :func:`ddim`'s list. There is no clip: it would break the round trip.

    Args:
        evaluate_at: the timestep that the network is told: that of the level where the row starts ("source", as
            guided-diffusion does; the first row, which starts at a clean image, takes its target), or where it ends
            ("target", as diffusers does).
        Others: as in :func:`ddim`; ``timesteps`` is the decreasing list of :func:`ddim`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _checks.choice("evaluate_at", evaluate_at, ("source", "target"))
    visits, levels = levels_to_visit(schedule, steps, timesteps, spacing, steps_offset, prediction, None)
    if levels[0] == 0:
        raise ValueError("ddim_inversion cannot reach a level with zero SNR: leave the last timestep out")
    target, abar_next = visits[::-1], levels[::-1]
    abar = np.append(final_level(schedule, final_alpha_cumprod, levels.dtype), abar_next[:-1])
    told = target if evaluate_at == "target" else np.append(target[0], target[:-1])
    columns = algebra.ddim_inversion(abar, abar_next, schedule.alphas_cumprod[told], prediction=prediction)
    columns["clip"] = np.full(len(visits), np.inf)
    return StepTable.from_columns("ddim inversion", prediction, schedule, told, columns)
