"""The levels that a sampler visits on any path, and the table of the rows that it makes between them.

A sampler is a function of a :class:`Grid`: it says what its rows do with x, x0, the history and the noise, in columns
that :meth:`Grid.table` completes by what does not depend on the sampler: how the network's output becomes x0, how x0
is bounded, where a known region goes, and how rows guide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.samplers.lambda_bound import checked_lambda, timesteps_in_bound
from stepfusion.samplers.levels import (
    Visits,
    bounds_of_x0,
    check_schedule,
    final_level,
    guidance_columns,
    levels_to_visit,
)
from stepfusion.samplers.path import FlowPath, Path
from stepfusion.samplers.row_levels import RowLevels
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.spacing import given_levels, level_of_half_log_snr, spaced_levels
from stepfusion.samplers.table import StepTable

Floats = NDArray[np.float64]


class GridOptions(TypedDict, total=False):
    """The options that samplers on any path share.

    Attributes:
        timesteps: on a :class:`stepfusion.NoiseSchedule`: the very timesteps to visit, in place of ``steps``, as in
            :func:`stepfusion.ddpm`.
        levels: on other paths: the very levels (sigma, or t) to visit, strictly decreasing, without the one where
            the last row ends.
        spacing: how ``steps`` levels are spread: on a schedule :data:`stepfusion.samplers.timesteps.ALL_SPACINGS`,
            "trailing" by default; on other paths :func:`stepfusion.samplers.spacing.spaced_levels`.
        steps_offset: of the spacing "leading".
        rho: of the spacing "karras".
        prediction: what the network returns, by default what is usual on the path: "epsilon", "edm" or "flow".
        clip: the bound of the predicted |x0|, or None, the default.
        threshold, sample_max_value: dynamic thresholding in place of the clip, as in :func:`stepfusion.ddpm`.
        final_alpha_cumprod: on a schedule: abar where the last row ends, 1 by default.
        final_level: on other paths: the level where the last row ends, 0 by default.
        lambda_min_clipped: the noisiest level to visit, as log(signal / noise).
        guidance_interval: (low, high), levels of the path: rows at others do not guide (Kynkaanniemi et al. 2024).
        guidance_rescale: phi in [0, 1] of rescaled guidance (Lin et al. 2024, section 3.4), 0 by default; it runs on
            the reference path.
    """

    timesteps: Sequence[int] | Visits | str | None
    levels: Sequence[float] | NDArray[Any] | None
    spacing: str | None
    steps_offset: int
    rho: float | None
    prediction: str | None
    clip: float | None
    threshold: float | None
    sample_max_value: float
    final_alpha_cumprod: float | None
    final_level: float | None
    lambda_min_clipped: float | None
    guidance_interval: Sequence[float] | None
    guidance_rescale: float


#: Of which networks a sampler bounds the noisiest level by default: none, those that return epsilon, or any.
Bound = Literal["epsilon", "any"] | None

#: What the options of :class:`GridOptions` are if they are not given.
GRID_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(GridOptions.__annotations__),
    "steps_offset": 0,
    "sample_max_value": 1.0,
    "guidance_rescale": 0.0,
}


@dataclass(frozen=True, eq=False)
class Grid:
    """N levels of a path, from noise to data, and the level where the last step ends.

    Attributes:
        path, prediction: what they are of, and what the network returns.
        levels: int64 or float64 [N].
        signal, noise: float64 [N + 1], with the end.
        options: all of :class:`GridOptions`.
    """

    path: Path
    prediction: str
    levels: NDArray[Any]
    signal: Floats
    noise: Floats
    options: GridOptions

    def __len__(self) -> int:
        """N."""
        return len(self.levels)

    @cached_property
    def half_log_snr(self) -> Floats:
        """log(signal / noise) [N + 1], infinite where one of them is 0."""
        with np.errstate(divide="ignore"):
            result: Floats = np.log(self.signal) - np.log(self.noise)
        return result

    @cached_property
    def scale(self) -> Floats:
        """[N + 1]: x / scale is integrated over :attr:`time`: the signal, or on a flow 1.

        In both cases d(x / scale) / dtime = (x / scale - x0) / time.
        """
        return np.ones_like(self.signal) if isinstance(self.path, FlowPath) else self.signal

    @cached_property
    def time(self) -> Floats:
        """[N + 1]: noise / scale, infinite where there is no signal."""
        with np.errstate(divide="ignore"):
            result: Floats = self.noise / self.scale
        return result

    def table(
        self,
        name: str,
        columns: Mapping[str, Any],
        *,
        levels: NDArray[Any] | None = None,
        ends: tuple[Floats, Floats] | None = None,
        start_scale: float | None = None,
    ) -> StepTable:
        """The table of rows [R] that start at ``levels`` [R] and end at levels with the pairs ``ends``.

        By default one row a step.
        """
        levels = self.levels if levels is None else levels
        signal, noise = (self.signal[1:], self.noise[1:]) if ends is None else ends
        x0_x, x0_out = self.path.predict(self.prediction, levels)
        known = {"known_x": np.append(signal[:-1], 1.0), "known_sigma": np.append(noise[:-1], 0.0)}
        complete = {"x0_x": x0_x, "x0_out": x0_out, **known, **columns, **row_options(self.options, levels)}
        at = None if self.path.discrete else RowLevels.at(self.path, self.prediction, levels, start_scale)
        keys = self.path.keys(levels)
        return StepTable.from_columns(name, self.prediction, self.path, keys, complete, levels=at)


def row_options(options: GridOptions, levels: NDArray[Any]) -> dict[str, Any]:
    """The columns of rows at ``levels`` [R] that bound x0, and that say how they guide."""
    bounds = bounds_of_x0(options["clip"], options["threshold"], options["sample_max_value"], len(levels))
    return bounds | guidance_columns(levels, options["guidance_interval"], options["guidance_rescale"])


def make_grid(path: Path, steps: int | None, given: Mapping[str, Any], *, bounded: Bound = None) -> Grid:
    """The grid of ``steps``, or of a list of levels, with options of :class:`GridOptions`.

    Timesteps are spaced as "trailing" if no spacing is asked for.

    Args:
        bounded: as in :func:`schedule_levels`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    options = complete_options(given)
    if isinstance(path, NoiseSchedule):
        visits, visited = schedule_levels(path, steps, options, "trailing", bounded=bounded)
        abar = np.append(visited, final_level(path, options["final_alpha_cumprod"], visited.dtype)).astype(np.float64)
        return Grid(path, prediction_of(path, options), visits, abar**0.5, (1 - abar) ** 0.5, options)
    if not isinstance(path, Path):
        raise TypeError(f"schedule must be a NoiseSchedule or another path, got {type(path).__name__}")
    return _of_path(path, steps, options)


