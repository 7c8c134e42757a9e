"""What an engine must know of a network besides its weights, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepfusion import _checks
from stepfusion.checkpoints.load import network_config
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.export.program import Batch
from stepfusion.kernels.coefficients import PREDICTIONS
from stepfusion.samplers.schedule import NoiseSchedule


@dataclass(frozen=True)
class Facts:
    """What :func:`model_facts` wrote, read back: the arguments of :class:`stepfusion.Engine` by their names."""

    shape: tuple[int, ...]
    num_classes: int | None
    null_label: int | None
    class_names: tuple[str, ...] | None
    prediction: str
    schedule: NoiseSchedule
    options: dict[str, Any]
    batch: Batch | None


def model_facts(engine: Engine, batch: Batch | None = None) -> dict[str, Any]:
    """The ``model`` of a manifest: shape, labels, prediction, schedule (float64 betas), sampler options, config, and
    the batch sizes that were exported.
    """
    return {
        "shape": list(engine.shape),
        "num_classes": engine.num_classes,
        "null_label": engine.null_label,
        "class_names": None if engine.class_names is None else list(engine.class_names),
        "prediction": engine.prediction,
        "schedule": {"name": engine.schedule.name, "betas": engine.schedule.betas.tolist()},
        "options": _plain(engine.options),
        "network": _plain(network_config(engine.network)),
        "batch": None if batch is None else [batch.low, batch.best, batch.high],
    }


def read_facts(model: Mapping[str, Any]) -> Facts:
    """The facts of a manifest's ``model``.

    Raises:
        ExportError: one is missing or of a wrong type; it is named.
    """
    try:
        shape = tuple(_checks.integer("shape", size, 1, 1 << 20) for size in model["shape"])
        classes, null_label, names = model["num_classes"], model["null_label"], model["class_names"]
        return Facts(
            shape,
            None if classes is None else _checks.integer("num_classes", classes, 1, 1 << 31),
            None if null_label is None else _checks.integer("null_label", null_label, 0, (classes or 0) - 1),
            None if names is None else tuple(names),
            _checks.choice("prediction", model["prediction"], PREDICTIONS),
            NoiseSchedule(model["schedule"]["betas"], name=str(model["schedule"]["name"])),
            dict(model["options"]),
            None if model["batch"] is None else Batch(*model["batch"]),
        )
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
