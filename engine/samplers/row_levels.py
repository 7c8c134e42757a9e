"""Where the rows of a table start on their path: what a tick must know beside the coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepfusion.samplers.path import Floats, Path


@dataclass(frozen=True, eq=False)
class RowLevels:
    """The level at which each of R rows starts, as four float64 arrays [R].

    Attributes:
        signal, noise: an image stands there as signal * x0 + noise * eps.
        told: what the network is told.
        in_scale: what x is multiplied with before the network sees it.
        start_scales: for each sampler of the table the standard deviation of the noise that it starts from.

    Raises:
        TypeError, ValueError: an array has another dtype or length, or a value is not finite.
    """

    signal: Floats
    noise: Floats
    told: Floats
    in_scale: Floats
    start_scales: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("signal", "noise", "told", "in_scale"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.float64:
                given = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise TypeError(f"{name} must be an array of float64, got {given}")
            if array.shape != self.signal.shape or array.ndim != 1:
                raise ValueError(f"{name} must have shape {list(self.signal.shape)}, got {list(array.shape)}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
            array.flags.writeable = False
        if not all(type(scale) is float and 0 <= scale < np.inf for scale in self.start_scales):
            raise ValueError(f"start_scales must be finite and not negative, got {self.start_scales}")

    @property
    def arrays(self) -> tuple[Floats, Floats, Floats, Floats]:
        """The four arrays, in their order."""
        return self.signal, self.noise, self.told, self.in_scale

    @classmethod
    def at(cls, path: Path, prediction: str, levels: Floats, start_scale: float | None = None) -> RowLevels:
        """Rows that start at ``levels`` [R] of a path; by default the path says how noisy the first one starts."""
        levels = np.asarray(levels, dtype=np.float64)
        signal, noise = path.pair(levels)
        scale = path.start_scale(float(levels[0])) if start_scale is None else float(start_scale)
        told = np.asarray(path.told(levels), dtype=np.float64)
        return cls(signal, noise, told, path.in_scale(prediction, levels), (scale,))

    def net_scale(self, next_row: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats:
        """The ``in_scale`` of the row after each, 1 after a last one: float64 [R]."""
        return np.where(next_row < 0, 1.0, self.in_scale[next_row])

    def last(self, rows: int) -> RowLevels:
        """Those of the last ``rows`` rows, for a start from an image noised to the first of them."""
        signal, noise, told, in_scale = (array[-rows:].copy() for array in self.arrays)
        return RowLevels(signal, noise, told, in_scale, (float(noise[0]),))

    @classmethod
    def concatenate(cls, parts: Sequence[RowLevels]) -> RowLevels:
        """The rows of several tables, one after the other."""
        joined = [np.concatenate(arrays) for arrays in zip(*(part.arrays for part in parts), strict=True)]
        signal, noise, told, in_scale = joined
        return cls(signal, noise, told, in_scale, tuple(scale for part in parts for scale in part.start_scales))