def complete_options(given: Mapping[str, Any]) -> GridOptions:
    """All options of :class:`GridOptions`, TypeError if ``given`` holds another."""
    if unknown := sorted(given.keys() - GRID_DEFAULTS.keys()):
        raise TypeError(f"there is no option {unknown[0]!r}; options of all samplers are {', '.join(GRID_DEFAULTS)}")
    return cast(GridOptions, {**GRID_DEFAULTS, **given})


def prediction_of(path: Path, options: GridOptions) -> str:
    """What the network returns, by default what is usual on the path."""
    return path.predictions[0] if options["prediction"] is None else options["prediction"]


def schedule_levels(
    path: NoiseSchedule,
    steps: int | None,
    options: GridOptions,
    spacing: str,
    *,
    compat: str | None = None,
    bounded: Bound = None,
) -> tuple[Visits, NDArray[np.floating[Any]]]:
    """The timesteps to visit, decreasing, and abar at each, in float32 with ``compat="diffusers"``.

    Args:
        spacing: if ``options`` have none.
        bounded: by default the noisiest level is bounded, as in :func:`stepfusion.dpmpp_2m`: if the network returns
            epsilon, or with "any" whatever it returns; None for no bound.
    """
    check_schedule(path)
    _refuse(options, ("levels", "final_level"), "a path whose levels are real numbers", path)
    prediction, bound = prediction_of(path, options), options["lambda_min_clipped"]
    total = timesteps_in_bound(path, steps, options["timesteps"], _bounded_as(prediction, bounded), bound)
    if options["spacing"] is not None:
        spacing = options["spacing"]
    given = options["timesteps"], spacing, options["steps_offset"], prediction, compat
    return levels_to_visit(path, steps, *given, total=total, rho=options["rho"])


def _bounded_as(prediction: str, bounded: Bound) -> str:
    """A prediction that is bounded as this one is to be."""
    if bounded is None:
        return "sample"
    return "epsilon" if bounded == "any" else prediction


def _of_path(path: Path, steps: int | None, options: GridOptions) -> Grid:
    _refuse(options, ("timesteps", "steps_offset", "final_alpha_cumprod"), "a NoiseSchedule", path)
    prediction = prediction_of(path, options)
    _checks.choice("prediction", prediction, path.predictions)
    levels = _levels(path, steps, options)
    path.predict(prediction, levels[:1])  # raises if what the network returns says nothing there
    end = 0.0 if options["final_level"] is None else _checks.number("final_level", options["final_level"], 0.0)
    if end >= levels[-1]:
        raise ValueError(f"final_level must lie below the last level {levels[-1]:g}, got {end:g}")
    signal, noise = path.pair(np.append(levels, end))
    return Grid(path, prediction, levels, signal, noise, options)


def _levels(path: Path, steps: int | None, options: GridOptions) -> Floats:
    bound = options["lambda_min_clipped"]
    if options["levels"] is not None:
        for name in ("spacing", "rho", "lambda_min_clipped"):
            if options[name] is not None:
                raise ValueError(f"{name} and levels exclude each other, got both")
        if steps is not None:
            raise ValueError("steps and levels exclude each other, got both")
        return given_levels(path, options["levels"])
    if steps is None:
        raise ValueError(f"steps or levels must be given on {path!r}, got neither")
    lowest = -math.inf if bound is None else checked_lambda(bound)
    noisiest = math.inf if lowest == -math.inf else level_of_half_log_snr(path, lowest)
    return spaced_levels(path, steps, options["spacing"], rho=options["rho"], noisiest=noisiest)


def _refuse(options: GridOptions, names: Sequence[str], whose: str, path: Path) -> None:
    """ValueError if one of the options that are not of this kind of path is given."""
    for name in names:
        value = options[name]  # type: ignore[literal-required]
        if value is not None and not (name == "steps_offset" and value == 0):
            raise ValueError(f"{name} is an option of {whose}, got it with {path!r}")
