"""A sampler's table as JSON, for consumers that have no stepfusion, and back to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stepfusion.errors import ExportError
from stepfusion.export.manifest import Manifest, read_bundle_json, to_json
from stepfusion.kernels import COLUMNS
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable


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
        }
    )


def read_table(path: Path, manifest: Manifest) -> StepTable:
    """The table of a bundle, whose schedule stands in the manifest; ExportError if it is none."""
    given = read_bundle_json(path)
    betas: Mapping[str, Any] = manifest.model.get("schedule") or {}
    try:
        if given["columns"] != list(COLUMNS):
            raise ValueError(f"columns are {given['columns']}; accepted are {list(COLUMNS)}")
        coefficients = [[math.inf if value is None else value for value in row] for row in given["coefficients"]]
        return StepTable(
            given["name"],
            given["prediction"],
            NoiseSchedule(betas["betas"], name=betas["name"]),
            np.array(coefficients, dtype=np.float64),
            np.array(given["timesteps"], dtype=np.int64),
            np.array(given["next_row"], dtype=np.int64),
            tuple(given["starts"]),
            given["learned_variance"],
        )
    except KeyError as error:
        raise ExportError(f"{path} cannot be read: {error} is missing") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
