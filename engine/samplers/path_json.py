"""Paths as JSON values, as exports and checkpoints hold them, and back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from stepfusion.files.strict_model import StrictModel
from stepfusion.samplers.path import FlowPath, Path, SigmaPath
from stepfusion.samplers.schedule import NoiseSchedule


class ScheduleEntries(StrictModel):
    """A :class:`stepfusion.NoiseSchedule` by its float64 betas."""

    path: Literal["schedule"] = "schedule"
    name: str
    betas: Annotated[list[float], Field(min_length=1)]


class SigmaEntries(StrictModel):
    """A :class:`stepfusion.SigmaPath` by its arguments."""

    path: Literal["sigma"]
    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float
    told_scale: float


class FlowEntries(StrictModel):
    """A :class:`stepfusion.FlowPath` by its arguments."""

    path: Literal["flow"]
    shift: float
    told_scale: float


PathEntries = ScheduleEntries | SigmaEntries | FlowEntries


def path_from_json(entries: PathEntries) -> Path:
    """The path that :meth:`stepfusion.samplers.path.Path.to_json` described; TypeError or ValueError if none is."""
    given: dict[str, Any] = entries.model_dump(exclude={"path"})
    if isinstance(entries, ScheduleEntries):
        return NoiseSchedule(given["betas"], name=given["name"])
    return (SigmaPath if isinstance(entries, SigmaEntries) else FlowPath)(**given)
