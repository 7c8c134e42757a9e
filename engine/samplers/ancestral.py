"""Ancestral sampling: DDPM over all timesteps or a subsequence of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers.grid import complete_options, prediction_of, row_options, schedule_levels
from stepfusion.samplers.levels import Floats, Visits, ending_known
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Sequence[int] | Visits | str | None = None,
    spacing: str | None = None,
    steps_offset: int = 0,
    rho: float | None = None,
    prediction: str | None = None,
    clip: float | None = 1.0,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
    lambda_min_clipped: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    variance: str = "fixed_small",
    v_posterior: float = 0.0,
    compat: str | None = None,
) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over all timesteps or a subsequence.

    (The subsequence: Nichol & Dhariwal 2021, section 4.)

    Args:
        schedule: T timesteps; other paths are not sampled by it (:func:`stepfusion.euler_ancestral` is the same
            process on any path).
        steps: how many of them to visit, all by default; spaced by ``spacing`` ("leading" by default) and
            ``steps_offset`` (:func:`stepfusion.samplers.timesteps.spaced`), or by noise level
            (:func:`stepfusion.samplers.timesteps.by_level`).
        timesteps: or the very list, strictly decreasing; or sections of [0, T), "10,10,5" or "ddim25"
            (:func:`stepfusion.samplers.timesteps.sections`).
        prediction: what the network returns: "epsilon", the default, "sample" (x0) or "v_prediction".
        clip: the bound of the predicted |x0|, or None.
        threshold: in place of the clip, dynamic thresholding (Saharia et al. 2022, section 2.3): x0 becomes
            clip(x0, -s, s) / s, with s this quantile of an image's |x0|, e.g. 0.995, in [1, ``sample_max_value``].
            It runs on the reference path.
        variance: "fixed_small" (beta-tilde), "fixed_large" (beta), "learned" or "learned_range" (the network returns
            twice the channels; the second half is the log variance, or its place between those two).
        v_posterior: with "fixed_small", the weight of beta in a variance (1 - v) beta-tilde + v beta, as in latent
            diffusion's code (Rombach et al. 2022).
        compat: None, "diffusers" or "guided-diffusion" (:mod:`stepfusion.samplers.levels`).
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _checks.choice("variance", variance, algebra.VARIANCES)
    given: dict[str, Any] = {"timesteps": timesteps, "spacing": spacing, "steps_offset": steps_offset, "rho": rho}
    given |= {"prediction": prediction, "clip": clip, "threshold": threshold, "sample_max_value": sample_max_value}
    given |= {"lambda_min_clipped": lambda_min_clipped, "guidance_interval": guidance_interval}
    options = complete_options({**given, "guidance_rescale": guidance_rescale})
    visits, abar = schedule_levels(schedule, steps, options, "leading", compat=compat)
    prediction = prediction_of(schedule, options)
    bounds = row_options(options, visits)
    if variance == "learned" and compat == "diffusers":
        raise ValueError("variance 'learned' is not reproduced with compat='diffusers', which takes v as a variance")
    v_posterior = _checks.number("v_posterior", v_posterior, 0.0, 1.0)
    if v_posterior and variance != "fixed_small":
        raise ValueError(f"v_posterior must be 0 with variance {variance!r}, got {v_posterior:g}")
    abar_prev = np.append(abar[1:], abar.dtype.type(1.0))
    columns = algebra.ddpm(abar, abar_prev, prediction=prediction, variance=variance)
    if v_posterior:
        large = algebra.ddpm(abar, abar_prev, prediction=prediction, variance="fixed_large")["sigma"]
        columns["sigma"] = ((1 - v_posterior) * columns["sigma"] ** 2 + v_posterior * large**2) ** 0.5
    if variance == "learned_range":
        columns |= _log_range(columns.pop("small"), columns.pop("large"), compat)
    elif compat == "diffusers" and variance == "fixed_small":
        columns["sigma"] = np.maximum(columns["sigma"], abar.dtype.type(1e-10))
    noisy = visits > 0 if compat == "diffusers" else np.arange(len(visits)) < len(visits) - 1
    for name in ("sigma", "half_log_min", "half_log_span"):
        if name in columns:
            columns[name] = np.where(noisy, columns[name], 0.0)
    columns |= bounds
    learned = variance in ("learned", "learned_range")
    known = ending_known(columns)
    return StepTable.from_columns("ddpm", prediction, schedule, visits, known, learned_variance=learned)


def _log_range(small: Floats, large: Floats, compat: str | None) -> dict[str, Floats]:
    """Half the log of the smallest variance, half the span to the largest (Nichol & Dhariwal 2021, equation 15)."""
    small = np.maximum(small, small.dtype.type(1e-20))
    if compat == "guided-diffusion" and len(small) > 1:
        small[-1] = small[-2]
    low, high = np.log(small), np.log(large)
    return {"half_log_min": low / 2, "half_log_span": (high - low) / 2}
