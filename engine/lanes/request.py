"""Requests: what is asked of an engine, checked before any work is done, and how far it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, overload

import torch

from stepfusion import _checks
from stepfusion._checks import Same, any_other, integers, numbers
from stepfusion.errors import NonFiniteError
from stepfusion.lanes.conditions import (
    CONDITION_OPTIONS,
    LaneConditions,
    Prompts,
    context_vectors,
    images_of,
    make_conditions,
)
from stepfusion.lanes.described import describe_request
from stepfusion.lanes.editing import Edit, check_edit, make_edit
from stepfusion.model_spec import ModelSpec
from stepfusion.options import SamplingOptions, TableOptions, random_seed
from stepfusion.samplers.table import StepTable
from stepfusion.samplers.table_request import TableRequest

_LAST_SEED = (1 << 64) - 1
_LAST_INDEX = (1 << 32) - 1
_LARGEST_GUIDANCE = 1e4

Tables = StepTable | Sequence[StepTable]
Labels = int | str | Sequence[int | str] | torch.Tensor | None  # a float tensor [n, K] or [K] holds contexts
Condition = int | tuple[float, ...]


@dataclass(frozen=True)
class LaneStart:
    """What a lane needs to start an image: the first row of its table, its identity, and its condition.

    The first state is ``start_scale`` times standard normal noise, if none is given, and the network is shown
    ``in_scale`` times the first state.
    """

    row: int
    seed: int
    index: int
    label: Condition = 0
    guidance: float = 1.0
    conditions: LaneConditions | None = None
    start_scale: float = 1.0
    in_scale: float = 1.0


class LaneStarts(Sequence[LaneStart]):
    """How the images of a request start, each made when it is asked for.

    Args:
        table: its parts are samplers. parts: the part of each image, and so on for each image.
    """

    def __init__(self, table: StepTable, parts: Sequence[int], *columns: Sequence[Any]) -> None:
        self._table, self._parts, self._columns = table, parts, columns

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, image: int) -> LaneStart: ...
    @overload
    def __getitem__(self, image: slice) -> LaneStarts: ...
    def __getitem__(self, image: int | slice) -> LaneStart | LaneStarts:
        if isinstance(image, slice):
            return LaneStarts(self._table, self._parts[image], *(column[image] for column in self._columns))
        part = self._parts[image]
        row = self._table.starts[part]
        seed, index, label, guidance, conditions = (column[image] for column in self._columns)
        scales = self._table.start_scales[part], self._table.in_scale(row)
        return LaneStart(row, seed, index, label, guidance, conditions, *scales)


@dataclass(frozen=True)
class Request:
    """Images to make: for each how its lane starts, and the part of ``table`` that it walks.

    ``start`` [n, ...] and ``noise`` [steps, n, ...] are given states and given noise. ``guided`` is True if some
    image is guided, ``mixed`` if the labels are contexts. ``image`` [n, ...] is to be noised to where images start,
    and ``known`` [n, ...] is what each keeps, NaN elsewhere. ``first`` is the number of the first image if this is a
    part of a request. ``spec`` is the model's, and ``asked`` holds the options that were given.
    """

    table: StepTable
    parts: Sequence[int]
    lane_starts: Sequence[LaneStart]
    start: torch.Tensor | None
    noise: torch.Tensor | None
    guided: bool
    mixed: bool = False
    image: torch.Tensor | None = None
    known: torch.Tensor | None = None
    first: int = 0
    spec: ModelSpec | None = field(default=None, repr=False)
    asked: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.lane_starts)

    def __repr__(self) -> str:
        few = self.part(0, 64)  # of what may be millions
        return describe_request(len(self), self.table, few.seeds, few.labels, self.asked, self.spec)

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [start.seed for start in self.lane_starts]

    @property
    def indices(self) -> list[int]:
        """The number of each image under its seed."""
        return [start.index for start in self.lane_starts]

    @property
    def labels(self) -> list[int] | None:
        """The label of each image; None for a model without classes, or if the labels are contexts."""
        if self.mixed or self.spec is None or self.spec.num_classes is None:
            return None
        return [start.label for start in self.lane_starts if isinstance(start.label, int)]

    def steps(self, image: int) -> int:
        """How many ticks an image takes."""
        return self.table.steps(self.parts[image])

    def reuses(self, image: int, step: int) -> bool:
        """Whether an image's step, counted from 0, reuses what the network made at an earlier one."""
        table = self.table
        return table.reuses is not None and bool(table.reuses[table.starts[self.parts[image]] + step])

    def part(self, first: int, last: int) -> Request:
        """The request for images ``first`` to ``last`` - 1 of this one."""
        return replace(
            self,
            parts=self.parts[first:last],
            lane_starts=self.lane_starts[first:last],
            start=None if self.start is None else self.start[first:last],
            image=None if self.image is None else self.image[first:last],
            known=None if self.known is None else self.known[first:last],
            noise=None if self.noise is None else self.noise[:, first:last],
            first=self.first + first,
        )


