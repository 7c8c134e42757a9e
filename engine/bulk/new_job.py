"""A new job: what somebody asks for, checked against the model, becomes the entries of job.json."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from stepfusion.bulk.checkpoint import Checkpoint
from stepfusion.bulk.job import DEFAULT_UNIT, Job
from stepfusion.bulk.labels import labels_digest
from stepfusion.bulk.prompts import prompts_digest
from stepfusion.bulk.shards import FORMATS
from stepfusion.execution.decoder import decoded_shape
from stepfusion.files.images import why_no_picture
from stepfusion.lanes.conditions import Prompts, blank_options
from stepfusion.lanes.editing import CONCATENATED
from stepfusion.lanes.request import make_request
from stepfusion.model_spec import ModelSpec
from stepfusion.options import SamplingOptions
from stepfusion.samplers.path import Path
from stepfusion.samplers.row_levels import RowLevels
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable
from stepfusion.samplers.table_request import TableRequest


def make_job(
    checkpoint: Checkpoint,
    request: TableRequest,
    *,
    num: int,
    first_index: int = 0,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    labels: NDArray[np.int64] | None = None,
    prompts: Sequence[str] | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    format: str = "webdataset",
    unit: int = DEFAULT_UNIT,
    mark: str = "",
) -> Job:
    """The job that makes ``num`` images of a model.

    Args:
        checkpoint: the model.
        request: how the sampler's table is made.
        num, first_index, seed, classes, guidance, format, unit: as :class:`stepfusion.bulk.Job` has them.
        labels: int64 [num], one for each image, in place of ``classes``.
        prompts, negative: one for each image, and what guidance leads away from, of models with a text encoder.
        mark: what stands before the names of arguments in messages, "--" in a command.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    spec = checkpoint.model.spec
    table = request.of(spec)
    around = checkpoint.model.around(spec)
    missing = getattr(around.get("prompts"), "missing", None if "prompts" in around else "")
    for name, value in (("prompts", prompts), ("negative", negative)):
        if value is not None and missing is not None:
            raise ValueError(
                f"{mark}{name} was given, and this model has no text encoder{missing and f': {missing}'}"
            )
    if prompts is not None and len(prompts) != num:
        raise ValueError(f"{mark}prompts must have one prompt for each of the {num} images, got {len(prompts)}")
    if prompts is not None and any("\n" in prompt for prompt in prompts):
        raise ValueError(f"{mark}prompts must be of one line each, got a line break in one")
    asked: SamplingOptions = {
        "labels": classes[0] if classes else None if labels is None else int(labels[0]),
        "guidance": guidance,
        "prompt": None if prompts is None else prompts[0],
        "negative_prompt": negative,
    }
    make_request(spec, 1, table, asked, _unencoded(spec) if missing is None else None)  # checks them all
    shape = decoded_shape(around.get("decode"), spec.shape)
    if FORMATS[format].picture and (reason := why_no_picture(shape[0])) is not None:
        raise ValueError(f"{mark}format {format} cannot be used: {reason}; use {mark}format npz")
    return Job(
        model=checkpoint.digest,
        table=_described(request, spec, table),
        table_sha256=table_digest(table),
        shape=shape,
        num=num,
        first_index=first_index,
        seed=seed,
        classes=None if classes is None else tuple(classes),
        labels_sha256=None if labels is None else labels_digest(labels),
        guidance=guidance,
        format=format,
        unit=unit,
        prompts_sha256=None if prompts is None else prompts_digest(prompts),
        negative=negative,
    )


def table_digest(table: StepTable) -> str:
    """SHA-256 of a sampler's rows and of everything else that a table says."""
    digest = hashlib.sha256()
    for name, value in _entries(table):
        digest.update(f"{name} ".encode())
        digest.update(np.ascontiguousarray(value).data if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def _entries(described: StepTable | RowLevels) -> Iterator[tuple[str, object]]:
    """The fields of a table, and of its levels, by their names, to the bit: what ``repr`` rounds is given exactly."""
    for field in dataclasses.fields(described):
        value = getattr(described, field.name)
        if isinstance(value, RowLevels):
            yield from _entries(value)
        elif isinstance(value, NoiseSchedule):
            yield field.name, value.betas
        else:
            yield field.name, value.fingerprint if isinstance(value, Path) else value


def _unencoded(spec: ModelSpec) -> Prompts:
    """Stands for the text encoder in a request that is checked and not done."""
    blank = blank_options(spec)["conditions"] or {}
    encoded = {name: tensor for name, tensor in blank.items() if name != CONCATENATED}
    return lambda _: encoded


def _described(request: TableRequest, spec: ModelSpec, table: StepTable) -> str:
    """The sampler with its steps, and how these were chosen if that is not the model's own way."""
    how = [table.name, f"{len(table)} steps"]
    given = request.given
    if "timesteps" in given or "levels" in given:
        how += [f"{name} {given[name]}" for name in ("timesteps", "levels") if name in given]
    elif given.get("spacing") not in (None, spec.options.get("spacing")):
        how.append(f"spacing {given['spacing']}")
    return ", ".join(how)
