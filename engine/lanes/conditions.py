"""What conditions each image of a request: a label, or a context vector in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.model_spec import ModelSpec

Labels = int | Sequence[int] | torch.Tensor | None  # a float tensor [n, K] or [K] holds contexts
Condition = int | tuple[float, ...]


def given_contexts(spec: ModelSpec, labels: Labels) -> torch.Tensor | None:
    """The labels, if they are contexts; else None."""
    if spec.context_size is None or not isinstance(labels, torch.Tensor) or not labels.is_floating_point():
        return None
    return labels


def conditions(spec: ModelSpec, labels: Labels, count: int) -> list[Condition]:
    """One condition for each of ``count`` images; TypeError or ValueError naming the argument."""
    contexts = given_contexts(spec, labels)
    return _labels(spec, labels, count) if contexts is None else _contexts(spec, contexts, count)


def each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each image: ``value`` for all, or a sequence of ``count`` values."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one for each of the {count} images, got {len(value)}")
    return list(value)


def _labels(spec: ModelSpec, labels: Labels, count: int) -> list[Condition]:
    """One label for each image; 0, which nobody reads, for a model without labels."""
    if spec.num_classes is None:
        if labels is not None:
            raise ValueError("labels were given, and this engine's model takes none")
        return [0] * count
    if labels is None:
        if spec.null_label is None:
            raise ValueError(f"labels are needed: the model has {spec.num_classes} classes and no null label")
        return [spec.null_label] * count
    if isinstance(labels, torch.Tensor) and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    return [_checks.integer("labels", label, 0, spec.num_classes - 1) for label in each("labels", labels, count)]


def _contexts(spec: ModelSpec, contexts: torch.Tensor, count: int) -> list[Condition]:
    """One context vector for each image, from floats [K] for all or [n, K]."""
    size = spec.context_size
    if list(contexts.shape) not in ([size], [count, size]):
        raise ValueError(
            f"labels that are contexts must have shape [{size}] or [{count}, {size}], got {list(contexts.shape)}"
        )
    if not bool(contexts.isfinite().all()):
        raise ValueError("labels that are contexts must be finite, got NaN or infinite values")
    return [tuple(row) for row in contexts.expand(count, -1).tolist()]
