"""Running a job: what is missing is made, each unit is entered in the manifest, and at the end all is checked."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from stepfusion.bulk.check import Fault, find_faults
from stepfusion.bulk.checkpoint import Checkpoint
from stepfusion.bulk.directory import (
    FINISH_LOCK,
    LOCK,
    REPORT,
    check_out,
    is_file_of_job,
    is_shard,
    refuse_other_shard,
)
from stepfusion.bulk.job import ENGINE, IMAGES, Job, read_job, write_job
from stepfusion.bulk.labels import read_labels, write_labels
from stepfusion.bulk.manifest import Manifest, Record, parts, read_records, write_sorted
from stepfusion.bulk.placement import Placement
from stepfusion.bulk.progress import Progress
from stepfusion.bulk.prompts import read_prompts, write_prompts
from stepfusion.bulk.report import make_report, read_report, write_report, write_samples
from stepfusion.bulk.settings import read_settings, refuse_other_options
from stepfusion.bulk.shards import FORMATS, shard_size
from stepfusion.bulk.worker import WorkerConfig
from stepfusion.errors import BulkError
from stepfusion.files.atomic import remove_leftovers

_MOST_TOLD = 3  # faults in a message


def run(
    config: WorkerConfig,
    placement: Placement,
    labels: NDArray[np.int64] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    checkpoint: Checkpoint | None = None,
    samples: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Make what is missing of a job, then check all of it and report.

    Args:
        config: the job and how to run it.
        placement: where to run it.
        labels: int64 [num], if every image has its own.
        prompts: one for each image, if there are some.
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
        recorded = read_settings(out)
        if recorded is not None:
            refuse_other_options(out, recorded, config.execution, config.threads)
        if labels is not None:
            write_labels(labels, out)
        if prompts is not None:
            write_prompts(prompts, out)
        (out / IMAGES).mkdir(exist_ok=True)
        started = time.perf_counter()
        made = _make_missing(config, placement, checkpoint, quiet)
        seconds = time.perf_counter() - started
        with FileLock(out / FINISH_LOCK):
            records = read_records(out)
            if placement.world > 1 and (len(records) < job.units or (placement.rank > 0 and not parts(out))):
                return None
            _check_all(job, out, records)
            write_sorted(out, records.values())
            report = make_report(
                config,
                placement,
                records,
                made=made,
                seconds=seconds,
                samples=write_samples(job, out, records) if samples else None,
            )
            write_report(report, out)
            return report.to_dict()


def verify(out: Path) -> Job:
    """Check a finished directory: every image exactly once, hashes, shapes; returns its job.

    Raises:
        BulkError: the first faults, and how many there are.
    """
    job = read_job(out)
    read_prompts(job, out)  # they must be as they were
    faults = find_faults(job, out, read_labels(job, out), read_records(out))
    told, more, _ = _told(chain(_faults_of_records(out), faults))
    if told:
        raise BulkError(_sentence(out, told, more))
    return job


def _faults_of_records(out: Path) -> Iterator[Fault]:
    """What is wrong with the files that say how images were made, if they are there."""
    for read, name in ((read_settings, ENGINE), (read_report, REPORT)):
        try:
            if os.path.lexists(out / name):
                read(out)
        except BulkError as error:
            yield None, str(error)


@contextmanager
def _alone(out: Path, rank: int) -> Iterator[None]:
    """Hold the directory, which is made if it is missing; the lock of a process that died is free."""
    lock = FileLock(out / (LOCK if rank == 0 else f"{LOCK}-{rank}"), timeout=0)
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
    if records and read_settings(out) is None:
        raise BulkError(f"{out / ENGINE} is missing, so that other images might be made in another way: restore it")
    for unit in missing:
        refuse_other_shard(out, f"{unit:06d}{FORMATS[job.format].suffix}")
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
    remove_leftovers(out / IMAGES, lambda name: is_shard(name) and placement.mine(int(name[:6])))
    if placement.world == 1:
        remove_leftovers(out, is_file_of_job)


def _present(out: Path) -> dict[int, Record]:
    """The recorded units whose shards are there with their sizes."""
    records = read_records(out)
    lost = [unit for unit, record in records.items() if shard_size(out, record.shard) != record.bytes]
    for unit in lost:
        refuse_other_shard(out, records[unit].shard)
        print(f"stepfusion: the shard {records.pop(unit).shard} is gone or cut off: made again", file=sys.stderr)
    return records


def _check_all(job: Job, out: Path, records: dict[int, Record]) -> None:
    """Check the post-conditions; if one fails, the unit is taken out of the manifest, so that it is made again."""
    told, more, broken = _told(find_faults(job, out, read_labels(job, out), records))
    if told:
        write_sorted(out, [record for unit, record in records.items() if unit not in broken])
        raise BulkError(_sentence(out, told, more))


def _told(faults: Iterable[Fault]) -> tuple[list[str], int, set[int]]:
    """The first faults in words, how many more there are, and the units that are to be made again."""
    told, more, broken = list[str](), 0, set[int]()
    for unit, sentence in faults:
        if len(told) < _MOST_TOLD:
            told.append(sentence)
        else:
            more += 1
        if unit is not None:
            broken.add(unit)
    return told, more, broken


def _sentence(out: Path, told: list[str], more: int) -> str:
    rest = f", and {more} more faults" if more else ""
    again = "the command that made it makes it whole again"
    return f"{out} is not complete and sound: {'; '.join(told)}{rest}; {again}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
