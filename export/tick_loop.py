"""The loop of a consumer around a tick: every row of a sampler, with the state and what rows keep of it handed on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stepfusion.export.manifest import Tensorspec
from stepfusion.export.runtimes import TickRuntime
from stepfusion.samplers.table import StepTable


def walk(
    tick: TickRuntime,
    inputs: Sequence[Tensorspec],
    table: StepTable,
    rows: Iterable[int],
    x: Tensor,
    lanes: Mapping[str, Tensor],
) -> Tensor:
    """The states after some rows of a table, float32 [B, C, H, W], the same rows for every lane.

    Args:
        inputs: of the tick, as a manifest lists them. A tick that was made when tables had fewer columns is given the
            first ones.
        x: the states to start from. lanes: ``seed`` and ``index``, and ``labels``, ``guidance`` and conditions if the
            tick takes them.
    """
    sizes = {spec.name: [int(size) for size in spec.shape[1:]] for spec in inputs}
    feed = {**lanes, **table_inputs(table, x.device)}
    feed["coefficients"] = feed["coefficients"][:, : sizes["coefficients"][0]]
    if "history" in sizes:
        feed["history"] = x.new_zeros(len(x), *sizes["history"])  # the first row reads nothing of it
    for row in rows:
        feed |= {"x": x, "row": torch.full_like(lanes["index"], row)}
        x, *kept = outputs_of(tick(*(feed[spec.name] for spec in inputs)))
        feed |= dict(zip(("history",), kept, strict=False))
    return x


def table_inputs(table: StepTable, device: torch.device) -> dict[str, Tensor]:
    """What a tick takes of a table, by the names of its inputs.

    ``coefficients`` float32 [R, 21], ``timesteps`` int64 [R], ``told`` and ``in_scale`` float32 [R].
    """
    values = table.on(device)
    scales = torch.tensor([table.in_scale(row) for row in range(len(table))], dtype=torch.float32)
    return {
        "coefficients": values.coefficients,
        "timesteps": values.timesteps,
        "told": values.told.to(torch.float32),
        "in_scale": scales.to(device),
    }


def outputs_of(returned: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a tick returned: x_next and, if it keeps a history, the next one."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)
