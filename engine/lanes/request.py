"""What is asked of an engine, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.lanes.editing import Edit, check_edit
from stepfusion.lanes.runner import Ticket
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

Labels = int | Sequence[int] | torch.Tensor | None  # a float tensor [n, K] or [K] holds contexts
Each = float | Sequence[float] | None


@dataclass(frozen=True)
class Model:
    """The facts of a model that a request must fit."""

    schedule: NoiseSchedule
    prediction: str
    shape: tuple[int, ...]
    num_classes: int | None
    null_label: int | None
    context_size: int | None = None


@dataclass(frozen=True)
class Request:
    """Images to make: for each a ticket, and the part of ``table`` that it walks.

    ``start`` [n, ...] and ``noise`` [steps, n, ...] are given states and given noise; ``guided`` says that some image
    is guided, ``mixed`` that the tickets' labels are contexts. ``image`` [n, ...] is to be noised to where each
    starts, and ``known`` [n, ...] is what each keeps, NaN elsewhere. ``first`` is the number of the first image where
    this is a part of a request.
    """

    table: StepTable
    parts: list[int]
    tickets: list[Ticket]
    start: torch.Tensor | None
    noise: torch.Tensor | None
    guided: bool
    mixed: bool = False
    image: torch.Tensor | None = None
    known: torch.Tensor | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.tickets)

    def part(self, first: int, last: int) -> Request:
        """The request for images ``first`` to ``last`` - 1 of this one."""
        return replace(
            self,
            parts=self.parts[first:last],
            tickets=self.tickets[first:last],
            start=None if self.start is None else self.start[first:last],
            image=None if self.image is None else self.image[first:last],
            known=None if self.known is None else self.known[first:last],
            noise=None if self.noise is None else self.noise[:, first:last],
            first=self.first + first,
        )


def make_request(
    model: Model,
    n: int | None,
    table: StepTable | Sequence[StepTable],
    seed: int | Sequence[int],
    indices: Sequence[int] | None,
    labels: Labels,
    guidance: Each,
    start: torch.Tensor | None,
    noise: torch.Tensor | None,
    edit: Edit | None = None,
) -> Request:
    """The request that :meth:`stepfusion.Engine.sample` describes; TypeError or ValueError naming the argument."""
    contexts = _given_contexts(model, labels)
    one_for_all = contexts is not None and contexts.ndim == 1
    image = None if edit is None else edit.image
    count = _count(n, table, seed, indices, None if one_for_all else labels, guidance, start, image)
    if edit is not None:
        check_edit(edit, count, model.shape)
    joined, parts = _tables(model, count, table, edit)
    seeds = [_checks.integer("seed", value, 0, (1 << 64) - 1) for value in _each("seed", seed, count)]
    if indices is not None and not isinstance(indices, (Sequence, torch.Tensor)):
        raise TypeError(f"indices must be a sequence, one for each image, got {indices!r}")
    numbers = _each("indices", range(count) if indices is None else indices, count)
    numbers = [_checks.integer("indices", value, 0, (1 << 32) - 1) for value in numbers]
    scales = _each("guidance", 1.0 if guidance is None else guidance, count)
    scales = [_checks.number("guidance", value, 0.0, 1e4) for value in scales]
    guided = any(scale != 1.0 for scale in scales)
    if guided and model.null_label is None:
        raise ValueError("guidance needs a null label, and this engine's model has none")
    conditions = _labels(model, labels, count) if contexts is None else _contexts(model, contexts, count)
    identities = zip(seeds, numbers, conditions, scales, strict=True)
    tickets = [Ticket(joined.starts[part], *identity) for part, identity in zip(parts, identities, strict=True)]
    if start is not None:
        check_images("start", start, (count, *model.shape))
        if not bool(start.isfinite().all()):
            raise ValueError("start must be finite, got NaN or infinite values")
    if noise is not None:
        longest = max((joined.steps(part) for part in parts), default=0)
        check_images("noise", noise, (longest, count, *model.shape))
    mixed = contexts is not None
    if edit is None:
        return Request(joined, parts, tickets, start, noise, guided, mixed)
    image = edit.images(count) if edit.noised else None
    return Request(joined, parts, tickets, start, noise, guided, mixed, image, edit.known(count))


def _count(n: int | None, *others: Any) -> int:
    """The number of images: ``n``, or the length of whatever was given one for each, or 1."""
    if n is not None:
        return _checks.integer("n", n, 0, 1 << 31)
    for value in others:
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return len(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return len(value)
    return 1


def _tables(
    model: Model, count: int, table: StepTable | Sequence[StepTable], edit: Edit | None
) -> tuple[StepTable, list[int]]:
    """All tables of a request in one, and each image's part of it; of an edit, the rows that are walked."""
    if isinstance(table, StepTable):
        if len(table.starts) != 1:
            raise ValueError(f"table holds {len(table.starts)} samplers: give a list with one table for each image")
        _check_table(model, table)
        return table if edit is None else edit.shorten(table), [0] * count
    if not isinstance(table, Sequence) or not all(isinstance(one, StepTable) for one in table):
        raise TypeError(f"table must be a StepTable or a list of them, got {type(table).__name__}")
    if len(table) != count or not table:
        raise ValueError(f"table must be one StepTable or one for each of the {count} images, got {len(table)}")
    distinct = list({id(one): one for one in table}.values())
    for one in distinct:
        _check_table(model, one)
    position = {id(one): i for i, one in enumerate(distinct)}
    walked = distinct if edit is None else [edit.shorten(one) for one in distinct]
    return StepTable.concatenate(walked), [position[id(one)] for one in table]


def _check_table(model: Model, table: StepTable) -> None:
    if table.prediction != model.prediction:
        raise ValueError(f"table is for prediction {table.prediction!r}, and the network's is {model.prediction!r}")
    if table.schedule != model.schedule:
        raise ValueError(f"table is for {table.schedule!r}, and the network's is {model.schedule!r}")


def _labels(model: Model, labels: Labels, count: int) -> list[int | tuple[float, ...]]:
    """One label an image; 0, which nobody reads, for a model without labels."""
    if model.num_classes is None:
        if labels is not None:
            raise ValueError("labels were given, and this engine's model takes none")
        return [0] * count
    if labels is None:
        if model.null_label is None:
            raise ValueError(f"labels are needed: the model has {model.num_classes} classes and no null label")
        return [model.null_label] * count
    if isinstance(labels, torch.Tensor) and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    return [_checks.integer("labels", label, 0, model.num_classes - 1) for label in _each("labels", labels, count)]


def _given_contexts(model: Model, labels: Labels) -> torch.Tensor | None:
    """The labels, where they are contexts."""
    if model.context_size is None or not isinstance(labels, torch.Tensor) or not labels.is_floating_point():
        return None
    return labels


def _contexts(model: Model, contexts: torch.Tensor, count: int) -> list[int | tuple[float, ...]]:
    """One context vector an image, from floats [K] for all or [n, K]."""
    size = model.context_size
    if list(contexts.shape) not in ([size], [count, size]):
        raise ValueError(
            f"labels that are contexts must have shape [{size}] or [{count}, {size}], got {list(contexts.shape)}"
        )
    if not bool(contexts.isfinite().all()):
        raise ValueError("labels that are contexts must be finite, got NaN or infinite values")
    return [tuple(row) for row in contexts.expand(count, -1).tolist()]


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each image: ``value`` for all, or a sequence of so many."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one for each of the {count} images, got {len(value)}")
    return list(value)


def check_images(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError unless ``value`` is a floating-point tensor of this shape."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {given}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
