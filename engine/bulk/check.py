"""The post-conditions: every image exactly once, every shard as it was written, nothing else beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepfusion.bulk.directory import entries_of, refuse_other_shard
from stepfusion.bulk.job import IMAGES, Job
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.shard_reading import most_bytes, read_shard
from stepfusion.bulk.shards import FORMATS, shard_digest, shard_size
from stepfusion.errors import BulkError
from stepfusion.files.regular import folder_below

Fault = tuple[int | None, str]


def find_faults(
    job: Job, out: Path, labels: NDArray[np.int64] | None, records: Mapping[int, Record]
) -> Iterator[Fault]:
    """What is wrong with the images of a job: units whose shards must be made again, or None, each with a sentence.

    All shards are read whole: their hashes, and the images, indices and labels in them.
    """
    for number in range(job.units):
        record = records.get(number)
        fault = "is not in the manifest" if record is None else _fault(job, out, labels, record)
        if fault is not None:
            yield number, f"unit {number} {fault}"
    for number in sorted(unit for unit in records if unit >= job.units):
        yield number, f"unit {number} is in the manifest, and the job has units 0 to {job.units - 1}"
    yield from _strangers(out, {record.shard for record in records.values()})


def _strangers(out: Path, known: set[str]) -> Iterator[Fault]:
    """What lies beside the shards."""
    try:
        with folder_below(out, IMAGES) as images:
            names = sorted(entry.name for entry in entries_of(images))
    except OSError as error:
        yield None, f"{out / IMAGES} cannot be read: {error.strerror}"
        return
    for name in names:
        if name not in known and not name.startswith("."):
            yield None, f"{out / IMAGES / name} is not in the manifest"


def _fault(job: Job, out: Path, labels: NDArray[np.int64] | None, record: Record) -> str | None:
    """What is wrong with one shard. Its size is compared with the job's numbers before either is relied upon."""
    indices, path = job.indices(record.unit), out / IMAGES / record.shard
    if record.shard != f"{record.unit:06d}{FORMATS[job.format].suffix}":
        return f"has the shard {record.shard}, which is not its name"
    if not os.path.lexists(path):
        return f"has no shard: {path} is missing"
    kept = len(indices) - len({index for index in record.left_out if index in indices})
    if record.count != kept:
        return "has other indices in the manifest than in the job"
    if not record.count <= record.bytes <= most_bytes(job, record.count):
        return f"has {record.bytes} bytes in the manifest, which cannot hold its images"
    try:
        refuse_other_shard(out, record.shard)
    except BulkError as error:
        return f"cannot be read: {error}"
    try:
        written = (record.sha256, record.bytes)
        if shard_size(out, record.shard) != record.bytes or shard_digest(out, record.shard) != written:
            return f"has another hash or size than in the manifest: {path} was changed"
        unit = job.unit_at(record.unit, labels).without(record.left_out)
        if record.first != unit.indices[0]:
            return "has other indices in the manifest than in the job"
        for _ in read_shard(job, out, record.shard, unit):
            pass
    except BulkError as error:
        return f"{error}: {path}"
    except OSError as error:
        return f"cannot be read: {path}: {error.strerror or error}"
    return None
