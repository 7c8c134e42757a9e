"""Which training timesteps a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.samplers.beta_quantiles import beta_quantiles

Timesteps = NDArray[np.int64]

SPACINGS = ("leading", "trailing", "linspace")
#: Spacings by noise level, of which each takes the nearest timestep.
BY_LEVEL = ("karras", "exponential", "lambda", "beta")
ALL_SPACINGS = (*SPACINGS, *BY_LEVEL)
_DDIM = "ddim"
COMPATS = (None, "diffusers", "guided-diffusion")


def spaced(
    num_train_timesteps: int,
    steps: int,
    spacing: str = "leading",
    *,
    steps_offset: int = 0,
    compat: str | None = None,
) -> Timesteps:
    """``steps`` timesteps out of [0, T), strictly decreasing, int64.

    - leading: in even steps from ``steps_offset`` to where ``range(steps_offset, T, T // steps)`` ends (Song et al.'s
      code). If ``steps`` divides T, these are the multiples of T / steps (Ho et al.'s). If not, that range has more
      than ``steps`` entries, and the lowest of them, which peers keep, may end far below T: 501 of 1000 at 500, where
      an image is not yet noise;
    - linspace: evenly from T-1 to 0, ends included;
    - trailing: T-1 and then every T / steps down, so that the first step starts from pure noise (Lin et al. 2024,
      table 2).

    The names are diffusers'. A single step starts at T-1 with every spacing. ``compat`` gives peers' lists: as
    "leading" the lowest multiples of T // steps, and as a single step of "leading" and "linspace" timestep 0.
    ``compat="guided-diffusion"`` rounds "linspace" as that library's sections do; ``compat="diffusers"`` refuses the
    step counts for which that library's "trailing" ends in t = -1.
    """
    total = _checks.integer("num_train_timesteps", num_train_timesteps, 1, 1 << 20)
    steps = _checks.integer("steps", steps, 1, total)
    offset = _checks.integer("steps_offset", steps_offset, 0, total - 1)
    _checks.choice("spacing", spacing, SPACINGS)
    if compat == "diffusers" and spacing == "trailing" and len(np.arange(total, 0, -total / steps)) != steps:
        raise ValueError(
            f"steps = {steps} with spacing 'trailing' is a count for which diffusers makes {steps + 1} timesteps, "
            "the last one -1: use another count, or compat=None"
        )
    reached = offset + (steps - 1) * (total // steps)
    if spacing == "leading" and reached >= total:
        raise ValueError(
            f"steps_offset = {offset} with steps = {steps} reaches timestep {reached}, beyond T - 1 = {total - 1}"
        )
    return _ascending(total, steps, spacing, offset, compat)[::-1].astype(np.int64)


def largest_offset(num_train_timesteps: int, steps: int) -> int:
    """The largest ``steps_offset`` that :func:`spaced` takes with so many steps of "leading"."""
    return num_train_timesteps - 1 - (steps - 1) * (num_train_timesteps // steps)


def karras(alphas_cumprod: NDArray[np.floating[Any]], steps: int, rho: float = 7.0) -> Timesteps:
    """``steps`` timesteps, strictly decreasing, whose noise levels lie as Karras et al. 2022, equation 5, has them.

    With sigma_t = sqrt((1 - abar_t) / abar_t) the levels are (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho)
    - sigma_max^(1/rho)))^rho, from the last timestep's to the first's; each takes the timestep nearest in log sigma.
    Low levels lie closer than timesteps do: if several round to one, they move to its free neighbours.

    Args:
        alphas_cumprod: float [T], decreasing. A last entry of 0 (zero terminal SNR) counts as the one before it, and
            the list still starts at T - 1.
    """
    steps = _checks.integer("steps", steps, 1, len(alphas_cumprod))
    rho = _checks.number("rho", rho, 0.0, open_low=True)
    log_sigmas = _log_sigmas(alphas_cumprod)
    ramp = np.linspace(1.0, 0.0, steps) if steps > 1 else np.ones(1)  # ascending timesteps at the end
    low, high = math.exp(log_sigmas[0] / rho), math.exp(log_sigmas[-1] / rho)
    return _nearest(rho * np.log(high + (1 - ramp) * (low - high)), log_sigmas, len(alphas_cumprod))


def by_level(
    alphas_cumprod: NDArray[np.floating[Any]], steps: int, spacing: str, rho: float | None = None
) -> Timesteps:
    """:func:`karras`, or by another of :data:`BY_LEVEL`.

    - exponential, lambda: evenly in log sigma, which is minus half the log of the signal-to-noise ratio;
    - beta: sigma_min + q (sigma_max - sigma_min) with the quantiles q of Beta(0.6, 0.6) (Lee et al. 2024; as
      diffusers' ``use_beta_sigmas``).
    """
    if spacing == "karras":
        return karras(alphas_cumprod, steps, 7.0 if rho is None else rho)
    if rho is not None:
        raise ValueError(f"rho is an option of spacing 'karras', got it with spacing {spacing!r}")
    steps = _checks.integer("steps", steps, 1, len(alphas_cumprod))
    log_sigmas = _log_sigmas(alphas_cumprod)
    low, high = log_sigmas[0], log_sigmas[-1]
    if spacing == "beta":
        q = beta_quantiles(1 - np.linspace(0.0, 1.0, steps))
        wanted = np.log(math.exp(low) + q * (math.exp(high) - math.exp(low)))
    else:
        wanted = np.linspace(high, low, steps)
    return _nearest(wanted, log_sigmas, len(alphas_cumprod))


def _log_sigmas(alphas_cumprod: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """log sqrt((1 - abar) / abar) of the timesteps that have a signal."""
    finite = alphas_cumprod[alphas_cumprod > 0].astype(np.float64)
    result: NDArray[np.float64] = np.log((1 - finite) / finite) / 2
    return result


def _nearest(wanted: NDArray[np.float64], log_sigmas: NDArray[np.float64], total: int) -> Timesteps:
    """The timesteps nearest to decreasing log sigmas; those that round to one move to free neighbours."""
    steps = len(wanted)
    positions = np.interp(wanted, log_sigmas, np.arange(len(log_sigmas)))[::-1]
    visits = np.round(positions).astype(np.int64)
    visits[-1] = total - 1
    room = np.arange(steps)
    visits = room + np.maximum.accumulate(visits - room)  # each at least one above the one below it
    visits = np.minimum(visits, total - steps + room)
    return visits[::-1].copy()


def sections(num_train_timesteps: int, counts: str | Sequence[int]) -> Timesteps:
    """guided-diffusion's ``timestep_respacing``: timesteps out of [0, T), strictly decreasing, int64.

    [0, T) is cut into as many sections as there are counts, the first ones longer by 1 if T leaves a remainder;
    each gives so many timesteps, evenly spaced with both ends: "10,10,5" takes 10 of the third nearest to the
    data (Nichol & Dhariwal 2021, section 4). "ddimN" is one stride through all of [0, T) that gives exactly N
    timesteps (Song et al. 2021), which not every N has.
    """
    total = _checks.integer("num_train_timesteps", num_train_timesteps, 1, 1 << 20)
    numbers = _counts(counts)
    if numbers is None:
        steps = _count(str(counts)[len(_DDIM) :], counts)
        strides = [stride for stride in range(1, total) if -(-total // stride) == steps]
        if not strides:
            raise ValueError(f"timesteps {counts!r}: no stride through {total} timesteps gives {steps}")
        return np.arange(0, total, strides[0], dtype=np.int64)[::-1].copy()
    size, longer = divmod(total, len(numbers))
    start, parts = 0, []
    for i, count in enumerate(numbers):
        length = size + (i < longer)
        if not 1 <= count <= length:
            raise ValueError(f"timesteps {counts!r}: section {i} has {length} timesteps, and {count} were asked for")
        parts.append(start + _sections(length, count))
        start += length
    return np.concatenate(parts)[::-1].astype(np.int64)


def given(num_train_timesteps: int, timesteps: Sequence[int] | NDArray[Any] | str) -> Timesteps:
    """``timesteps`` checked: a non-empty, strictly decreasing list of integers in [0, T); or :func:`sections`."""
    if isinstance(timesteps, str):
        return sections(num_train_timesteps, timesteps)
    try:
        array = np.asarray(timesteps)
    except ValueError as error:
        raise TypeError(f"timesteps must be a list of integers: {error}") from error
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"timesteps must be a non-empty list of integers, got shape {list(array.shape)}")
    if array.dtype == bool or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"timesteps must be integers, got {array.dtype}")
    if array.min() < 0 or array.max() >= num_train_timesteps:
        raise ValueError(f"timesteps must lie in [0, {num_train_timesteps - 1}], got {array.min()} to {array.max()}")
    visits = array.astype(np.int64)  # before the differences: those of an unsigned type would wrap around
    rises = np.flatnonzero(np.diff(visits) >= 0)
    if len(rises):
        i = int(rises[0])
        raise ValueError(f"timesteps must be strictly decreasing, got {visits[i]} followed by {visits[i + 1]}")
    return visits


def _ascending(total: int, steps: int, spacing: str, offset: int, compat: str | None) -> NDArray[np.floating[Any]]:
    """The timesteps of :func:`spaced`, integers still held as floats, first to last."""
    if compat is None and steps == 1:
        return np.array([total - 1.0])
    if spacing == "leading":
        stride = total // steps
        if compat is None:
            return _even(offset, offset + (total - 1 - offset) // stride * stride, steps)
        return np.arange(steps) * float(stride) + offset
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps))[:steps][::-1] - 1  # arange may run one entry on, to 0
    if compat == "guided-diffusion":
        return _sections(total, steps)
    return np.round(np.linspace(0, total - 1, steps))


def _even(first: int, last: int, steps: int) -> NDArray[np.float64]:
    """At least two integers from ``first`` to ``last``, evenly spaced and rounded."""
    positions = np.arange(steps, dtype=np.int64) * (last - first)
    return (first + (2 * positions + steps - 1) // (2 * (steps - 1))).astype(np.float64)


def _counts(counts: str | Sequence[int]) -> list[int] | None:
    """The counts of :func:`sections` as numbers, or None for "ddimN"."""
    if isinstance(counts, str):
        if counts.startswith(_DDIM):
            return None
        return [_count(part, counts) for part in counts.split(",")]
    if not isinstance(counts, Sequence) or not counts:
        raise TypeError(f"counts must be a text like '10,10,5' or 'ddim25', or a list of integers, got {counts!r}")
    return [_checks.integer("counts", count, 1, 1 << 20) for count in counts]


def _count(text: str, whole: object) -> int:
    """A number of steps in a text."""
    text = text.strip()
    if not (text.isascii() and text.isdecimal()) or len(text) > 7 or int(text) == 0:
        raise ValueError(f"timesteps must be a list of integers, or a text like '10,10,5' or 'ddim25', got {whole!r}")
    return int(text)


def _sections(total: int, steps: int) -> NDArray[np.float64]:
    """guided-diffusion's even section: Python's rounding of a running sum of a fractional stride."""
    stride = (total - 1) / (steps - 1) if steps > 1 else 1.0
    position, result = 0.0, []
    for _ in range(steps):
        result.append(round(position))
        position += stride
    return np.array(result, dtype=np.float64)
