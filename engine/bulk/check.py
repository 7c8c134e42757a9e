"""The post-conditions: every image exactly once, every shard as it was written, nothing else beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepfusion.bulk.job import IMAGES, Job, Unit
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.shards import FORMATS, shard_digest
from stepfusion.errors import BulkError, first_line


def find_faults(
    job: Job, out: Path, labels: NDArray[np.int64] | None, records: Mapping[int, Record]
) -> Iterator[tuple[int | None, str]]:
    """What is wrong with the images of a job: units whose shards must be made again, or None, each with a sentence.

    All shards are read whole: their hashes, and the images, indices and labels in them.
    """
    for number in range(job.units):
        record = records.get(number)
        fault: str | None = "is not in the manifest"
        if record is not None:
            fault = _fault(job, out, job.unit_at(number, labels).without(record.left_out), record)
        if fault is not None:
            yield number, f"unit {number} {fault}"
    for number in sorted(records.keys() - set(range(job.units))):
        yield number, f"unit {number} is in the manifest, and the job has units 0 to {job.units - 1}"
    known = {record.shard for record in records.values()}
    for path in sorted((out / IMAGES).iterdir()):
        if path.name not in known and not path.name.startswith("."):
            yield None, f"{path} is not in the manifest"


def _fault(job: Job, out: Path, unit: Unit, record: Record) -> str | None:
    """What is wrong with one shard."""
    form = FORMATS[job.format]
    path = out / IMAGES / record.shard
    if record.shard != f"{unit.name}{form.suffix}":
        return f"has the shard {record.shard}, which is not its name"
    if not path.exists():
        return f"has no shard: {path} is missing"
    if shard_digest(path) != (record.sha256, record.bytes):
        return f"has another hash or size than in the manifest: {path} was changed"
    try:
        contents = form.read(path)
    except (BulkError, OSError, ValueError, KeyError, EOFError) as error:
        return f"cannot be read: {path}: {first_line(error)}"
    for name, given, wanted in (
        ("indices", contents.indices, list(unit.indices)),
        ("labels", contents.labels, unit.labels),
        ("shape", contents.pixels.shape, (len(unit.indices), *job.pixels_shape)),
        ("dtype", contents.pixels.dtype, np.dtype(np.uint8)),
    ):
        if given != wanted:
            return f"has other {name} than the job: {path}"
    if (record.first, record.count) != (unit.indices[0], len(unit.indices)):
        return "has other indices in the manifest than in the job"
    return None
