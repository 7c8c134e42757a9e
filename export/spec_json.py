"""The ``model`` of a manifest: a model's spec as plain JSON values, and what stands beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from stepfusion.checkpoints.load import network_config
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.export.batch import Batch
from stepfusion.files.json_files import FileModel
from stepfusion.model_spec import ModelSpec
from stepfusion.networks.conditioned import ConditionSpec
from stepfusion.samplers.path import Path
from stepfusion.samplers.path_json import PathEntries, ScheduleEntries, path_from_json, path_to_json
from stepfusion.samplers.registry import SAMPLERS, check_options, make_table, options_of
from stepfusion.samplers.schedule import NoiseSchedule

_Scalar: TypeAlias = bool | int | float | str | None
_Plain: TypeAlias = _Scalar | list[_Scalar]
_MOST_CONDITIONS = 16
_MOST_DIMENSIONS = 8


class ConditionEntry(FileModel):
    """One condition that the network takes: the fields of :class:`stepfusion.networks.ConditionSpec`."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    shape: Annotated[list[int], Field(max_length=_MOST_DIMENSIONS)]
    integer: bool


class ModelEntries(FileModel):
    """The types of a manifest's ``model``; whether the values make a model, :func:`spec_from_json` finds out."""

    shape: list[int]
    num_classes: int | None
    null_label: int | None
    class_names: list[str] | None
    prediction: str
    schedule: ScheduleEntries | None = None
    path: PathEntries | None = None
    options: dict[str, _Plain]
    conditions: Annotated[list[ConditionEntry], Field(max_length=_MOST_CONDITIONS, default_factory=list)]
    network: dict[str, _Plain]
    batch: Annotated[list[int], Field(min_length=3, max_length=3)] | None
    weights: Literal["included", "stripped"] | None = None


def model_to_json(engine: Engine, batch: Batch | None = None) -> dict[str, Any]:
    """The spec of an engine's model, the config of its network, and the batch sizes that were exported."""
    return {
        **spec_to_json(engine.spec),
        "network": _plain(network_config(engine.network)),
        "batch": None if batch is None else [batch.low, batch.best, batch.high],
    }


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """A spec as JSON values: the schedule by its float64 betas, all else by the names of the fields.

    A context size is left out: contexts are no input of an exported network. ``conditions`` are there if the model
    has any, so that other manifests are what earlier releases read.
    """
    conditions = [{"name": one.name, "shape": list(one.shape), "integer": one.integer} for one in spec.conditions]
    return {
        "shape": list(spec.shape),
        "num_classes": spec.num_classes,
        "null_label": spec.null_label,
        "class_names": None if spec.class_names is None else list(spec.class_names),
        "prediction": spec.prediction,
        **path_to_json(spec.schedule),
        "options": _plain(spec.options),
        **({"conditions": conditions} if conditions else {}),
    }


def spec_from_json(model: Mapping[str, Any]) -> ModelSpec:
    """The spec in a manifest's ``model``, whose entries have the types of :class:`ModelEntries`.

    Raises:
        ExportError: an entry has no value that a model can have; it is named.
    """
    with _naming_faults():
        spec = ModelSpec(
            schedule=path_from_json(model),
            prediction=model["prediction"],
            shape=tuple(model["shape"]),
            num_classes=model["num_classes"],
            null_label=model["null_label"],
            class_names=model["class_names"],
            options=model["options"],
            conditions=tuple(
                ConditionSpec(one["name"], tuple(one["shape"]), one["integer"]) for one in model.get("conditions", ())
            ),
        )
        for name, value in spec.options.items():
            _check_option(spec.schedule, name, value)
        return spec


def batch_from_json(model: Mapping[str, Any]) -> Batch | None:
    """The batch sizes in a manifest's ``model``; None if it names none. ExportError if they are no batch."""
    with _naming_faults():
        return None if model["batch"] is None else Batch(*model["batch"])


def _check_option(path: Path, name: str, value: object) -> None:
    """Raise what a sampler says of an option's value, if all samplers that take the option refuse it."""
    if name == "sampler":
        check_options({name: value})
        return
    schedule, faults = NoiseSchedule.linear() if path.discrete else path, list[Exception]()
    for sampler in SAMPLERS:
        if name in options_of(sampler):
            try:
                make_table(schedule, schedule.predictions[0], sampler, 2, defaults={}, **{name: value})
            except (TypeError, ValueError) as error:
                faults.append(error)
            else:
                return
    raise faults[0]


@contextmanager
def _naming_faults() -> Iterator[None]:
    """Turn what a wrong entry raises into an ExportError."""
    try:
        yield
    except KeyError as error:
        raise ExportError(f"the manifest's model lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise ExportError(f"the manifest's model cannot be used: {error}") from None


def _plain(value: Any) -> Any:
    """Tuples as lists, so that what is read back from JSON is equal to what was written."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
