"""What a complete run leaves beside the shards: report.json, and if it is asked for, all images in one npz."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from stepfusion.bulk.directory import REPORT
from stepfusion.bulk.job import Job, Unit
from stepfusion.bulk.labels import read_labels
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.placement import Placement
from stepfusion.bulk.settings import RecordedSettings, read_settings
from stepfusion.bulk.shard_reading import read_shard
from stepfusion.bulk.shards import Parts, file_digest, write_npz
from stepfusion.bulk.stored import FirstFault, read_stored, to_json
from stepfusion.bulk.worker import WorkerConfig
from stepfusion.errors import BulkError
from stepfusion.files.atomic import atomic_file, atomic_write_below

_MAX_JSON_BYTES = 1 << 28


@dataclass(frozen=True)
class SamplesFile:
    """The file with all images, and its SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Report:
    """The last complete run.

    Attributes:
        images, shape, labelled, format, units, table, seed: what was made; ``shape`` is of an image, (H, W, C).
        non_finite: the indices of images that were left out.
        images_made_now, seconds, images_per_second: of this run, and of this process's units.
        devices, processes: where it ran.
        engine: the settings that decided the bits.
        samples: the file with all images, if it was asked for.
    """

    images: int
    shape: Annotated[tuple[int, ...], FirstFault()]
    labelled: bool
    format: str
    units: int
    table: str
    seed: int
    non_finite: Annotated[tuple[int, ...], FirstFault()]
    images_made_now: int
    seconds: float
    images_per_second: float | None
    devices: Annotated[tuple[str, ...], FirstFault()] | str
    processes: int | None
    engine: RecordedSettings
    samples: SamplesFile | None = None

    def to_dict(self) -> dict[str, Any]:
        """What report.json says."""
        entries = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.samples is None:
            del entries["samples"]
        return entries


def write_report(report: Report, out: Path) -> None:
    """Write report.json."""
    atomic_write_below(out, REPORT, to_json(report.to_dict()))


def read_report(out: Path) -> Report:
    """What report.json says; BulkError if it is missing or damaged."""
    return read_stored(out / REPORT, Report, _MAX_JSON_BYTES)


def make_report(
    config: WorkerConfig,
    placement: Placement,
    records: Mapping[int, Record],
    *,
    made: int,
    seconds: float,
    samples: SamplesFile | None,
) -> Report:
    """What was made, how, and how fast; ``made`` images in ``seconds`` are of this run and this process's units."""
    job = config.job
    settings = read_settings(config.out)
    if settings is None:
        raise BulkError(f"{config.out} has shards, and no record of the settings that they were made with")
    return Report(
        images=sum(record.count for record in records.values()),
        shape=job.pixels_shape,
        labelled=job.labelled,
        format=job.format,
        units=job.units,
        table=job.table,
        seed=job.seed,
        non_finite=tuple(sorted(index for record in records.values() for index in record.left_out)),
        images_made_now=made,
        seconds=round(seconds, 3),
        images_per_second=round(made / seconds, 3) if made else None,
        devices=placement.devices if placement.ray is None else f"ray {placement.ray}",
        processes=placement.world * len(placement.devices) if placement.ray is None else placement.workers,
        engine=settings,
        samples=samples,
    )


def write_samples(job: Job, out: Path, records: Mapping[int, Record]) -> SamplesFile:
    """Write samples_NxHxWxC.npz, an image at a time: arr_0 uint8 [N, H, W, C] and, with labels, arr_1 int64 [N]."""
    labels = read_labels(job, out)

    def units() -> Iterator[Unit]:
        return (job.unit_at(number, labels).without(records[number].left_out) for number in range(job.units))

    def pixels() -> Iterator[bytes]:
        for unit in units():
            for image in read_shard(job, out, records[unit.number].shard, unit):
                yield image.tobytes()

    count = sum(record.count for record in records.values())
    arrays: dict[str, Parts] = {"arr_0": (np.dtype(np.uint8), (count, *job.pixels_shape), pixels())}
    if job.labelled:
        kept = (np.array(unit.labels, dtype=np.int64).tobytes() for unit in units())
        arrays["arr_1"] = (np.dtype(np.int64), (count,), kept)
    path = out / f"samples_{'x'.join(map(str, (count, *job.pixels_shape)))}.npz"
    try:
        with atomic_file(path) as file:
            write_npz(file, arrays)
    except OSError as error:
        raise BulkError(f"{path}: {error.strerror}; all images are finished, and the same command goes on") from error
    return SamplesFile(path.name, file_digest(out, path.name)[0])
