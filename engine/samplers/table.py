"""A sampler as a table: one row of coefficients a step, in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.kernels import COLUMNS, PARKED, transitions_of
from stepfusion.kernels.coefficients import DEFAULTS, HISTORY, WHOLE_IMAGE
from stepfusion.samplers.path import Path
from stepfusion.samplers.row_levels import RowLevels
from stepfusion.samplers.table_html import table_html

_LAST_KEY = (1 << 31) - 1  # of the bits of a positive float32


@dataclass(frozen=True, eq=False)
class StepTable:
    """The rows that a lane walks, first to last, and what they were made for.

    ``schedule`` is the path: a :class:`stepfusion.NoiseSchedule`, :class:`stepfusion.SigmaPath` or
    :class:`stepfusion.FlowPath`. ``coefficients`` float64 [R, 21], the columns :data:`stepfusion.kernels.COLUMNS`;
    ``timesteps`` int64 [R], what keys the noise, and on a discrete schedule what the network is told; ``next_row``
    int64 [R], the row after each, or -1; ``starts``, the first row of each of the samplers in it, whose rows stand
    one after the other; ``levels``, where the rows start on a path that is not discrete, else None; ``reuses`` bool
    [R], the rows at which a network may reuse what its inner levels made before, None for none. Made by
    :func:`stepfusion.ddpm`, :func:`stepfusion.ddim`, :func:`stepfusion.dpmpp_2m`,
    :func:`stepfusion.euler_ancestral` and :func:`stepfusion.ddim_inversion`; :meth:`concatenate` joins several, and
    :meth:`last` takes the end of one.

    Raises:
        TypeError, ValueError: a field has another type, shape or value than these, or a lane would walk other rows
            than those of its sampler, each once.
    """

    name: str
    prediction: str
    schedule: Path
    coefficients: NDArray[np.float64]
    timesteps: NDArray[np.int64]
    next_row: NDArray[np.int64]
    starts: tuple[int, ...] = (0,)
    learned_variance: bool = False
    levels: RowLevels | None = None
    reuses: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Path):
            raise TypeError(f"schedule must be a NoiseSchedule or another path, got {type(self.schedule).__name__}")
        _checks.choice("prediction", self.prediction, self.schedule.predictions)
        _checks.boolean("learned_variance", self.learned_variance)
        self._check_arrays()
        self._check_timesteps()
        self._check_coefficients()
        self._check_walks()
        self._check_levels()
        self._check_reuses()
        for array in (self.coefficients, self.timesteps, self.next_row):
            array.flags.writeable = False

    def _check_arrays(self) -> None:
        for name, kind in (("coefficients", np.float64), ("timesteps", np.int64), ("next_row", np.int64)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != kind:
                given = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise TypeError(f"{name} must be an array of {np.dtype(kind)}, got {given}")
        if self.timesteps.ndim != 1:
            raise ValueError(f"timesteps must be one-dimensional, got shape {list(self.timesteps.shape)}")
        rows = len(self.timesteps)
        if self.coefficients.shape != (rows, len(COLUMNS)) or self.next_row.shape != (rows,):
            raise ValueError(
                f"a table of {rows} rows must have coefficients [{rows}, {len(COLUMNS)}] and next_row [{rows}], "
                f"got {list(self.coefficients.shape)} and {list(self.next_row.shape)}"
            )

    def _check_timesteps(self) -> None:
        last = self.schedule.max_steps - 1 if self.schedule.discrete else _LAST_KEY
        if len(self) == 0 or self.timesteps.min() < 0 or self.timesteps.max() > last:
            raise ValueError(
                f"a table must have rows with timesteps in [0, {last}], got {self.timesteps.tolist()[:8]}"
            )

    def _check_coefficients(self) -> None:
        finite = np.isfinite(self.coefficients)
        finite[:, COLUMNS.index("clip")] |= np.isposinf(self.coefficients[:, COLUMNS.index("clip")])
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"coefficient {COLUMNS[column]} of row {row} (timestep {self.timesteps[row]}) is "
                f"{self.coefficients[row, column]}, which no network output can be multiplied with"
            )

    def _check_walks(self) -> None:
        """ValueError unless a lane from each start walks the rows up to the next start, each once, and is done.

        An engine counts on it: it knows by counting when a lane is done. Rows that lead back would never end.
        """
        rows = len(self)
        if self.next_row.min() < PARKED or self.next_row.max() >= rows:
            raise ValueError(f"next_row must lie in [{PARKED}, {rows - 1}], got {self.next_row.tolist()[:8]}")
        starts = self.starts
        if not isinstance(starts, tuple) or not all(type(start) is int for start in starts):
            raise TypeError(f"starts must be a tuple of integers, got {starts!r}"[:200])
        if starts[:1] != (0,) or any(b <= a for a, b in zip(starts, (*starts[1:], rows), strict=True)):
            raise ValueError(f"starts must rise from 0 and stay below {rows} rows, got {list(starts[:8])}")
        wanted = np.arange(1, rows + 1)
        wanted[[start - 1 for start in (*starts[1:], rows)]] = PARKED
        if (wrong := np.flatnonzero(self.next_row != wanted)).size:
            row = int(wrong[0])
            raise ValueError(
                f"next_row must lead through the rows of each sampler once, and then be {PARKED}: after row {row} "
                f"comes {wanted[row]}, got {self.next_row[row]}"
            )

    def _check_levels(self) -> None:
        """TypeError or ValueError unless the rows' levels are given exactly where timesteps do not say them."""
        if self.schedule.discrete:
            if self.levels is not None:
                raise ValueError("levels must be None on a discrete schedule, whose timesteps say them")
            return
        if not isinstance(self.levels, RowLevels):
            raise TypeError(f"levels must be RowLevels on {self.schedule!r}, got {type(self.levels).__name__}")
        if len(self.levels.told) != len(self) or len(self.levels.start_scales) != len(self.starts):
            raise ValueError(
                f"levels must be of {len(self)} rows and {len(self.starts)} starts, got {len(self.levels.told)} and "
                f"{len(self.levels.start_scales)}"
            )
        if not np.array_equal(self.column("net_scale"), self.levels.net_scale(self.next_row)):
            raise ValueError("net_scale must be the in_scale of the row after each")

    def _check_reuses(self) -> None:
        if self.reuses is None:
            return
        if not isinstance(self.reuses, np.ndarray) or self.reuses.dtype != np.bool_ or len(self.reuses) != len(self):
            raise TypeError(f"reuses must be an array of bool [{len(self)}], got {self.reuses!r}"[:200])
        if self.reuses[list(self.starts)].any():
            raise ValueError("reuses must be False where a sampler starts: nothing was made before")

    def __len__(self) -> int:
        """The number of rows, of all its samplers together."""
        return len(self.timesteps)

    def steps(self, part: int = 0) -> int:
        """How many steps a lane takes from ``starts[part]``."""
        return (*self.starts[1:], len(self))[part] - self.starts[part]

    def column(self, name: str) -> NDArray[np.float64]:
        """One column of the coefficients by its name, [R]."""
        _checks.choice("column", name, COLUMNS)
        return self.coefficients[:, COLUMNS.index(name)]

    @cached_property
    def stochastic(self) -> bool:
        """True if some row adds noise."""
        return bool((self.column("sigma") != 0).any())

    @cached_property
    def history(self) -> int:
        """How much of what earlier rows kept some row uses, 0 to 3 entries: the history that a lane must have."""
        used = [age for age, name in enumerate(HISTORY, 1) if (self.column(name) != 0).any()]
        return max(used, default=0)

    @cached_property
    def whole_image(self) -> bool:
        """True if some row needs all elements of an image at once: dynamic thresholding, rescaled guidance."""
        return any(bool((self.column(name) != 0).any()) for name in WHOLE_IMAGE)

    @cached_property
    def edits(self) -> bool:
        """True if every row says how to noise a known region again: of samplers, and not of an inversion."""
        return bool((self.column("known_x") != 0).all())

    @property
    def starts_idle(self) -> bool:
        """True if the first row leaves x as it is and keeps nothing, as a corrector without its predictor does."""
        moves = ("next_x0", "next_out", "sigma", *HISTORY, "keep_x", "keep_x0")
        return bool(self.column("next_x")[0] == 1 and not any(self.column(name)[0] for name in moves))

    @cached_property
    def transitions(self) -> torch.Tensor:
        """What the log-probability of each row's step needs (:func:`stepfusion.kernels.transitions_of`), [R, 2]."""
        return transitions_of(torch.from_numpy(self.coefficients.copy()))

    @cached_property
    def told(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """What the network is told at each row, [R]."""
        return self.timesteps if self.levels is None else self.levels.told

    @cached_property
    def start_scales(self) -> tuple[float, ...]:
        """The standard deviation of the noise that each of its samplers starts from."""
        return (1.0,) * len(self.starts) if self.levels is None else self.levels.start_scales

    def in_scale(self, row: int) -> float:
        """What the network sees at a row is this times x."""
        return 1.0 if self.levels is None else float(self.levels.in_scale[row])

    def pairs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Signal and noise of the level where each row starts, [R] each."""
        if self.levels is None:
            return self.schedule.pair(self.timesteps)
        return self.levels.signal, self.levels.noise

    def last(self, steps: int) -> StepTable:
        """The last ``steps`` rows, for a start from an image noised to the level where the first of them starts.

        What that row would take from the rows before it, it takes from what it keeps itself, or from its own x0: a
        first-order step. What a row
        after it would take from those, it takes from the oldest entry of its history that is there.
        """
        if len(self.starts) != 1:
            raise ValueError(f"last needs a table of one sampler, got one of {len(self.starts)}")
        steps = _checks.integer("steps", steps, 1, len(self))
        if steps == len(self):
            return self
        coefficients = self.coefficients[-steps:].copy()
        _forget(coefficients)
        following = self.next_row[-steps:]
        following = np.where(following == PARKED, PARKED, following - (len(self) - steps))
        name = f"{self.name}, last {steps} of {len(self)}"
        return replace(
            self,
            name=name,
            coefficients=coefficients,
            timesteps=self.timesteps[-steps:].copy(),
            next_row=following,
            levels=None if self.levels is None else self.levels.last(steps),
            reuses=None if self.reuses is None else np.append(False, self.reuses[len(self) - steps + 1 :]),
        )

    def reusing(self, every: int) -> StepTable:
        """The same table: every ``every``-th row runs the whole network, and the others its outermost level.

        They reuse what the inner levels made at the last of those rows (Ma et al. 2024). At 1 every row is
        whole, as without this.
        """
        every = _checks.integer("every", every, 1, 1 << 31)
        if every == 1:
            return replace(self, reuses=None)
        place = np.arange(len(self)) - np.repeat(self.starts, [self.steps(part) for part in range(len(self.starts))])
        return replace(self, name=f"{self.name}, whole every {every} rows", reuses=place % every != 0)

    @cached_property
    def digest(self) -> bytes:
        """What tells its rows from those of other tables: a hash of all that a lane reads of them, 32 bytes."""
        levels = () if self.levels is None else (self.levels.told, self.levels.in_scale)
        reuses = () if self.reuses is None else (self.reuses,)
        arrays = (self.coefficients, self.timesteps, self.next_row, *levels, *reuses)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()

    @classmethod
    def from_columns(
        cls,
        name: str,
        prediction: str,
        schedule: Path,
        timesteps: NDArray[np.int64],
        columns: Mapping[str, NDArray[np.floating]],
        *,
        learned_variance: bool = False,
        levels: RowLevels | None = None,
    ) -> StepTable:
        """One sampler's table; columns that are not given are 0, but ``net_scale`` follows from ``levels``."""
        rows = len(timesteps)
        next_row = np.append(np.arange(1, rows, dtype=np.int64), PARKED)
        if levels is not None:
            columns = {**columns, "net_scale": levels.net_scale(next_row)}
        given = [np.broadcast_to(columns.get(c, np.float64(DEFAULTS.get(c, 0.0))), rows) for c in COLUMNS]
        coefficients = np.stack(given, axis=1).astype(np.float64)
        return cls(
            name,
            prediction,
            schedule,
            coefficients,
            timesteps.copy(),
            next_row,
            learned_variance=learned_variance,
            levels=levels,
        )

    @classmethod
    def concatenate(cls, tables: Sequence[StepTable]) -> StepTable:
        """Several samplers in one table, so that lanes of one batch may walk different ones.

        Part i starts at ``starts[i]``. ValueError unless all have one prediction type and one schedule.
        """
        if not tables:
            raise ValueError("concatenate needs at least one table, got none")
        first = tables[0]
        starts: list[int] = []
        offset = 0
        next_rows = []
        for table in tables:
            if not isinstance(table, StepTable):
                raise TypeError(f"concatenate takes StepTables, got {type(table).__name__}")
            if table.prediction != first.prediction:
                raise ValueError(
                    f"tables must share a prediction type, got {first.prediction!r} and {table.prediction!r}"
                )
            if table.schedule != first.schedule:
                raise ValueError(f"tables must share a schedule, got {first.schedule} and {table.schedule}")
            starts.extend(start + offset for start in table.starts)
            next_rows.append(np.where(table.next_row == PARKED, PARKED, table.next_row + offset))
            offset += len(table)
        return cls(
            " + ".join(table.name for table in tables),
            first.prediction,
            first.schedule,
            np.concatenate([table.coefficients for table in tables]),
            np.concatenate([table.timesteps for table in tables]),
            np.concatenate(next_rows),
            tuple(starts),
            any(table.learned_variance for table in tables),
            None
            if first.levels is None
            else RowLevels.concatenate([t.levels for t in tables if t.levels is not None]),
            None
            if all(table.reuses is None for table in tables)
            else np.concatenate([np.zeros(len(t), np.bool_) if t.reuses is None else t.reuses for t in tables]),
        )

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> DeviceTable:
        """The table as tensors on a device, coefficients rounded to ``dtype``."""
        return DeviceTable(
            torch.from_numpy(self.coefficients.copy()).to(device, dtype),
            torch.from_numpy(self.timesteps.copy()).to(device),
            torch.from_numpy(self.next_row.copy()).to(device),
            torch.from_numpy(self.told.copy()).to(device, torch.int64 if self.levels is None else torch.float32),
        )

    def __repr__(self) -> str:
        return f"StepTable({self.name}, {len(self)} rows, {self.prediction}, {self.schedule.name})"

    def _repr_html_(self) -> str:
        return table_html(self)


def _forget(coefficients: NDArray[np.float64]) -> None:
    """Let rows [R, 21] start without a history, in place.

    What rows take from entries that are not there they take from the oldest one that is, and the first rows from what
    they keep themselves, keep_x * x + keep_x0 * x0; a row that keeps nothing there has the weights of the next one.
    """
    older = [COLUMNS.index(name) for name in HISTORY]
    of_x, of_x0 = COLUMNS.index("next_x"), COLUMNS.index("next_x0")
    keep = coefficients[:, [COLUMNS.index("keep_x"), COLUMNS.index("keep_x0")]]
    keeps: NDArray[np.bool_] = np.asarray(keep.any(axis=1))
    kept = 0
    for i, row in enumerate(coefficients):
        missing = older[kept:]
        weight = row[missing].sum()
        row[missing] = 0.0
        if kept:
            row[older[kept - 1]] += weight
        elif weight:
            own = [*keep[i:][keeps[i:]], (0.0, 1.0)][0]
            row[of_x] += weight * own[0]
            row[of_x0] += weight * own[1]
        kept = min(kept + bool(keeps[i]), len(HISTORY))


@dataclass(frozen=True)
class DeviceTable:
    """A :class:`StepTable` on a device.

    coefficients float32 [R, 21]; timesteps, next_row int64 [R]; told int64 or float32 [R], what the network is told.
    """

    coefficients: torch.Tensor
    timesteps: torch.Tensor
    next_row: torch.Tensor
    told: torch.Tensor