@dataclass(frozen=True)
class Event:
    """One step of some images, seen by :meth:`stepfusion.Engine.stream` and by callbacks.

    ``step`` counts from 0 to ``steps`` - 1, and ``timestep`` is the training timestep that the step started from (on
    a path that is not discrete, what the network was told there).
    ``images`` are positions in the request, ``x`` [k, ...] their states after the step and ``x0`` [k, ...] the
    predictions it used, float32.
    """

    step: int
    steps: int
    timestep: int | float
    images: tuple[int, ...]
    x: torch.Tensor
    x0: torch.Tensor

    def __repr__(self) -> str:
        return f"Event(step {self.step + 1} of {self.steps}, timestep {self.timestep}, images {list(self.images)})"


@dataclass(eq=False)
class ActiveRequest:
    """A request, and how far it is.

    Attributes:
        request: what is made.
        first: the row of the device tables at which its table stands; None while it has no rows.
        every: an event is wanted after every so many steps of an image and after its last; None for no events.
        waiting: the images that have no lane yet, the next one first.
    """

    request: Request
    first: int | None = None
    every: int | None = None
    waiting: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = deque(range(len(self.request)))

    def steps(self, image: int) -> int:
        """How many ticks an image takes."""
        return self.request.steps(image)

    def shows(self, image: int, step: int) -> bool:
        """Whether an event is wanted after ``step`` steps of an image."""
        return self.every is not None and (step % self.every == 0 or step == self.steps(image))

    def nonfinite(self, image: int, flag: int) -> NonFiniteError:
        """The error that names an image and the step at which it became non-finite; ``flag`` is its row there."""
        request = self.request
        table, part, start = request.table, request.parts[image], request.lane_starts[image]
        row = flag - (self.first or 0)
        error = NonFiniteError(
            f"image {request.first + image} (seed {start.seed}, index {start.index}) became non-finite at step "
            f"{row - table.starts[part] + 1} of {table.steps(part)} (timestep {table.told[row]:g})"
        )
        error.image = request.first + image
        return error


def make_request(
    spec: ModelSpec, n: int | None, table: Tables | None, options: SamplingOptions, prompts: Prompts | None = None
) -> Request:
    """The request for ``n`` images of a model with these options (:class:`stepfusion.options.SamplingOptions`).

    ``prompts`` makes conditions of texts, if the model has an encoder.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_names(spec, options)
    start, noise = options.get("start"), options.get("noise")
    tables = _chosen_table(spec, table, options)
    image, mask, strength = cast(Any, options.get("image")), cast(Any, options.get("mask")), options.get("strength")
    edited = image is not None or strength is not None or mask is not None
    edit = make_edit(image, strength, mask, start) if edited else None
    count = _count(spec, n, tables, edit, options)
    if edit is not None:
        check_edit(edit, count, spec.shape)
    joined, parts = _join(spec, count, tables, edit)
    starts, guided = _lane_starts(spec, count, joined, parts, options, prompts)
    _check_tensors(spec, count, joined, parts, start, noise)
    return Request(
        joined,
        parts,
        starts,
        start,
        noise,
        guided,
        mixed=_given_contexts(spec, options.get("labels")) is not None,
        image=edit.images(count) if edit is not None and edit.noised else None,
        known=None if edit is None else edit.known(count),
        spec=spec,
        asked=dict(options) if table is None else {**options, "table": table},
    )


def _check_names(spec: ModelSpec, options: Mapping[str, Any]) -> None:
    """``**options`` takes any name at run time; a wrong one is refused as a wrong keyword argument is."""
    accepted = SamplingOptions.__annotations__
    for name in options:
        if name not in accepted:
            raise TypeError(f"{name!r} is not a sampling option; the options are {', '.join(accepted)}")
        if name in CONDITION_OPTIONS and options[name] is not None and not spec.conditions:
            raise ValueError(f"{name} was given, and this engine's model takes none")


def _chosen_table(spec: ModelSpec, table: Tables | None, options: SamplingOptions) -> Tables:
    """The table as given, or the one that sampler, steps and their options describe."""
    asked = [name for name in TableOptions.__annotations__ if options.get(name) is not None]
    if table is None:
        return TableRequest(**{name: options[name] for name in asked}).of(spec)  # type: ignore[literal-required]
    for name in asked:
        raise ValueError(f"table and {name} exclude each other, got both")
    return table


def _count(spec: ModelSpec, n: int | None, tables: Tables, edit: Edit | None, options: SamplingOptions) -> int:
    """The number of images: ``n``, or the length of the first option that has one value for each image, or 1."""
    if n is not None:
        return _checks.integer("n", n, 0, 1 << 31)
    labels = options.get("labels")
    given = _given_contexts(spec, labels)
    one_for_all = given is not None and given.ndim == 1
    image = None if edit is None else edit.image
    for value in (
        tables,
        options.get("seed"),
        options.get("indices"),
        None if one_for_all else labels,
        options.get("guidance"),
        options.get("start"),
        image,
    ):
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return len(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return len(value)
    return images_of(options, spec.conditions) or 1 if spec.conditions else 1


def _join(spec: ModelSpec, count: int, table: Tables, edit: Edit | None) -> tuple[StepTable, Sequence[int]]:
    """All tables of a request in one, and each image's part of it; of an edit, only the rows that are walked."""
    if isinstance(table, StepTable):
        if len(table.starts) != 1:
            raise ValueError(f"table holds {len(table.starts)} samplers: give a list with one table for each image")
        check_table(spec, table)
        return table if edit is None else edit.shorten(table), Same(0, count)
    if not isinstance(table, Sequence) or not all(isinstance(one, StepTable) for one in table):
        raise TypeError(f"table must be a StepTable or a list of them, got {type(table).__name__}")
    if len(table) != count or not table:
        raise ValueError(f"table must be one StepTable or one for each of the {count} images, got {len(table)}")
    distinct = list({id(one): one for one in table}.values())
    for one in distinct:
        check_table(spec, one)
    position = {id(one): i for i, one in enumerate(distinct)}
    walked = distinct if edit is None else [edit.shorten(one) for one in distinct]
    return StepTable.concatenate(walked), [position[id(one)] for one in table]


