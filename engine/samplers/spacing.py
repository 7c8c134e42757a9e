"""Which levels a sampler visits on a path whose levels are real numbers: sigma of EDM, t of a flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.samplers.beta_quantiles import beta_quantiles
from stepfusion.samplers.path import FlowPath, Path, SigmaPath
from stepfusion.samplers.timesteps import ALL_SPACINGS

Floats = NDArray[np.float64]

#: The spacings of a path of each kind, its usual one first.
SIGMA_SPACINGS = ("karras", "exponential", "lambda", "beta", "linear")
FLOW_SPACINGS = ("uniform", "karras", "exponential", "lambda", "beta", "linear")
#: Those of all paths together; which one has which, its sampler says.
EVERY_SPACING = tuple(dict.fromkeys((*ALL_SPACINGS, *SIGMA_SPACINGS, *FLOW_SPACINGS)))
_RHO = 7.0
_LOWEST_TIME = 1e-3  # of a flow, before its shift: 1 / 1000, where diffusers' 1000 training timesteps end


def spaced_levels(
    path: Path, steps: int, spacing: str | None = None, *, rho: float | None = None, noisiest: float = math.inf
) -> Floats:
    """``steps`` levels of a path, strictly decreasing, float64; a single one is the noisiest.

    From the noisiest level h to the least noisy one l, with i from 0 to 1 in even steps:

    - karras: (h^(1/rho) + i (l^(1/rho) - h^(1/rho)))^rho (Karras et al. 2022, equation 5);
    - exponential: h (l / h)^i;
    - lambda: evenly in log(signal / noise) (Lu et al. 2022); on a sigma path the same as "exponential";
    - beta: l + q(1 - i) (h - l) with the quantiles q of Beta(0.6, 0.6) (Lee et al. 2024; as diffusers'
      ``use_beta_sigmas``);
    - linear: evenly in the level; on a flow, shifted afterwards;
    - uniform, of a flow: 1, 1 - 1 / N, ..., 1 / N, shifted (Esser et al. 2024).

    On a :class:`stepfusion.SigmaPath` h and l are sigma_max and sigma_min. On a :class:`stepfusion.FlowPath` they are
    1 and 1/1000, shifted twice as in diffusers' FlowMatchEulerDiscreteScheduler; with "lambda" 0.999 and 1/1000,
    shifted once, for at t = 1 lambda is infinite.

    Args:
        rho: of "karras": 7 by default, or the rho of a :class:`stepfusion.SigmaPath`.
        noisiest: a bound for h.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    steps = _checks.integer("steps", steps, 1, path.max_steps)
    accepted = spacings_of(path)
    spacing = accepted[0] if spacing is None else _checks.choice("spacing", spacing, accepted)
    if rho is not None and spacing != "karras":
        raise ValueError(f"rho is an option of spacing 'karras', got it with spacing {spacing!r}")
    if isinstance(path, FlowPath):
        return _of_flow(path, steps, spacing, rho, noisiest)
    assert isinstance(path, SigmaPath)
    high = min(path.sigma_max, noisiest)
    if high <= path.sigma_min:
        raise ValueError(f"lambda_min_clipped leaves no level between sigma_min = {path.sigma_min:g} and {high:g}")
    spread = _spread(spacing, path.rho if rho is None else rho)
    return spread(high, path.sigma_min, steps)


def spacings_of(path: Path) -> tuple[str, ...]:
    """The spacings that :func:`spaced_levels` takes on a path."""
    return FLOW_SPACINGS if isinstance(path, FlowPath) else SIGMA_SPACINGS


def given_levels(path: Path, levels: Sequence[float] | NDArray[Any]) -> Floats:
    """``levels`` checked: a non-empty, strictly decreasing list of numbers above 0, on a flow at most 1."""
    array = np.asarray(levels)
    if array.ndim != 1 or not 1 <= len(array) <= path.max_steps:
        raise ValueError(f"levels must be a list of 1 to {path.max_steps} numbers, got shape {list(array.shape)}")
    if array.dtype == bool or not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise TypeError(f"levels must be numbers, got {array.dtype}")
    result = array.astype(np.float64)
    high = 1.0 if isinstance(path, FlowPath) else math.inf
    if not (np.isfinite(result).all() and (result > 0).all() and (result <= high).all()):
        raise ValueError(f"levels must be finite numbers in (0, {high:g}], got {result.min():g} to {result.max():g}")
    if (rises := np.flatnonzero(np.diff(result) >= 0)).size:
        i = int(rises[0])
        raise ValueError(f"levels must be strictly decreasing, got {result[i]:g} followed by {result[i + 1]:g}")
    return result


def level_of_half_log_snr(path: Path, half_log_snr: float) -> float:
    """The level of a sigma path or a flow with this log(signal / noise)."""
    if isinstance(path, FlowPath):
        return 1 / (1 + math.exp(half_log_snr))
    return math.exp(-half_log_snr)


def _of_flow(path: FlowPath, steps: int, spacing: str, rho: float | None, noisiest: float) -> Floats:
    high = _unshifted(path, min(1.0, noisiest))  # whose shifted level is the bound
    if spacing == "uniform":
        return path.shifted(high * np.linspace(1.0, 1 / steps, steps))
    if spacing == "lambda":
        high = min(high, 1 - _LOWEST_TIME)
        return path.shifted(_expit(np.linspace(_logit(high), _logit(_LOWEST_TIME), steps)))
    low = float(path.shifted(_LOWEST_TIME))
    if spacing == "linear":
        return path.shifted(np.linspace(high, low, steps))
    return _spread(spacing, _RHO if rho is None else rho)(float(path.shifted(high)), float(path.shifted(low)), steps)


def _spread(spacing: str, rho: float) -> Callable[[float, float, int], Floats]:
    """The function of h, l and the number of levels that a spacing is."""
    if spacing == "beta":
        return _beta
    if spacing == "linear":
        return np.linspace
    if spacing == "karras":
        rho = _checks.number("rho", rho, 0.0, open_low=True)
        return lambda high, low, steps: np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho
    return lambda high, low, steps: np.exp(np.linspace(math.log(high), math.log(low), steps))


def _beta(high: float, low: float, steps: int) -> Floats:
    return low + beta_quantiles(1 - np.linspace(0.0, 1.0, steps)) * (high - low)


def _unshifted(path: FlowPath, level: float) -> float:
    """The time whose shifted level is ``level``."""
    return level / (path.shift - (path.shift - 1) * level)


def _logit(t: float) -> float:
    return math.log(t / (1 - t))


def _expit(values: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-values))
    return result
