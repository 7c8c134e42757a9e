"""What the samplers share: the noise levels that a table visits, how x0 is bounded, and where the last row ends.

A sampler is a pure function: a noise schedule in, a table of float64 rows out. The algebra of a row stands in
:mod:`stepfusion.kernels.coefficients`; the samplers decide which levels a row joins.

A row starts at timestep t with abar_t and ends at the next timestep of the list, the last one at
abar = ``final_alpha_cumprod``; the last row adds no noise. ``compat`` reproduces another library's step, quirks
included:

- ``"diffusers"``: float32 tables with beta re-derived from them; the network's raw eps in DDIM; DDIM's previous
  timestep is t - T // N whatever the list says; noise wherever t > 0, also on a last row; the variance clamped at
  1e-20 (fixed_small, learned_range).
- ``"guided-diffusion"``: eps re-derived from the clipped x0; learned_range with log variance[1] in place of [0]; its
  rounding of evenly spaced timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers import timesteps as spacing_rules
from stepfusion.samplers.path import Path
from stepfusion.samplers.schedule import NoiseSchedule

Floats = NDArray[np.floating[Any]]
Visits = NDArray[np.int64]


def levels_to_visit(
    schedule: NoiseSchedule,
    steps: int | None,
    timesteps: Sequence[int] | Visits | str | None,
    spacing: str,
    steps_offset: int,
    prediction: str,
    compat: str | None,
    *,
    total: int | None = None,
    rho: float | None = None,
) -> tuple[Visits, Floats]:
    """The timesteps to visit, decreasing, and abar at each.

    Args:
        total: out of how many timesteps, from the first on, ``steps`` are taken; all by default.
        rho: of the spacing "karras", 7 by default.
        Others: as in :func:`stepfusion.ddpm`.
    """
    check_schedule(schedule)
    _checks.choice("prediction", prediction, algebra.PREDICTIONS)
    if compat not in spacing_rules.COMPATS:
        raise ValueError(f"compat must be None, 'diffusers' or 'guided-diffusion', got {compat!r}")
    _checks.choice("spacing", spacing, spacing_rules.ALL_SPACINGS)
    if timesteps is not None:
        if steps is not None:
            raise ValueError("steps and timesteps exclude each other, got both")
        visits = spacing_rules.given(schedule.num_timesteps, timesteps)
    else:
        total = schedule.num_timesteps if total is None else total
        steps = total if steps is None else steps
        if spacing in spacing_rules.BY_LEVEL:
            if steps_offset or compat is not None:
                raise ValueError(f"spacing {spacing!r} takes neither steps_offset nor compat")
            visits = spacing_rules.by_level(schedule.alphas_cumprod[:total], steps, spacing, rho)
        else:
            if rho is not None:
                raise ValueError(f"rho is an option of spacing 'karras', got it with spacing {spacing!r}")
            visits = spacing_rules.spaced(total, steps, spacing, steps_offset=steps_offset, compat=compat)
    abar: Floats = (float32_levels(schedule) if compat == "diffusers" else schedule.alphas_cumprod)[visits]
    if prediction == "epsilon" and abar[0] == 0:
        raise ValueError(
            f"prediction 'epsilon' cannot start at timestep {visits[0]}, where the signal is zero "
            "(zero terminal SNR): use a network with prediction 'v_prediction' or 'sample'"
        )
    return visits, abar


def check_schedule(schedule: Any) -> None:
    """TypeError if this is no :class:`stepfusion.NoiseSchedule`."""
    if not isinstance(schedule, NoiseSchedule):
        why = ": this sampler is defined on training timesteps alone" if isinstance(schedule, Path) else ""
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}{why}")


def float32_levels(schedule: NoiseSchedule) -> NDArray[np.float32]:
    """abar as diffusers holds it: float32 betas, float32 alphas, products rounded to float32."""
    alphas = np.float32(1) - schedule.betas.astype(np.float32)
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def bounds_of_x0(clip: float | None, threshold: float | None, largest: float, rows: int) -> dict[str, Floats]:
    """The columns that bound x0: a clip, or a threshold in its place."""
    bound = np.inf if clip is None else _checks.number("clip", clip, 0.0, open_low=True)
    largest = _checks.number("sample_max_value", largest, 1.0)
    if threshold is None:
        return {"clip": np.full(rows, bound)}
    quantile = _checks.number("threshold", threshold, 0.0, 1.0, open_low=True)
    values = {"clip": np.inf, "threshold": quantile, "threshold_max": largest}
    return {name: np.full(rows, value) for name, value in values.items()}


def guidance_columns(
    levels: NDArray[Any], guidance_interval: Sequence[float] | None, guidance_rescale: float
) -> dict[str, Floats]:
    """The columns that say how rows at ``levels`` [R] guide; none if there is nothing to say.

    Args:
        guidance_interval: (low, high): rows at levels in [low, high] guide, others take the conditional output as it
            is (Kynkaanniemi et al. 2024).
        guidance_rescale: phi in [0, 1]: the guided output is brought this far to the standard deviation that the
            conditional one has in an image (Lin et al. 2024, section 3.4).
    """
    columns: dict[str, Floats] = {}
    if guidance_interval is not None:
        low, high = _interval(guidance_interval)
        columns["unguided"] = np.where((levels >= low) & (levels <= high), 0.0, 1.0)
    phi = _checks.number("guidance_rescale", guidance_rescale, 0.0, 1.0)
    if phi:
        columns["rescale"] = np.full(len(levels), phi)
    return columns


def _interval(given: Sequence[float]) -> tuple[float, float]:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise TypeError(f"guidance_interval must be two levels (low, high), got {given!r}"[:200])
    low = _checks.number("guidance_interval", given[0], 0.0)
    return low, _checks.number("guidance_interval", given[1], low)


def ending_known(columns: dict[str, Floats]) -> dict[str, Floats]:
    """The columns, with a known region that the last row leaves as it is, whatever noise that row's level has."""
    columns["known_x"][-1], columns["known_sigma"][-1] = 1.0, 0.0
    return columns


def final_level(schedule: NoiseSchedule, final_alpha_cumprod: float | None, dtype: np.dtype[Any]) -> Any:
    value = 1.0 if final_alpha_cumprod is None else final_alpha_cumprod
    low = schedule.alphas_cumprod[0] - 2.0**-23  # a float32 table holds its first entry rounded, perhaps down
    return dtype.type(_checks.number("final_alpha_cumprod", value, low, 1.0))
