"""Which table takes images to noise."""

from __future__ import annotations

from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.table import StepTable


def climbing_table(spec: ModelSpec, table: StepTable | None, steps: int | None) -> StepTable:
    """The table as given, or the DDIM inversion of so many steps.

    Raises:
        TypeError, ValueError: both are given, the model's path has no timesteps, or the table leads to images.
    """
    if not spec.schedule.discrete:
        raise ValueError(
            "encode and reconstruct climb the timesteps of a discrete schedule, and this engine's path is "
            f"{spec.schedule!r}, which has none"
        )
    if table is not None and steps is not None:
        raise ValueError("table and steps exclude each other, got both")
    table = spec.table("ddim_inversion", steps) if table is None else table
    if isinstance(table, StepTable) and table.timesteps[0] > table.timesteps[-1]:
        raise ValueError(f"encode needs a table that climbs, as ddim_inversion makes it, got {table!r}")
    return table
