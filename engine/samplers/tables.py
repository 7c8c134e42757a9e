"""Samplers as pure functions: a noise schedule in, a table of float64 rows out.

The algebra of a row stands in :mod:`stepfusion.kernels.coefficients`; here it is decided which levels a row joins.

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
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers import timesteps as spacing_rules
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

Floats = NDArray[np.floating[Any]]
Visits = NDArray[np.int64]


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Sequence[int] | Visits | str | None = None,
    spacing: str = "leading",
    steps_offset: int = 0,
    prediction: str = "epsilon",
    clip: float | None = 1.0,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
    variance: str = "fixed_small",
    v_posterior: float = 0.0,
    compat: str | None = None,
) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over all timesteps or a subsequence.

    (The subsequence: Nichol & Dhariwal 2021, section 4.)

    Args:
        schedule: T timesteps.
        steps: how many of them to visit, all by default; spaced by ``spacing`` and ``steps_offset``
            (:func:`stepfusion.samplers.timesteps.spaced`), or with "karras" by noise level
            (:func:`stepfusion.samplers.timesteps.karras`).
        timesteps: or the very list, strictly decreasing; or sections of [0, T), "10,10,5" or "ddim25"
            (:func:`stepfusion.samplers.timesteps.sections`).
        prediction: what the network returns: "epsilon", "sample" (x0) or "v_prediction".
        clip: the bound of the predicted |x0|, or None.
        threshold: in place of the clip, dynamic thresholding (Saharia et al. 2022, section 2.3): x0 becomes
            clip(x0, -s, s) / s, with s this quantile of an image's |x0|, e.g. 0.995, in [1, ``sample_max_value``].
            It runs on the reference path.
        variance: "fixed_small" (beta-tilde), "fixed_large" (beta), "learned" or "learned_range" (the network returns
            twice the channels; the second half is the log variance, or its place between those two).
        v_posterior: with "fixed_small", the weight of beta in a variance (1 - v) beta-tilde + v beta, as in latent
            diffusion's code (Rombach et al. 2022).
        compat: None, "diffusers" or "guided-diffusion" (module docstring).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _checks.choice("variance", variance, algebra.VARIANCES)
    visits, abar = _levels(schedule, steps, timesteps, spacing, steps_offset, prediction, compat)
    bounds = _bounds(clip, threshold, sample_max_value, len(visits))
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
    known = _ending_known(columns)
    return StepTable.from_columns("ddpm", prediction, schedule, visits, known, learned_variance=learned)


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
    visits, abar = _levels(schedule, steps, timesteps, spacing, steps_offset, prediction, compat)
    bounds = _bounds(clip, threshold, sample_max_value, len(visits))
    rederive = compat != "diffusers" if rederive_eps is None else _checks.boolean("rederive_eps", rederive_eps)
    final = _final(schedule, final_alpha_cumprod, abar.dtype)
    if compat == "diffusers":
        stride = schedule.num_timesteps // len(visits)
        table = _float32_levels(schedule)
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
    return StepTable.from_columns(f"ddim, eta {eta:g}", prediction, schedule, visits, _ending_known(columns))


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Sequence[int] | Visits | None = None,
    spacing: str = "trailing",
    steps_offset: int = 0,
    prediction: str = "epsilon",
    clip: float | None = None,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
    lower_order_final: bool | None = None,
    final_alpha_cumprod: float | None = None,
) -> StepTable:
    """DPM-Solver++(2M), a multistep solver of second order (Lu et al. 2022, algorithm 2): good images in 15 steps.

    Its first row is of first order, and so is a last one that ends without noise, where h is infinite. It
    extrapolates from one row to the next, so rows should not grow in h: with spacings that reach down to t = 0
    ("leading", "linspace") the row before the last does, and a few steps of it may be worse than DDIM's.

    Args:
        clip: None by default, as in the authors' code: where x0 reaches a clip, its difference to the row before says
            nothing of where it goes.
        lower_order_final: make the last row of first order too; by default with fewer than 15 steps, as the authors'
            code does.
        Others: as in :func:`ddim`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    visits, abar = _levels(schedule, steps, timesteps, spacing, steps_offset, prediction, None)
    bounds = _bounds(clip, threshold, sample_max_value, len(visits))
    if lower_order_final is None:
        lower_order_final = len(visits) < 15
    lower_order_final = _checks.boolean("lower_order_final", lower_order_final)
    abar_prev = np.append(abar[1:], _final(schedule, final_alpha_cumprod, abar.dtype))
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(np.append(abar, abar_prev[-1:]) / (1 - np.append(abar, abar_prev[-1:]))) / 2
    h = np.diff(half_log_snr)
    history = np.zeros(len(visits))
    history[1:] = h[1:] / (2 * h[:-1])
    if lower_order_final or abar_prev[-1] == 1:
        history[-1] = 0.0
    columns = algebra.dpmpp_2m(abar, abar_prev, history, prediction=prediction)
    columns |= bounds
    return StepTable.from_columns("dpm-solver++ 2m", prediction, schedule, visits, _ending_known(columns))


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
    visits, levels = _levels(schedule, steps, timesteps, spacing, steps_offset, prediction, None)
    if levels[0] == 0:
        raise ValueError("ddim_inversion cannot reach a level with zero SNR: leave the last timestep out")
    target, abar_next = visits[::-1], levels[::-1]
    abar = np.append(_final(schedule, final_alpha_cumprod, levels.dtype), abar_next[:-1])
    told = target if evaluate_at == "target" else np.append(target[0], target[:-1])
    columns = algebra.ddim_inversion(abar, abar_next, schedule.alphas_cumprod[told], prediction=prediction)
    columns["clip"] = np.full(len(visits), np.inf)
    return StepTable.from_columns("ddim inversion", prediction, schedule, told, columns)


