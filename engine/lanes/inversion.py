"""What DDIM inversion needs: images, and a table that climbs from them to noise."""

from __future__ import annotations

import torch

from stepfusion import _checks
from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.table import StepTable


def climbing_table(spec: ModelSpec, x: torch.Tensor, table: StepTable | None, steps: int | None) -> StepTable:
    """The table that takes ``x`` to noise: ``table``, or a :func:`stepfusion.ddim_inversion` of so many ``steps``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _checks.images("x", x, (len(x) if isinstance(x, torch.Tensor) and x.ndim else 0, *spec.shape))
    if table is not None and steps is not None:
        raise ValueError("table and steps exclude each other, got both")
    table = spec.table("ddim_inversion", steps) if table is None else table
    if isinstance(table, StepTable) and table.timesteps[0] > table.timesteps[-1]:
        raise ValueError(f"encode needs a table that climbs, as ddim_inversion makes it, got {table!r}")
    return table
