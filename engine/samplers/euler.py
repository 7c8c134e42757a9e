"""Euler's method, as k-diffusion has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stepfusion.samplers.implicit import ddim
from stepfusion.samplers.levels import Visits
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


def euler_ancestral(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    timesteps: Sequence[int] | Visits | None = None,
    spacing: str = "trailing",
    steps_offset: int = 0,
    prediction: str = "epsilon",
    clip: float | None = None,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
) -> StepTable:
    """k-diffusion's ancestral Euler (``sample_euler_ancestral``), on a variance-preserving schedule.

    With s = sqrt((1 - abar) / abar) and y = x / sqrt(abar) that is

        s_up   = eta sqrt(s_to^2 (s_from^2 - s_to^2) / s_from^2),  s_down = sqrt(s_to^2 - s_up^2)
        y_next = y + (y - x0) / s_from (s_down - s_from) + s_up z

    which, back in x, is DDIM's step with the same eta, eps re-derived from x0 (Song et al. 2021, equations 12 and
    16): so this is :func:`ddim` under its other name and with that library's defaults, noise and no clip.

    Args:
        eta: 1 is k-diffusion's default, 0 is Euler's method without noise.
        Others: as in :func:`ddim`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    given: dict[str, Any] = {"timesteps": timesteps, "spacing": spacing, "steps_offset": steps_offset}
    given |= {"prediction": prediction, "clip": clip, "threshold": threshold, "sample_max_value": sample_max_value}
    return replace(ddim(schedule, steps, eta=eta, **given), name=f"euler ancestral, eta {float(eta):g}")
