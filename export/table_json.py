"""A sampler's table as JSON, for consumers that have no stepfusion, and back to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from stepfusion.errors import ExportError
from stepfusion.export.manifest import MAX_JSON_BYTES, Text, to_json
from stepfusion.files.json_files import FileModel, read_typed
from stepfusion.kernels import COLUMNS
from stepfusion.kernels.coefficients import DEFAULTS
from stepfusion.samplers.path import Path as GaussianPath
from stepfusion.samplers.row_levels import RowLevels
from stepfusion.samplers.table import StepTable

#: How many columns files of earlier versions have, the first ones of today's.
_EARLIER = 14
_ARRAYS = ("signal", "noise", "told", "in_scale")


class _LevelsEntries(FileModel):
    """The fields of :class:`stepfusion.samplers.row_levels.RowLevels`."""

    signal: list[float]
    noise: list[float]
    told: list[float]
    in_scale: list[float]
    start_scales: list[float]


class _TableFile(FileModel):
    """What ``table.json`` must hold; whether the rows make a sampler, :class:`StepTable` finds out."""

    name: Text
    prediction: str
    learned_variance: bool
    columns: list[str]
    starts: list[int]
    timesteps: list[int]
    next_row: list[int]
    coefficients: list[list[float | None]]
    levels: _LevelsEntries | None = None


def table_to_json(table: StepTable) -> bytes:
    """A table as JSON: float64 in the shortest digits that give the same bits back; null is "no clip" (infinity)."""
    rows = [[None if math.isinf(value) else value for value in row] for row in table.coefficients.tolist()]
    return to_json(
        {
            "name": table.name,
            "prediction": table.prediction,
            "learned_variance": table.learned_variance,
            "columns": list(COLUMNS),
            "starts": list(table.starts),
            "timesteps": table.timesteps.tolist(),
            "next_row": table.next_row.tolist(),
            "coefficients": rows,
            **({} if table.levels is None else {"levels": _levels_to_json(table.levels)}),
        }
    )


def _levels_to_json(levels: RowLevels) -> dict[str, list[float]]:
    arrays = {name: getattr(levels, name).tolist() for name in _ARRAYS}
    return {**arrays, "start_scales": list(levels.start_scales)}


def _levels(given: _LevelsEntries | None) -> RowLevels | None:
    if given is None:
        return None
    signal, noise, told, in_scale = (np.array(getattr(given, name), dtype=np.float64) for name in _ARRAYS)
    return RowLevels(signal, noise, told, in_scale, tuple(given.start_scales))


def read_table(path: Path, schedule: GaussianPath) -> StepTable:
    """The table in a file of a bundle, made for a path; ExportError names the file and what is wrong with it."""
    given = read_typed(path, _TableFile, ExportError, MAX_JSON_BYTES)
    try:
        if given.columns not in (list(COLUMNS), list(COLUMNS[:_EARLIER])):
            accepted = f"{list(COLUMNS)}, or the first {_EARLIER}"
            raise ValueError(f"columns are {given.columns[:4]}; accepted are {accepted}")
        return StepTable(
            given.name,
            given.prediction,
            schedule,
            _coefficients(given.coefficients, len(given.columns)),
            np.array(given.timesteps, dtype=np.int64),
            np.array(given.next_row, dtype=np.int64),
            tuple(given.starts),
            given.learned_variance,
            _levels(given.levels),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ExportError(f"{path} cannot be used: {error}") from None


def _coefficients(rows: list[list[float | None]], columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The rows as an array [R, 21]; ValueError if one has not so many ``columns``. What is not there is as it was."""
    for number, row in enumerate(rows):
        if len(row) != columns:
            raise ValueError(f"row {number} of coefficients must have {columns} entries, got {len(row)}")
    values = [[math.inf if value is None else value for value in row] for row in rows]
    coefficients = np.tile([DEFAULTS.get(name, 0.0) for name in COLUMNS], (len(rows), 1))
    coefficients[:, :columns] = np.array(values, dtype=np.float64).reshape(-1, columns)
    if columns == _EARLIER:  # a row's x0 was there for the next one
        reads = coefficients[1:, COLUMNS.index("next_prev")] != 0
        coefficients[:-1, COLUMNS.index("keep_x0")] = reads
    return coefficients
