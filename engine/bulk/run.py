"""Running a job: what is missing is made, each unit is entered in the manifest, and at the end all is checked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from stepfusion.bulk.check import find_faults
from stepfusion.bulk.checkpoint import Checkpoint
from stepfusion.bulk.job import IMAGES, JOB, Job, read_job, to_json, write_job
from stepfusion.bulk.labels import read_labels, write_labels
from stepfusion.bulk.manifest import Manifest, Record, parts, read_records, write_sorted
from stepfusion.bulk.placement import Placement
from stepfusion.bulk.progress import Progress
from stepfusion.bulk.settings import read_settings
from stepfusion.bulk.shards import FORMATS, shard_digest, shard_size, write_npz
from stepfusion.bulk.worker import WorkerConfig
from stepfusion.errors import BulkError
from stepfusion.files.atomic import atomic_file, atomic_write, remove_leftovers

REPORT = "report.json"

_LOCK, _FINISH_LOCK = ".lock", ".finish.lock"


def run(
    config: WorkerConfig,
    placement: Placement,
    labels: NDArray[np.int64] | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    samples: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Make what is missing of a job, then check all of it and report.

    Args:
        config: the job and how to run it.
        placement: where to run it.
        labels: int64 [num], if every image has its own.
        checkpoint: the model, if this process has read it already.
        samples: also write ``samples_NxHxWxC.npz``, as evaluators read it.
        quiet: no progress.

    Returns:
        what report.json says; None if other ranks are not done yet.

    Raises:
        ValueError: the directory holds something else.
        BulkError: another job was begun there, somebody else is writing there, or what went wrong on the way; what
            is finished stays, and the same call goes on.
        NonFiniteError: an image became non-finite, and no pixels were made of it.
    """
    out, job = config.out, config.job
    check_out(out)
    with _alone(out, placement.rank):
        write_job(job, out)
        if labels is not None:
            write_labels(labels, out)
        (out / IMAGES).mkdir(exist_ok=True)
        started = time.perf_counter()
        made = _make_missing(config, placement, checkpoint, quiet)
        seconds = time.perf_counter() - started
        with FileLock(out / _FINISH_LOCK):
            records = read_records(out)
            if placement.world > 1 and (len(records) < job.units or (placement.rank > 0 and not parts(out))):
                return None
            _check_all(job, out, records)
            write_sorted(out, records.values())
            report = _report(config, placement, records, made, seconds)
            if samples:
                report["samples"] = _write_samples(job, out, records)
            atomic_write(out / REPORT, to_json(report))
            return report


def verify(out: Path) -> Job:
    """Check a finished directory: every image exactly once, hashes, shapes; returns its job.

    Raises:
        BulkError: the first faults, and how many there are.
    """
    job = read_job(out)
    records = read_records(out)
    faults = [sentence for _, sentence in find_faults(job, out, read_labels(job, out), records)]
    if faults:
        raise BulkError(_sentence(out, faults))
    return job


def check_out(out: Path) -> None:
    """ValueError unless ``out`` is, or can become, the directory of a job."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file; it must be a directory")
    if not out.exists() and not out.absolute().parent.is_dir():
        raise ValueError(f"out {out} cannot be made: {out.absolute().parent} is not a directory")
    if out.is_dir() and not (out / JOB).exists():
        others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
        if others:
            raise ValueError(
                f"out {out} holds {others[0]} and no {JOB}: name a new directory, or one of this command"
            )


@contextmanager
def _alone(out: Path, rank: int) -> Iterator[None]:
    """Hold the directory, which is made if it is missing; the lock of a process that died is free."""
    lock = FileLock(out / (_LOCK if rank == 0 else f"{_LOCK}-{rank}"), timeout=0)
    try:
        out.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BulkError(f"{out} is being written by another process") from None
    except OSError as error:
        raise BulkError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _make_missing(config: WorkerConfig, placement: Placement, checkpoint: Checkpoint | None, quiet: bool) -> int:
    """Make this process's missing units; returns how many images that were."""
    job, out = config.job, config.out
    _sweep(out, placement)
    records = _present(out)
    before = sum(record.count for unit, record in records.items() if placement.mine(unit))
    missing = [unit for unit in range(job.units) if unit not in records and placement.mine(unit)]
    total = before + sum(len(job.indices(unit)) for unit in missing)
    manifest = Manifest(out, placement.rank if placement.world > 1 else None)
    with Progress(total, before, quiet=quiet) as progress:
        try:
            if missing:
                with closing(placement.make(config, missing, checkpoint)) as made:
                    for record in made:
                        manifest.append(record)
                        progress.update(record.count)
        except (OSError, BulkError) as error:
            state = f"{progress.done} of {total} images are finished, and the same command goes on"
            raise BulkError(f"{_reason(error)}; {state}") from error
        except (KeyboardInterrupt, SystemExit):
            print(
                f"stepfusion: stopped: {progress.done} of {total} images are finished in {out.name}",
                file=sys.stderr,
            )
            raise
        finally:
            _sweep(out, placement)
        return progress.done - before


