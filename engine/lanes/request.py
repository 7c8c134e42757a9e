"""What is asked of an engine, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.lanes.conditions import Condition, conditions, each, given_contexts
from stepfusion.lanes.editing import Edit, check_edit, make_edit
from stepfusion.model_spec import ModelSpec
from stepfusion.options import SamplingOptions
from stepfusion.samplers.registry import DEFAULT_SAMPLER
from stepfusion.samplers.table import StepTable

_LAST_SEED = (1 << 64) - 1
_LAST_INDEX = (1 << 32) - 1
_LARGEST_GUIDANCE = 1e4

Tables = StepTable | Sequence[StepTable]


@dataclass(frozen=True)
class LaneStart:
    """What a lane needs to start an image: the first row of its table, its identity, and its condition."""

    row: int
    seed: int
    index: int
    label: Condition = 0
    guidance: float = 1.0


@dataclass(frozen=True)
class Request:
    """Images to make: for each how its lane starts, and the part of ``table`` that it walks.

    ``start`` [n, ...] and ``noise`` [steps, n, ...] are given states and given noise. ``guided`` is True if some
    image is guided, ``mixed`` if the labels are contexts. ``image`` [n, ...] is to be noised to where each image
    starts, and ``known`` [n, ...] is what each keeps, NaN elsewhere. ``first`` is the number of the first image if
    this is a part of a request.
    """

    table: StepTable
    parts: list[int]
    lane_starts: list[LaneStart]
    start: torch.Tensor | None
    noise: torch.Tensor | None
    guided: bool
    mixed: bool = False
    image: torch.Tensor | None = None
    known: torch.Tensor | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.lane_starts)

    def steps(self, image: int) -> int:
        """How many ticks an image takes."""
        return self.table.steps(self.parts[image])

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


def make_request(spec: ModelSpec, n: int | None, table: Tables | None, options: SamplingOptions) -> Request:
    """The request for ``n`` images of a model with these options (:class:`stepfusion.options.SamplingOptions`).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_names(options)
    start, noise = options.get("start"), options.get("noise")
    tables = _chosen_table(spec, table, options)
    edit = make_edit(options.get("image"), options.get("strength"), options.get("mask"), start)
    count = _count(spec, n, tables, edit, options)
    if edit is not None:
        check_edit(edit, count, spec.shape)
    joined, parts = _join(spec, count, tables, edit)
    starts, guided = _lane_starts(spec, count, joined, parts, options)
    _check_tensors(spec, count, joined, parts, start, noise)
    return Request(
        joined,
        parts,
        starts,
        start,
        noise,
        guided,
        mixed=given_contexts(spec, options.get("labels")) is not None,
        image=edit.images(count) if edit is not None and edit.noised else None,
        known=None if edit is None else edit.known(count),
    )


def check_images(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError unless ``value`` is a floating-point tensor of this shape."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {given}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")


def _check_names(options: Mapping[str, Any]) -> None:
    """``**options`` takes any name at run time; a wrong one is refused as a wrong keyword argument is."""
    accepted = SamplingOptions.__annotations__
    for name in options:
        if name not in accepted:
            raise TypeError(f"{name!r} is not a sampling option; the options are {', '.join(accepted)}")


def _chosen_table(spec: ModelSpec, table: Tables | None, options: SamplingOptions) -> Tables:
    """The table as given, or the one that sampler, steps and eta describe."""
    sampler, steps, eta = options.get("sampler"), options.get("steps"), options.get("eta")
    if table is None:
        return spec.table(sampler or DEFAULT_SAMPLER, steps, **({} if eta is None else {"eta": eta}))
    for name, value in (("sampler", sampler), ("steps", steps), ("eta", eta)):
        if value is not None:
            raise ValueError(f"table and {name} exclude each other, got both")
    return table


def _count(spec: ModelSpec, n: int | None, tables: Tables, edit: Edit | None, options: SamplingOptions) -> int:
    """The number of images: ``n``, or the length of the first option that has one value for each image, or 1."""
    if n is not None:
        return _checks.integer("n", n, 0, 1 << 31)
    labels = options.get("labels")
    contexts = given_contexts(spec, labels)
    one_for_all = contexts is not None and contexts.ndim == 1
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
    return 1


def _join(spec: ModelSpec, count: int, table: Tables, edit: Edit | None) -> tuple[StepTable, list[int]]:
    """All tables of a request in one, and each image's part of it; of an edit, only the rows that are walked."""
    if isinstance(table, StepTable):
        if len(table.starts) != 1:
            raise ValueError(f"table holds {len(table.starts)} samplers: give a list with one table for each image")
        _check_table(spec, table)
        return table if edit is None else edit.shorten(table), [0] * count
    if not isinstance(table, Sequence) or not all(isinstance(one, StepTable) for one in table):
        raise TypeError(f"table must be a StepTable or a list of them, got {type(table).__name__}")
    if len(table) != count or not table:
        raise ValueError(f"table must be one StepTable or one for each of the {count} images, got {len(table)}")
    distinct = list({id(one): one for one in table}.values())
    for one in distinct:
        _check_table(spec, one)
    position = {id(one): i for i, one in enumerate(distinct)}
    walked = distinct if edit is None else [edit.shorten(one) for one in distinct]
    return StepTable.concatenate(walked), [position[id(one)] for one in table]


def _check_table(spec: ModelSpec, table: StepTable) -> None:
    if table.prediction != spec.prediction:
        raise ValueError(f"table is for prediction {table.prediction!r}, and the network's is {spec.prediction!r}")
    if table.schedule != spec.schedule:
        raise ValueError(f"table is for {table.schedule!r}, and the network's is {spec.schedule!r}")


def _lane_starts(
    spec: ModelSpec, count: int, table: StepTable, parts: list[int], options: SamplingOptions
) -> tuple[list[LaneStart], bool]:
    """How each image starts, and whether some image is guided."""
    seeds = [_checks.integer("seed", value, 0, _LAST_SEED) for value in each("seed", options.get("seed", 0), count)]
    indices = options.get("indices")
    if indices is not None and not isinstance(indices, (Sequence, torch.Tensor)):
        raise TypeError(f"indices must be a sequence, one for each image, got {indices!r}")
    numbers = each("indices", range(count) if indices is None else indices, count)
    numbers = [_checks.integer("indices", value, 0, _LAST_INDEX) for value in numbers]
    guidance = options.get("guidance")
    scales = each("guidance", 1.0 if guidance is None else guidance, count)
    scales = [_checks.number("guidance", value, 0.0, _LARGEST_GUIDANCE) for value in scales]
    guided = any(scale != 1.0 for scale in scales)
    if guided and spec.null_label is None:
        raise ValueError("guidance needs a null label, and this engine's model has none")
    identities = zip(seeds, numbers, conditions(spec, options.get("labels"), count), scales, strict=True)
    starts = [LaneStart(table.starts[part], *identity) for part, identity in zip(parts, identities, strict=True)]
    return starts, guided


def _check_tensors(
    spec: ModelSpec,
    count: int,
    table: StepTable,
    parts: list[int],
    start: torch.Tensor | None,
    noise: torch.Tensor | None,
) -> None:
    if start is not None:
        check_images("start", start, (count, *spec.shape))
        if not bool(start.isfinite().all()):
            raise ValueError("start must be finite, got NaN or infinite values")
    if noise is not None:
        longest = max((table.steps(part) for part in parts), default=0)
        check_images("noise", noise, (longest, count, *spec.shape))
