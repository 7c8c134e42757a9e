"""Sampling of networks that were trained for few steps: consistency models, LCM, TCD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.samplers.grid import Floats, Grid, GridOptions, make_grid
from stepfusion.samplers.path import Path, SigmaPath
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

_LCM_SIGMA_DATA = 0.5


def consistency(
    path: Path,
    steps: int | None = None,
    *,
    train_levels: int = 40,
    s_noise: float = 1.0,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1), 2 steps by default.

    On :class:`stepfusion.SigmaPath` a row leads to x' = x0 + sqrt(sigma'^2 - sigma_min^2) s_noise z, on other paths
    to x' = signal' x0 + noise' s_noise z (diffusers' FlowMatchEulerDiscreteScheduler with ``stochastic_sampling``);
    the last one to x0. What makes x0 equal to x at sigma_min is the prediction type "consistency".

    Args:
        train_levels: on a sigma path N steps visit 0, K // N, 2 (K // N), ... of the K levels of Karras et al. 2022,
            equation 5, on which the network was trained, unless ``levels`` or ``spacing`` say otherwise (Song et
            al.'s code; diffusers' CMStochasticIterativeScheduler).
        s_noise: the standard deviation of the noise that is added.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    s_noise = _checks.number("s_noise", s_noise, 0.0)
    train_levels = _checks.integer("train_levels", train_levels, 1, 1 << 20)
    given: dict[str, Any] = dict(grid)
    if steps is None and not _lists_levels(given):
        steps = 2
    if isinstance(path, SigmaPath) and not _places(given):
        given["levels"], steps = _trained_levels(path, steps, train_levels, given.pop("rho", None)), None
    found = make_grid(path, steps, given)
    noise = found.noise[1:]
    if isinstance(path, SigmaPath):
        noise = np.sqrt(np.maximum(noise**2 - path.sigma_min**2, 0.0))
    return _renoising("consistency", found, noise * s_noise)


def lcm(
    path: Path,
    steps: int | None = None,
    *,
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """Latent consistency sampling (Luo et al. 2023, algorithm 3; diffusers' LCMScheduler), 4 steps by default.

        x' = signal' (c_out x0 + c_skip x) + noise' z,   the last row c_out x0 + c_skip x

    with c_skip = 0.25 / ((k t)^2 + 0.25) and c_out = k t / sqrt((k t)^2 + 0.25) at timestep t; on paths without
    timesteps c_skip = 0 and c_out = 1.

    Args:
        original_steps: on a schedule N steps are spread over the so many timesteps on which the network was
            distilled, every T / original_steps of T, unless ``timesteps`` or ``spacing`` say otherwise.
        timestep_scaling: k.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    scaling = _checks.number("timestep_scaling", timestep_scaling, 0.0, open_low=True)
    found = _distilled_grid(path, steps, original_steps, grid)
    skip, out = np.zeros(len(found)), np.ones(len(found))
    if isinstance(path, NoiseSchedule):
        scaled = found.levels * scaling
        skip = _LCM_SIGMA_DATA**2 / (scaled**2 + _LCM_SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + _LCM_SIGMA_DATA**2)
    return _renoising("lcm", found, found.noise[1:], skip, out)


def tcd(
    path: Path,
    steps: int | None = None,
    *,
    eta: float = 0.3,
    original_steps: int = 50,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4; diffusers' TCDScheduler).

    It takes 4 steps by default. A row goes to the level s = (1 - eta) t' below the next one, and from there back up
    to t' by noise:

        x' = signal' x0 + signal' / signal_s noise_s eps + sqrt(noise'^2 - (signal' / signal_s)^2 noise_s^2) z

    On a schedule s is rounded down to a timestep, and the last row ends at timestep 0 and not at an image, as the
    authors' does.

    Args:
        eta: the paper's gamma: 0 is deterministic, 1 is noised anew from x0 alone.
        original_steps: as in :func:`stepfusion.lcm`.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    eta = _checks.number("eta", eta, 0.0, 1.0)
    given: dict[str, Any] = dict(grid)
    if isinstance(path, NoiseSchedule) and given.get("final_alpha_cumprod") is None:
        given["final_alpha_cumprod"] = float(path.alphas_cumprod[0])
    found = _distilled_grid(path, steps, original_steps, given)
    signal, noise = found.signal[1:], found.noise[1:]
    between_signal, between_noise = _levels_between(found, eta)
    ratio = np.append(signal[:-1] / between_signal, 1.0)
    of_eps = ratio * np.append(between_noise, noise[-1])
    sigma = np.sqrt(np.maximum(noise**2 - of_eps**2, 0.0))
    sigma[-1] = 0.0
    per_x = of_eps / found.noise[:-1]
    columns = {"next_x": per_x, "next_x0": signal - per_x * found.signal[:-1], "sigma": sigma}
    return found.table(f"tcd, eta {eta:g}", columns)


def _levels_between(grid: Grid, eta: float) -> tuple[Floats, Floats]:
    """The pairs at (1 - eta) of the levels after the first, [N - 1] each."""
    levels = (1 - eta) * grid.levels[1:]
    if grid.path.discrete:
        levels = np.floor(levels).astype(np.int64)
    return grid.path.pair(levels)


def _renoising(
    name: str, grid: Grid, sigma: Floats, skip: Floats | float = 0.0, out: Floats | float = 1.0
) -> StepTable:
    """Rows that take x0, or skip * x + out * x0 for it, and noise it anew; the last one does not."""
    signal = np.append(grid.signal[1:-1], 1.0)
    columns = {"next_x0": signal * out, "next_x": signal * skip, "sigma": np.append(sigma[:-1], 0.0)}
    return grid.table(name, columns)


def _distilled_grid(path: Path, steps: int | None, original_steps: int, options: Mapping[str, Any]) -> Grid:
    given = dict(options)
    if steps is None and not _lists_levels(given):
        steps = 4
    if isinstance(path, NoiseSchedule) and not _places(given) and not given.get("lambda_min_clipped"):
        total = path.num_timesteps
        original = _checks.integer("original_steps", original_steps, 1, total)
        steps = _checks.integer("steps", steps, 1, original)
        distilled = np.arange(original, 0, -1) * (total // original) - 1
        given["timesteps"] = distilled[np.arange(steps) * original // steps]
        steps = None
    return make_grid(path, steps, given)


def _trained_levels(path: SigmaPath, steps: Any, train_levels: int, rho: float | None) -> NDArray[np.float64]:
    steps = _checks.integer("steps", steps, 1, train_levels)
    rho = path.rho if rho is None else _checks.number("rho", rho, 0.0, open_low=True)
    high, low = path.sigma_max ** (1 / rho), path.sigma_min ** (1 / rho)
    place = np.arange(steps) * (train_levels // steps) / max(train_levels - 1, 1)
    levels: NDArray[np.float64] = (high + place * (low - high)) ** rho
    return levels


def _lists_levels(given: Mapping[str, Any]) -> bool:
    return given.get("levels") is not None or given.get("timesteps") is not None


def _places(given: Mapping[str, Any]) -> bool:
    """True if options say which levels are visited."""
    return _lists_levels(given) or given.get("spacing") is not None or given.get("lambda_min_clipped") is not None