def _sweep(out: Path, placement: Placement) -> None:
    """Remove what this process, or one that was killed, left half written; other ranks' files stay."""
    remove_leftovers(out / IMAGES, lambda name: name[:6].isdecimal() and placement.mine(int(name[:6])))
    if placement.world == 1:
        remove_leftovers(out, lambda _: True)


def _present(out: Path) -> dict[int, Record]:
    """The recorded units whose shards are there with their sizes."""
    records = read_records(out)
    sizes = {unit: shard_size(out / IMAGES / record.shard) for unit, record in records.items()}
    lost = [unit for unit, record in records.items() if sizes[unit] != record.bytes]
    for unit in lost:
        print(f"stepfusion: the shard {records.pop(unit).shard} is gone or cut off: made again", file=sys.stderr)
    return records


def _check_all(job: Job, out: Path, records: dict[int, Record]) -> None:
    """Check the post-conditions; if one fails, the unit is taken out of the manifest, so that it is made again."""
    faults = list(find_faults(job, out, read_labels(job, out), records))
    if faults:
        broken = {unit for unit, _ in faults}
        write_sorted(out, [record for unit, record in records.items() if unit not in broken])
        raise BulkError(_sentence(out, [sentence for _, sentence in faults]))


def _sentence(out: Path, faults: list[str]) -> str:
    more = f", and {len(faults) - 3} more faults" if len(faults) > 3 else ""
    again = "the command that made it makes it whole again"
    return f"{out} is not complete and sound: {'; '.join(faults[:3])}{more}; {again}"


def _write_samples(job: Job, out: Path, records: Mapping[int, Record]) -> dict[str, str]:
    """Write samples_NxHxWxC.npz, a shard at a time: arr_0 uint8 [N, H, W, C] and, with labels, arr_1 int64 [N]."""
    labels = read_labels(job, out)
    ordered = [records[unit] for unit in range(job.units)]
    count = sum(record.count for record in ordered)
    pixels = (FORMATS[job.format].read(out / IMAGES / record.shard).pixels.tobytes() for record in ordered)
    arrays: dict[str, Any] = {"arr_0": (np.dtype(np.uint8), (count, *job.pixels_shape), pixels)}
    if job.labelled:
        kept = (job.unit_at(record.unit, labels).without(record.left_out).labels for record in ordered)
        arrays["arr_1"] = (np.dtype(np.int64), (count,), (np.array(each, dtype=np.int64).tobytes() for each in kept))
    path = out / f"samples_{'x'.join(map(str, (count, *job.pixels_shape)))}.npz"
    try:
        with atomic_file(path) as file:
            write_npz(file, arrays)
    except OSError as error:
        raise BulkError(f"{path}: {error.strerror}; all images are finished, and the same command goes on") from error
    return {"file": path.name, "sha256": shard_digest(path)[0]}


def _report(
    config: WorkerConfig, placement: Placement, records: Mapping[int, Record], made: int, seconds: float
) -> dict[str, Any]:
    """What was made, how, and how fast; ``made`` and ``seconds`` are of this run and this process's units.

    ``non_finite`` are the indices that were left out.
    """
    job = config.job
    settings = read_settings(config.out)
    assert settings is not None
    return {
        "images": sum(record.count for record in records.values()),
        "shape": list(job.pixels_shape),
        "labelled": job.labelled,
        "format": job.format,
        "units": job.units,
        "table": job.table,
        "seed": job.seed,
        "non_finite": sorted(index for record in records.values() for index in record.left_out),
        "images_made_now": made,
        "seconds": round(seconds, 3),
        "images_per_second": round(made / seconds, 3) if made else None,
        "devices": list(placement.devices) if placement.ray is None else f"ray {placement.ray}",
        "processes": placement.world * len(placement.devices) if placement.ray is None else placement.workers,
        "engine": asdict(settings),
    }


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