def check_table(spec: ModelSpec, table: StepTable) -> None:
    """ValueError unless a table was made for this model's prediction and schedule."""
    if table.prediction != spec.prediction:
        raise ValueError(f"table is for prediction {table.prediction!r}, and the network's is {spec.prediction!r}")
    if table.schedule is not spec.schedule and table.schedule != spec.schedule:
        raise ValueError(f"table is for {table.schedule!r}, and the network's is {spec.schedule!r}")


def _lane_starts(
    spec: ModelSpec,
    count: int,
    table: StepTable,
    parts: Sequence[int],
    options: SamplingOptions,
    prompts: Prompts | None,
) -> tuple[LaneStarts, bool]:
    """How each image starts, and whether some image is guided."""
    seed = options.get("seed", 0)
    seeds = integers("seed", random_seed() if seed is None else seed, count, 0, _LAST_SEED)
    indices = options.get("indices")
    if indices is not None and not isinstance(indices, (Sequence, torch.Tensor)):
        raise TypeError(f"indices must be a sequence, one for each image, got {indices!r}")
    places = integers("indices", range(count) if indices is None else indices, count, 0, _LAST_INDEX)
    guidance = options.get("guidance")
    scales = numbers("guidance", 1.0 if guidance is None else guidance, count, 0.0, _LARGEST_GUIDANCE)
    guided = any_other(scales, 1.0)
    if guided and spec.null_label is None and not spec.conditions:
        raise ValueError("guidance needs a null label, and this engine's model has none")
    labels = _conditions(spec, options.get("labels"), count)
    conditions: Sequence[LaneConditions | None] = Same(None, count)
    if spec.conditions:
        conditions = make_conditions(spec, prompts, options, count, guided=guided)
    return LaneStarts(table, parts, seeds, places, labels, scales, conditions), guided


def _check_tensors(
    spec: ModelSpec,
    count: int,
    table: StepTable,
    parts: Sequence[int],
    start: torch.Tensor | None,
    noise: torch.Tensor | None,
) -> None:
    if start is not None:
        _checks.images("start", start, (count, *spec.shape))
        if not bool(start.isfinite().all()):
            raise ValueError("start must be finite, got NaN or infinite values")
    if noise is not None:
        longest = max((table.steps(part) for part in parts), default=0)
        _checks.images("noise", noise, (longest, count, *spec.shape))


def _given_contexts(spec: ModelSpec, labels: Labels) -> torch.Tensor | None:
    """The labels, if they are contexts; else None."""
    if spec.context_size is None or not isinstance(labels, torch.Tensor) or not labels.is_floating_point():
        return None
    return labels


def _conditions(spec: ModelSpec, labels: Labels, count: int) -> Sequence[Condition]:
    """One condition for each of ``count`` images; TypeError or ValueError naming the argument."""
    given = _given_contexts(spec, labels)
    return _labels(spec, labels, count) if given is None else context_vectors(spec, given, count)


def _labels(spec: ModelSpec, labels: Labels, count: int) -> Sequence[int]:
    """One label for each image; 0, which nobody reads, for a model without labels."""
    if spec.num_classes is None:
        if labels is not None:
            raise ValueError("labels were given, and this engine's model takes none")
        return Same(0, count)
    if labels is None:
        if spec.null_label is None:
            raise ValueError(f"labels are needed: the model has {spec.num_classes} classes and no null label")
        return Same(spec.null_label, count)
    if isinstance(labels, torch.Tensor) and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    return integers("labels", spec.numbered(labels), count, 0, spec.num_classes - 1)
