"""Walks a request and keeps what a rollout holds: which rows have a log-probability, and the states around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepfusion import _checks
from stepfusion.kernels.coefficients import HISTORY
from stepfusion.kernels.launch import plain_torch
from stepfusion.lanes.lane_engine import LaneEngine
from stepfusion.lanes.offline import OfflineLanes, room_for
from stepfusion.lanes.request import LaneStart, Request
from stepfusion.lanes.rollout import Rollout, kept_states
from stepfusion.lanes.runner import as_int64
from stepfusion.lanes.runners import Runners
from stepfusion.lanes.transfer import as_index
from stepfusion.samplers.table import StepTable

_SAMPLERS = "ddpm, ddim with eta > 0, euler_ancestral or flow_sde"


@plain_torch(gradients=False)
def record(runners: Runners, request: Request, rows: Sequence[int] | None, device: torch.device) -> Rollout:
    """Make the images of a request, and keep the chosen rows of each, on ``device``.

    Raises:
        TypeError, ValueError: naming what has no log-probability. NonFiniteError: naming image and step.
    """
    chosen = chosen_rows(request, rows)
    recorder = _Recorder(chosen, len(request), runners.spec.shape, device)
    images = room_for(runners, request)
    lanes = OfflineLanes(runners, request, images, strict=True, watched=False, record=recorder.record)
    for _ in lanes.run():
        pass
    lanes.check()
    columns = _columns(request, device)
    noise = None if request.noise is None else request.noise[list(chosen)].to(device, torch.float32)
    return Rollout(
        request.table, chosen, images.to(device), recorder.states, recorder.logprobs, noise=noise, **columns
    )


def chosen_rows(request: Request, rows: Sequence[int] | None) -> tuple[int, ...]:
    """The rows whose steps have a log-probability, or those of them that are asked for; ValueError for others."""
    table = request.table
    if len(table.starts) != 1:
        raise ValueError(f"a rollout needs one table for all images, got {len(table.starts)}")
    if table.reuses is not None:
        raise ValueError("a rollout cannot reuse: what a row then makes of x depends on the rows before it")
    if request.known is not None:
        raise ValueError("a rollout cannot have a mask: the network does not choose what is kept of the image")
    noisy = np.flatnonzero(table.column("sigma") != 0).tolist()
    if rows is None:
        asked = noisy
        if not asked:
            raise ValueError(f"{table!r} adds no noise, so that its steps have no probability: use {_SAMPLERS}")
    else:
        asked = sorted(set(_checks.integers("rows", rows, len(rows), 0, len(table) - 1)))
        if not asked:
            raise ValueError("rows must have at least one row, got none")
    for row in asked:
        if (reason := _why_no_logprob(table, row)) is not None:
            raise ValueError(f"row {row} of {table!r} {reason}: choose other rows, or use {_SAMPLERS}")
    return tuple(asked)


def _why_no_logprob(table: StepTable, row: int) -> str | None:
    """Why the step of a row is no Gaussian of x and the network's output alone; None if it is."""
    if not bool(table.transitions[row].isnan().any()):
        return None
    if any(table.column(name)[row] != 0 for name in HISTORY):
        return "takes a part of its mean from what earlier rows left, so that x alone does not say it"
    return "adds no noise, so that its step has no probability"


class _Recorder:
    """Room for what a rollout keeps, filled while lanes run."""

    def __init__(self, rows: Sequence[int], images: int, shape: Sequence[int], device: torch.device) -> None:
        self._steps = {row: place for place, row in enumerate(rows)}
        self._states = {state: place for place, state in enumerate(kept_states(rows))}
        self.states = torch.empty((len(self._states), images, *shape), dtype=torch.float32, device=device)
        self.logprobs = torch.empty((len(rows), images), dtype=torch.float64, device=device)

    def record(self, lanes: LaneEngine) -> None:
        """Keep the states that the images in lanes are in, and how probable the steps there were."""
        for made, occupants in lanes.at_steps().items():
            where = as_index([occupant.image for occupant in occupants], self.states.device)
            if (state := self._states.get(made)) is not None:
                self.states[state, where] = lanes.values(occupants, "x").to(self.states.device)
            if (step := self._steps.get(made - 1)) is not None:
                self.logprobs[step, where] = lanes.values(occupants, "logprobs").to(self.states.device)


def _columns(request: Request, device: torch.device) -> dict[str, Any]:
    """What each image was asked for, as tensors [n, ...]."""
    starts = list(request.lane_starts)
    both = [start.conditions for start in starts if start.conditions is not None]
    return {
        "seeds": torch.tensor([as_int64(start.seed) for start in starts], dtype=torch.int64, device=device),
        "indices": torch.tensor([start.index for start in starts], dtype=torch.int64, device=device),
        "labels": _labels(starts, mixed=request.mixed).to(device),
        "guidance": _guidance(starts).to(device) if request.guided else None,
        "conditions": _stacked([one.given.load() for one in both], device),
        "null_conditions": _stacked([one.null.load() for one in both] if request.guided else [], device),
    }


def _labels(starts: Sequence[LaneStart], *, mixed: bool) -> Tensor:
    return torch.tensor([start.label for start in starts], dtype=torch.float32 if mixed else torch.int64)


def _guidance(starts: Sequence[LaneStart]) -> Tensor:
    return torch.tensor([start.guidance for start in starts], dtype=torch.float32)


def _stacked(conditions: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Conditions of one image each, by name, as tensors [n, ...]."""
    if not conditions:
        return {}
    return {name: torch.stack([one[name].detach() for one in conditions]).to(device) for name in conditions[0]}
