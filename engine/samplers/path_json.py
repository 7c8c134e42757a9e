"""Paths as JSON values, as exports and checkpoints hold them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from stepfusion import _checks
from stepfusion.files.strict_model import StrictModel
from stepfusion.samplers.path import FlowPath, Path, SigmaPath
from stepfusion.samplers.schedule import NoiseSchedule


class ScheduleEntries(StrictModel):
    """A :class:`stepfusion.NoiseSchedule` by its float64 betas."""

    name: str
    betas: Annotated[list[float], Field(min_length=1)]


class SigmaEntries(StrictModel):
    """A :class:`stepfusion.SigmaPath` by its arguments."""

    kind: Literal["sigma"]
    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float
    told_scale: float


class FlowEntries(StrictModel):
    """A :class:`stepfusion.FlowPath` by its arguments."""

    kind: Literal["flow"]
    shift: float
    told_scale: float


PathEntries = Annotated[SigmaEntries | FlowEntries, Field(discriminator="kind")]


_KINDS: dict[str, type[StrictModel]] = {"sigma": SigmaEntries, "flow": FlowEntries}


def path_to_json(path: Path) -> dict[str, Any]:
    """A path as an entry of an object of JSON: "schedule" if it is discrete, else "path"."""
    return {"schedule" if path.discrete else "path": path.to_json()}


def path_from_json(entries: Mapping[str, Any]) -> Path:
    """The path in an object to which :func:`path_to_json` wrote it.

    Raises:
        KeyError: there is neither entry. TypeError, ValueError: there are both, or one holds no value that a path
            can have.
    """
    given = entries.get("path")
    if given is None:
        if not isinstance(entries["schedule"], Mapping):
            raise TypeError(f"schedule must be an object, got {entries['schedule']!r}")
        schedule = ScheduleEntries.of(entries["schedule"])
        return NoiseSchedule(schedule.betas, name=schedule.name)
    if entries.get("schedule") is not None:
        raise ValueError("schedule and path exclude each other, got both")
    kind = _checks.choice("path.kind", given.get("kind"), _KINDS)
    values = _KINDS[kind].of(given).model_dump(exclude={"kind"})
    return (SigmaPath if kind == "sigma" else FlowPath)(**values)
