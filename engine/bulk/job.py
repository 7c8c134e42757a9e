"""What a directory of bulk images is: the job, its units of consecutive images, and what may not change between runs.

::

    DIR/job.json           what is made: model, table, seed, labels, guidance, format, unit
    DIR/engine.json        how: device, dtype, paths, batch, versions; written by the first worker
    DIR/labels.npy         the labels, if they came from a file
    DIR/prompts.txt        the prompts, if there are some, one on a line
    DIR/images/            one shard a unit
    DIR/manifest.jsonl     one line for each finished unit
    DIR/report.json        the last complete run
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from stepfusion import _checks
from stepfusion.bulk.stored import FirstFault, read_stored, to_json
from stepfusion.errors import BulkError
from stepfusion.files.atomic import publish_once
from stepfusion.files.json_files import FileModel, read_typed

VERSION = "stepfusion bulk 1"
JOB, ENGINE, LABELS, PROMPTS, IMAGES = "job.json", "engine.json", "labels.npy", "prompts.txt", "images"
#: The formats of shards, and how their names end.
SUFFIXES = {"webdataset": ".tar", "png": "", "npz": ".npz"}
DEFAULT_UNIT = 512
MAX_UNITS = 1_000_000
MAX_INDEX = 1 << 32

_MAX_JSON_BYTES = 16 << 20
_MAX_VALUES = 1 << 26  # of one image; Pillow warns of pictures that are a little larger
_MAX_LABEL = 1 << 31
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Unit:
    """Consecutive images that are made together and become one shard.

    ``labels`` and ``prompts`` have one for each, or are None.
    """

    number: int
    seed: int
    indices: Sequence[int]
    labels: list[int] | None
    prompts: list[str] | None = None

    @property
    def name(self) -> str:
        """The name of its shard, without a suffix."""
        return f"{self.number:06d}"

    def without(self, left_out: Collection[int]) -> Unit:
        """The unit without the images of these indices."""
        kept = [place for place, index in enumerate(self.indices) if index not in left_out]
        labels = None if self.labels is None else [self.labels[place] for place in kept]
        prompts = None if self.prompts is None else [self.prompts[place] for place in kept]
        return replace(self, indices=[self.indices[place] for place in kept], labels=labels, prompts=prompts)


@dataclass(frozen=True)
class Job:
    """What is made. Together with the recorded settings it decides every byte of every shard.

    Attributes:
        model: SHA-256 of weights, config and scheduler (:attr:`stepfusion.bulk.checkpoint.Checkpoint.digest`).
        table, table_sha256: the sampler's name with its steps, and their spacing if it was asked for; the digest of
            its rows.
        shape: of one image, (C, H, W).
        num, first_index, seed: the images ``first_index`` .. ``first_index + num - 1`` of the seed.
        classes: the labels that the indices take in turn (index i has ``classes[i % len(classes)]``), or None.
        labels_sha256: of labels.npy, if every image has its own label; ``classes`` is None then.
        guidance: classifier-free guidance scale, or None.
        format: of the shards.
        unit: images a unit; the last one has what is left.
        prompts_sha256: of prompts.txt, if every image has a prompt.
        negative: what guidance leads away from, or None for no prompt.

    Raises:
        TypeError, ValueError: naming the entry.
    """

    model: str
    table: str
    table_sha256: str
    shape: Annotated[tuple[int, ...], FirstFault()]
    num: int
    first_index: int
    seed: int
    classes: Annotated[tuple[int, ...], FirstFault()] | None
    labels_sha256: str | None
    guidance: float | None
    format: str
    unit: int
    prompts_sha256: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "table_sha256", "labels_sha256", "prompts_sha256"):
            check_digest(name, getattr(self, name), may_be_none=name in ("labels_sha256", "prompts_sha256"))
        _check_shape(self.shape)
        _checks.integer("num", self.num, 1, MAX_INDEX)
        _checks.integer("first_index", self.first_index, 0, MAX_INDEX - self.num)
        _checks.integer("seed", self.seed, 0, (1 << 64) - 1)
        _check_classes(self.classes, self.labels_sha256)
        if self.guidance is not None:
            _checks.number("guidance", self.guidance)
        if self.negative is not None and not isinstance(self.negative, str):
            raise TypeError(f"negative must be a text, got {self.negative!r}")
        _checks.choice("format", self.format, SUFFIXES)
        _checks.integer("unit", self.unit, -(-self.num // MAX_UNITS), MAX_INDEX)

    @property
    def units(self) -> int:
        """How many units there are."""
        return -(-self.num // self.unit)

    @property
    def labelled(self) -> bool:
        """Whether images have labels."""
        return self.classes is not None or self.labels_sha256 is not None

    @cached_property
    def pixels_shape(self) -> tuple[int, int, int]:
        """Of one image as pixels, (H, W, C)."""
        channels, height, width = self.shape
        return height, width, channels

    def indices(self, number: int) -> range:
        """The indices of unit ``number``."""
        start = self.first_index + number * self.unit
        return range(start, min(start + self.unit, self.first_index + self.num))

    def unit_at(self, number: int, labels: NDArray[np.int64] | None, prompts: Sequence[str] | None = None) -> Unit:
        """Unit ``number``; ``labels``, if they came from a file, are int64 [num], and so many are ``prompts``."""
        indices = self.indices(number)
        places = slice(indices.start - self.first_index, indices.stop - self.first_index)
        each: list[int] | None = None
        if labels is not None:
            each = labels[places].tolist()
        elif self.classes is not None:
            each = [self.classes[index % len(self.classes)] for index in indices]
        return Unit(number, self.seed, indices, each, None if prompts is None else list(prompts[places]))


def write_job(job: Job, out: Path) -> None:
    """Enter the job into an empty directory, or check that it is the one there.

    Raises:
        BulkError: another job was begun there; the sentence names what differs.
    """
    publish_once(out / JOB, to_json({"version": VERSION, **asdict(job)}))
    refuse_differences(out, asdict(read_job(out)), asdict(job))


class _Header(FileModel):
    """What job.json has in every version."""

    model_config = ConfigDict(extra="ignore")
    version: str


@dataclass(frozen=True, kw_only=True)
class _JobFile(Job):
    """What job.json has in this version."""

    version: str


def read_job(out: Path) -> Job:
    """The job of a directory; BulkError if it has none, or one that is damaged or of another version."""
    if read_typed(out / JOB, _Header, BulkError, _MAX_JSON_BYTES).version != VERSION:
        raise BulkError(f"{out / JOB} is not of {VERSION!r}")
    content = read_stored(out / JOB, _JobFile, _MAX_JSON_BYTES)
    return Job(**{field.name: getattr(content, field.name) for field in fields(Job)})


def refuse_differences(out: Path, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    """BulkError that names every entry of the two that differs, with both values."""
    differing = [
        f"{name} was {_shown(recorded.get(name))} and is {_shown(given.get(name))}"
        for name in sorted(recorded.keys() | given.keys())
        if recorded.get(name) != given.get(name)
    ]
    if differing:
        raise BulkError(
            f"{out} was started with other settings: {'; '.join(differing)}. Use another directory, or those settings"
        )


def check_digest(name: str, value: str | None, *, may_be_none: bool = False) -> None:
    """ValueError unless ``value`` is a SHA-256."""
    if value is None and may_be_none:
        return
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{name} must be a SHA-256 in 64 hexadecimal digits, got {value!r}")


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 3:
        raise ValueError(f"shape must be channels, height and width of an image, got {list(shape)}")
    sizes = [_checks.integer("shape", size, 1, _MAX_VALUES) for size in shape]
    if prod(sizes) > _MAX_VALUES:
        raise ValueError(f"shape must have at most {_MAX_VALUES} values, got {sizes}")


def _check_classes(classes: Sequence[int] | None, labels_sha256: str | None) -> None:
    if classes is None:
        return
    if labels_sha256 is not None:
        raise ValueError("classes and labels_sha256 exclude each other, got both")
    if not classes:
        raise ValueError("classes must not be empty")
    for label in classes:
        _checks.integer("classes", label, 0, _MAX_LABEL)


def _shown(value: Any) -> str:
    """A value in a message; a digest by its first digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, tuple) and len(value) > 16:
        return f"{len(value)} classes ({hashlib.sha256(repr(value).encode()).hexdigest()[:12]})"
    return repr(value)
