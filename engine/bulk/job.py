"""What a directory of bulk images is: the job, its units of consecutive images, and what may not change between runs.

::

    DIR/job.json           what is made: model, table, seed, labels, guidance, format, unit
    DIR/engine.json        how: device, dtype, paths, batch, versions; written by the first worker
    DIR/labels.npy         the labels, where they came from a file
    DIR/images/            one shard a unit
    DIR/manifest.jsonl     one line for each finished unit
    DIR/report.json        the last complete run
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion.checkpoints.load import load_model, network_config
from stepfusion.errors import BulkError
from stepfusion.files.atomic import atomic_write, publish_once, read_json
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

VERSION = "stepfusion bulk 1"
JOB, ENGINE, LABELS, IMAGES = "job.json", "engine.json", "labels.npy", "images"
DEFAULT_UNIT = 512
MAX_UNITS = 1_000_000

_MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class Unit:
    """Consecutive images that are made together and become one shard; ``labels`` has one for each, or is None."""

    number: int
    seed: int
    indices: Sequence[int]
    labels: list[int] | None

    @property
    def name(self) -> str:
        """The name of its shard, without a suffix."""
        return f"{self.number:06d}"

    def without(self, left_out: Collection[int]) -> Unit:
        """The unit without the images of these indices."""
        kept = [place for place, index in enumerate(self.indices) if index not in left_out]
        labels = None if self.labels is None else [self.labels[place] for place in kept]
        return replace(self, indices=[self.indices[place] for place in kept], labels=labels)


@dataclass(frozen=True)
class Job:
    """What is made. Together with the engine's settings it decides every byte of every shard.

    Attributes:
        model: SHA-256 of weights, config and scheduler, as :func:`model_digest` takes it.
        table, table_sha256: the sampler's name with its steps, where asked for their spacing, and the digest of its
            rows.
        shape: of one image, (C, H, W).
        num, first_index, seed: the images ``first_index`` .. ``first_index + num - 1`` of the seed.
        classes: the labels that the indices take in turn (index i has ``classes[i % len(classes)]``), or None.
        labels_sha256: of labels.npy, where every image has its own label; ``classes`` is None then.
        guidance: classifier-free guidance scale, or None.
        format: of the shards.
        unit: images a unit; the last one has what is left.
    """

    model: str
    table: str
    table_sha256: str
    shape: tuple[int, ...]
    num: int
    first_index: int
    seed: int
    classes: tuple[int, ...] | None
    labels_sha256: str | None
    guidance: float | None
    format: str
    unit: int

    @property
    def units(self) -> int:
        """How many units there are."""
        return -(-self.num // self.unit)

    @property
    def labelled(self) -> bool:
        """True where images have labels."""
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

    def unit_at(self, number: int, labels: NDArray[np.int64] | None) -> Unit:
        """Unit ``number``; ``labels`` int64 [num] where they came from a file."""
        indices = self.indices(number)
        each: list[int] | None = None
        if labels is not None:
            each = labels[indices.start - self.first_index : indices.stop - self.first_index].tolist()
        elif self.classes is not None:
            each = [self.classes[index % len(self.classes)] for index in indices]
        return Unit(number, self.seed, indices, each)


def model_digest(source: str) -> str:
    """SHA-256 of what a model directory says: every weight's name, dtype, shape and value, and all configs.

    The layout of the directory and of its files does not count.
    """
    loaded = load_model(source)
    digest = hashlib.sha256()
    facts = [network_config(loaded.network), loaded.scheduler_config, loaded.class_names, loaded.null_label]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(loaded.network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def table_digest(table: StepTable) -> str:
    """SHA-256 of a sampler's rows and of everything else that a table says."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if isinstance(value, NoiseSchedule):
            value = value.betas
        digest.update(f"{field.name} ".encode())
        digest.update(np.ascontiguousarray(value).data if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def labels_file(labels: NDArray[np.int64]) -> bytes:
    """labels.npy of labels int64 [num]."""
    buffer = io.BytesIO()
    np.save(buffer, labels, allow_pickle=False)
    return buffer.getvalue()


def read_labels(job: Job, out: Path) -> NDArray[np.int64] | None:
    """The labels int64 [num] of labels.npy; None where the job has no such file. BulkError where it is damaged."""
    if job.labels_sha256 is None:
        return None
    data = (out / LABELS).read_bytes()
    if hashlib.sha256(data).hexdigest() != job.labels_sha256:
        raise BulkError(f"{out / LABELS} is damaged: its hash is not the one in {JOB}")
    labels: NDArray[np.int64] = np.load(io.BytesIO(data), allow_pickle=False)
    return labels


def write_job(job: Job, labels: NDArray[np.int64] | None, out: Path) -> None:
    """Enter the job into an empty directory, or check that it is the one there.

    Raises:
        BulkError: another job was begun there; the sentence names what differs.
    """
    publish_once(out / JOB, to_json({"version": VERSION, **asdict(job)}))
    refuse_differences(out, asdict(read_job(out)), asdict(job))
    if labels is not None:
        data = labels_file(labels)
        if not (out / LABELS).is_file() or (out / LABELS).read_bytes() != data:
            atomic_write(out / LABELS, data)


def read_job(out: Path) -> Job:
    """The job of a directory; BulkError where it has none, or one of another version."""
    value = read_json(out / JOB, BulkError, _MAX_JSON_BYTES)
    if value.pop("version", None) != VERSION:
        raise BulkError(f"{out / JOB} is not of {VERSION!r}")
    names = {field.name for field in dataclasses.fields(Job)}
    if set(value) != names:
        raise BulkError(
            f"{out / JOB} must have the entries {', '.join(sorted(names))}, got {', '.join(sorted(value))}"
        )
    value["shape"] = tuple(value["shape"])
    value["classes"] = None if value["classes"] is None else tuple(value["classes"])
    return Job(**value)


def refuse_differences(out: Path, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    """BulkError that names every entry of the two that differs, with both values."""
    differing = [
        f"{name} was {_shown(recorded.get(name))} and is {_shown(given.get(name))}"
        for name in sorted(recorded.keys() | given.keys())
        if recorded.get(name) != given.get(name)
    ]
    if differing:
        raise BulkError(f"{out} was begun otherwise: {'; '.join(differing)}. Use another directory, or what it had")


def to_json(value: dict[str, Any]) -> bytes:
    """A JSON file that is pleasant to read."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _shown(value: Any) -> str:
    """A value in a message; a digest by its first digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, tuple) and len(value) > 16:
        return f"{len(value)} classes ({hashlib.sha256(repr(value).encode()).hexdigest()[:12]})"
    return repr(value)