def _levels(
    schedule: NoiseSchedule,
    steps: int | None,
    timesteps: Sequence[int] | Visits | str | None,
    spacing: str,
    steps_offset: int,
    prediction: str,
    compat: str | None,
) -> tuple[Visits, Floats]:
    """The timesteps to visit, decreasing, and abar at each."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    _checks.choice("prediction", prediction, algebra.PREDICTIONS)
    if compat not in spacing_rules.COMPATS:
        raise ValueError(f"compat must be None, 'diffusers' or 'guided-diffusion', got {compat!r}")
    _checks.choice("spacing", spacing, spacing_rules.ALL_SPACINGS)
    if timesteps is not None:
        if steps is not None:
            raise ValueError("steps and timesteps exclude each other, got both")
        visits = spacing_rules.given(schedule.num_timesteps, timesteps)
    elif spacing == "karras":
        steps = schedule.num_timesteps if steps is None else steps
        if steps_offset or compat is not None:
            raise ValueError("spacing 'karras' takes neither steps_offset nor compat")
        visits = spacing_rules.karras(schedule.alphas_cumprod, steps)
    else:
        steps = schedule.num_timesteps if steps is None else steps
        visits = spacing_rules.spaced(
            schedule.num_timesteps, steps, spacing, steps_offset=steps_offset, compat=compat
        )
    abar: Floats = (_float32_levels(schedule) if compat == "diffusers" else schedule.alphas_cumprod)[visits]
    if prediction == "epsilon" and abar[0] == 0:
        raise ValueError(
            f"prediction 'epsilon' cannot start at timestep {visits[0]}, where the signal is zero "
            "(zero terminal SNR): use a network with prediction 'v_prediction' or 'sample'"
        )
    return visits, abar


def _float32_levels(schedule: NoiseSchedule) -> NDArray[np.float32]:
    """abar as diffusers holds it: float32 betas, float32 alphas, products rounded to float32."""
    alphas = np.float32(1) - schedule.betas.astype(np.float32)
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _log_range(small: Floats, large: Floats, compat: str | None) -> dict[str, Floats]:
    """Half the log of the smallest variance, half the span to the largest (Nichol & Dhariwal 2021, equation 15)."""
    small = np.maximum(small, small.dtype.type(1e-20))
    if compat == "guided-diffusion" and len(small) > 1:
        small[-1] = small[-2]
    low, high = np.log(small), np.log(large)
    return {"half_log_min": low / 2, "half_log_span": (high - low) / 2}


def _bounds(clip: float | None, threshold: float | None, largest: float, rows: int) -> dict[str, Floats]:
    """The columns that bound x0: a clip, or a threshold in its place."""
    bound = np.inf if clip is None else _checks.number("clip", clip, 0.0, open_low=True)
    largest = _checks.number("sample_max_value", largest, 1.0)
    if threshold is None:
        return {"clip": np.full(rows, bound)}
    quantile = _checks.number("threshold", threshold, 0.0, 1.0, open_low=True)
    values = {"clip": np.inf, "threshold": quantile, "threshold_max": largest}
    return {name: np.full(rows, value) for name, value in values.items()}


def _ending_known(columns: dict[str, Floats]) -> dict[str, Floats]:
    """The columns, with a known region that the last row leaves as it is, whatever noise that row's level has."""
    columns["known_x"][-1], columns["known_sigma"][-1] = 1.0, 0.0
    return columns


def _final(schedule: NoiseSchedule, final_alpha_cumprod: float | None, dtype: np.dtype[Any]) -> Any:
    value = 1.0 if final_alpha_cumprod is None else final_alpha_cumprod
    low = schedule.alphas_cumprod[0] - 2.0**-23  # a float32 table holds its first entry rounded, perhaps down
    return dtype.type(_checks.number("final_alpha_cumprod", value, low, 1.0))
