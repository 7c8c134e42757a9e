"""What is known of a model beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from stepfusion import _checks
from stepfusion.networks.conditioned import ConditionedNetwork, ConditionSpec
from stepfusion.samplers.path import Path
from stepfusion.samplers.registry import check_options, make_table
from stepfusion.samplers.table import StepTable

#: The fields of a spec that are arguments of :class:`stepfusion.Engine`, beside the schedule.
SPEC_ARGUMENTS = ("prediction", "shape", "num_classes", "null_label", "class_names", "options", "conditions")
_MOST_CLASSES = 1 << 31
_MOST_PIXELS = 1 << 20


@dataclass(frozen=True)
class ModelSpec:
    """What an engine, a request and an export must know of a model beside its weights.

    Attributes:
        schedule: the noise schedule that the model was trained with, or another path.
        prediction: what the network returns, one of the path's ``predictions``.
        shape: of one image, (C, H, W).
        num_classes: how many labels the network takes; None for a network without labels.
        null_label: the label that stands for none, which guidance needs; None if there is none.
        class_names: what the labels are called; the null label needs no name. None if they have no names.
        context_size: entries of a context vector, for networks that take one in place of a label; else None.
        options: default options of the samplers (clip, spacing, ...), as a checkpoint's scheduler config gives them.
        conditions: what else an image is conditioned on, beside its label.

    Raises:
        TypeError, ValueError: naming the field.
    """

    schedule: Path
    prediction: str
    shape: tuple[int, ...]
    num_classes: int | None = None
    null_label: int | None = None
    class_names: tuple[str, ...] | None = None
    context_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    conditions: tuple[ConditionSpec, ...] = ()

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        _checks.choice("prediction", self.prediction, self.schedule.predictions)
        checked = {
            "shape": _check_shape(self.shape),
            "num_classes": None
            if self.num_classes is None
            else _checks.integer("num_classes", self.num_classes, 1, _MOST_CLASSES),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "null_label", self._check_null_label())
        object.__setattr__(self, "class_names", self._check_class_names())
        object.__setattr__(self, "options", check_options(self.options))
        object.__setattr__(self, "conditions", _check_conditions(self.conditions))

    def __repr__(self) -> str:
        facts = ["x".join(map(str, self.shape)), self.prediction, repr(self.schedule)]
        if self.num_classes is not None:
            facts.append(f"{self.num_classes} classes")
        facts += [] if self.null_label is None else [f"null label {self.null_label}"]
        facts += [] if self.context_size is None else [f"contexts of {self.context_size}"]
        facts += [f"conditions {', '.join(one.name for one in self.conditions)}"] if self.conditions else []
        facts += [f"{name} {value}" for name, value in self.options.items()]
        return f"ModelSpec({', '.join(facts)})"

    @classmethod
    def of_network(
        cls,
        network: object,
        schedule: Path,
        *,
        prediction: str | None = None,
        shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        conditions: Sequence[ConditionSpec] | None = None,
        **known: Any,
    ) -> Self:
        """The spec of a network, which itself says what is not given: image shape, classes, context size, conditions.

        Args:
            network: read are ``image_channels`` or ``in_channels`` and ``sample_size``, ``num_classes``,
                ``context_size`` and, of our own networks, ``conditions``.
            known: other fields of the spec.
        """
        _check_schedule(schedule)
        return cls(
            schedule=schedule,
            prediction=schedule.predictions[0] if prediction is None else prediction,
            shape=_shape_of(network) if shape is None else shape,  # type: ignore[arg-type]
            num_classes=getattr(network, "num_classes", None) if num_classes is None else num_classes,
            context_size=getattr(network, "context_size", None),
            conditions=_conditions_of(network) if conditions is None else conditions,  # type: ignore[arg-type]
            **known,
        )

    @property
    def told_dtype(self) -> torch.dtype:
        """Of what the network is told of a level: int64 for timesteps, float32 on paths that are not discrete."""
        return torch.int64 if self.schedule.discrete else torch.float32

    def numbered(self, labels: Any) -> Any:
        """Labels with numbers in place of names; what is no name, and no sequence with names, as it is."""
        if isinstance(labels, str):
            return self.label_of(labels)
        if isinstance(labels, Sequence) and any(isinstance(label, str) for label in labels):
            return [self.label_of(label) if isinstance(label, str) else label for label in labels]
        return labels

    def label_of(self, name: str) -> int:
        """The label of a class by its name, in any case; ValueError if there is none of that name."""
        names = [one.casefold() for one in self.class_names or ()]
        if name.casefold() not in names:
            known = ", ".join(self.class_names or ()) or "none, for the model has no class names"
            raise ValueError(f"labels has no class {name[:100]!r}; the names are {known}"[:1000])
        return names.index(name.casefold())

    def table(self, sampler: str | None = None, steps: int | None = None, **options: Any) -> StepTable:
        """A sampler's table for this model: :func:`stepfusion.samplers.registry.make_table`."""
        return make_table(self.schedule, self.prediction, sampler, steps, defaults=self.options, **options)

    def _check_null_label(self) -> int | None:
        if self.null_label is None:
            return None
        if self.num_classes is None:
            raise ValueError(f"null_label is {self.null_label!r}, and the model takes no labels")
        return _checks.integer("null_label", self.null_label, 0, self.num_classes - 1)

    def _check_class_names(self) -> tuple[str, ...] | None:
        """One name for each class; the null label needs none."""
        names = self.class_names
        if names is None:
            return None
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"class_names must be a sequence of names, got {names!r}")
        classes = self.num_classes or 0
        if len(names) not in ((classes, classes - 1) if self.null_label is not None else (classes,)):
            raise ValueError(f"class_names must name each of the {classes} classes, got {len(names)} names")
        return tuple(names)


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, Path):
        raise TypeError(f"schedule must be a NoiseSchedule or another path, got {type(schedule).__name__}")


def _shape_of(network: object) -> tuple[int, ...]:
    """The image shape that a network states."""
    channels = getattr(network, "image_channels", getattr(network, "in_channels", None))
    size = getattr(network, "sample_size", None)
    if channels is None or size is None:
        raise ValueError("shape is needed, e.g. (3, 32, 32): the model has no in_channels and sample_size")
    return (channels, *((size, size) if isinstance(size, int) else size))


def _conditions_of(network: object) -> tuple[ConditionSpec, ...]:
    return network.conditions if isinstance(network, ConditionedNetwork) else ()


def _check_conditions(conditions: Sequence[ConditionSpec]) -> tuple[ConditionSpec, ...]:
    """Conditions whose names differ."""
    if not isinstance(conditions, Sequence) or not all(isinstance(one, ConditionSpec) for one in conditions):
        raise TypeError(f"conditions must be a sequence of ConditionSpec, got {conditions!r}")
    names = [one.name for one in conditions]
    if len(set(names)) < len(names):
        raise ValueError(f"conditions must have different names, got {', '.join(names)}")
    return tuple(conditions)


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not shape:
        raise TypeError(f"shape must be a sequence of sizes, e.g. (3, 32, 32), got {shape!r}")
    return tuple(_checks.integer("shape", size, 1, _MOST_PIXELS) for size in shape)
