"""A worker: an engine that makes units, each into its shard."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from stepfusion.bulk.checkpoint import Checkpoint, read_checkpoint
from stepfusion.bulk.directory import refuse_other_shard
from stepfusion.bulk.job import IMAGES, Job, Unit, refuse_differences
from stepfusion.bulk.labels import read_labels
from stepfusion.bulk.manifest import MOST_LEFT_OUT, Record
from stepfusion.bulk.new_job import table_digest
from stepfusion.bulk.prompts import read_prompts
from stepfusion.bulk.settings import (
    RecordedSettings,
    read_settings,
    record_settings,
    refuse_other_device,
    refuse_other_options,
    settings_of,
)
from stepfusion.bulk.shards import FORMATS, shard_digest
from stepfusion.engine import Engine
from stepfusion.errors import BulkError, NonFiniteError
from stepfusion.execution.forking import check_process
from stepfusion.options import ExecutionOptions
from stepfusion.samplers.table_request import TableRequest

_ENCODERS = 8


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is told: the job, and how to run it. All of it can be sent to another process or machine.

    Attributes:
        job, out: what is made, and the directory.
        model, table: where the model is, and how its sampler's table is made.
        execution: how the model is run. What it leaves open ("auto", None, not invariant) is what the job was begun
            with; what it gives must be that.
        threads: CPU threads of a worker on a CPU, in the same way. None is, when the job is begun, PyTorch's own
            number divided by ``cpu_workers``, the CPU workers of this machine.
        leave_out: leave out images that become non-finite, up to 16 of a unit; else, an error.
        lora: LoRA files that are added to the model, each with its scale.
    """

    job: Job
    out: Path
    model: str
    table: TableRequest
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    threads: int | None = None
    cpu_workers: int = 1
    leave_out: bool = False
    lora: tuple[tuple[str, float], ...] = ()

    def on(self, device: str) -> WorkerConfig:
        """The same on another device; "auto" leaves the one of ``execution``."""
        return self if device == "auto" else replace(self, execution=replace(self.execution, device=device))


class Worker:
    """An engine that makes the units of a job.

    Args:
        config: what it is told.
        checkpoint: the model, if this process has read it already.

    Raises:
        BulkError: the model or the table is another one, or the settings are not those that the job was begun with.
        RuntimeError: this process was forked from one that had computed.
        Whatever :class:`stepfusion.Engine` raises.
    """

    def __init__(self, config: WorkerConfig, checkpoint: Checkpoint | None = None) -> None:
        check_process()
        checkpoint = checkpoint or read_checkpoint(config.model, config.lora)
        if checkpoint.digest != config.job.model:
            raise BulkError(f"the model {config.model} is not the one that this job was begun with")
        self._config, self._format = config, FORMATS[config.job.format]
        self._labels, self._prompts = read_labels(config.job, config.out), read_prompts(config.job, config.out)
        self._engine, self.settings = _start(config, checkpoint)
        self._table = config.table.of(self._engine)
        if table_digest(self._table) != config.job.table_sha256:
            raise BulkError(
                f"the table of {self._table.name}, {len(self._table)} steps, is not the one that this job was begun "
                f"with: {config.job.table}"
            )
        self._encoders = ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1), "stepfusion-encode")

    def make(self, number: int) -> Record:
        """Make one unit; its shard is whole and on disk when this returns.

        Raises:
            NonFiniteError: naming the image, unless it may be left out; no shard is written.
            BulkError: memory ran out, and a smaller batch would give other bits; or somebody else put something
                where the shard is to be.
            OSError: the shard cannot be written.
        """
        job, out = self._config.job, self._config.out
        unit = job.unit_at(number, self._labels, self._prompts)
        name = f"{unit.name}{self._format.suffix}"
        refuse_other_shard(out, name)
        left_out, images = self._finite_images(unit)
        unit = unit.without(left_out)
        try:
            self._format.write(out, name, unit, images, job.pixels_shape)
            digest, size = shard_digest(out, name)
        except OSError as error:  # which may name a temporary file
            if error.strerror is None:
                raise
            raise OSError(error.errno, error.strerror, str(out / IMAGES / name)) from error
        return Record(number, unit.indices[0], len(unit.indices), name, size, digest, tuple(left_out))

    def _finite_images(self, unit: Unit) -> tuple[list[int], list[bytes]]:
        """The indices of images that became non-finite, if these may be left out, and the others, encoded.

        One that is left out gives its lane to the unit's first good image, again: batches stay as they are, and with
        them the bits of the others.
        """
        bad: dict[int, None] = {}
        while True:
            stand_in = next(place for place in range(len(unit.indices)) if place not in bad)
            places = [stand_in if place in bad else place for place in range(len(unit.indices))]
            try:
                images = self._images(unit, places)
            except NonFiniteError as error:
                if not self._config.leave_out or error.image is None:
                    raise
                bad[places[error.image]] = None
                if len(bad) > MOST_LEFT_OUT or len(bad) == len(unit.indices):
                    raise NonFiniteError(f"{len(bad)} images of unit {unit.number} are not finite: {error}") from None
                continue
            left_out = [unit.indices[place] for place in sorted(bad)]
            return left_out, [image for place, image in enumerate(images) if place not in bad]

    def _images(self, unit: Unit, places: list[int]) -> list[bytes]:
        """The unit's images at these places, encoded while the device makes the next batch."""
        job, images = self._config.job, list[bytes]()
        batches = self._engine.generate(
            len(places),
            self._table,
            seed=unit.seed,
            indices=[unit.indices[place] for place in places],
            labels=None if unit.labels is None else [unit.labels[place] for place in places],
            prompt=None if unit.prompts is None else [unit.prompts[place] for place in places],
            negative_prompt=job.negative,
            guidance=job.guidance,
        )
        for pixels in batches:
            if self._engine.batch != self.settings.batch:
                raise BulkError(
                    f"out of memory with {self.settings.batch} lanes at a time, with which the job was begun: other "
                    "batches would give other bits. Free memory, or begin again with a smaller --batch"
                )
            images.extend(self._encoders.map(self._format.encode, pixels.numpy()))
        return images


def _start(config: WorkerConfig, checkpoint: Checkpoint) -> tuple[Engine, RecordedSettings]:
    """The engine and its settings, which are recorded if it is the first of the job, or else must be the recorded."""
    before = read_settings(config.out)
    engine, settings = _engine(config, checkpoint, before)
    recorded = record_settings(settings, config.out)
    if before is None and recorded != settings:  # another worker was first
        engine, settings = _engine(config, checkpoint, recorded)
    refuse_differences(config.out, recorded.by_name(), settings.by_name())
    return engine, settings


def _engine(
    config: WorkerConfig, checkpoint: Checkpoint, recorded: RecordedSettings | None
) -> tuple[Engine, RecordedSettings]:
    """An engine with the options that are given, and for those that are not, as recorded or as it finds them."""
    execution, threads = config.execution, config.threads
    if recorded is not None:
        refuse_other_device(config.out, recorded, execution.device)
        refuse_other_options(config.out, recorded, execution, threads)
        execution, threads = recorded.complete(execution), threads or recorded.threads
    if threads is None:
        threads = max(1, torch.get_num_threads() // config.cpu_workers)
    engine = checkpoint.engine(execution)
    if engine.plan.device.type == "cpu":
        torch.set_num_threads(threads)
    return engine, settings_of(engine, threads, pictures=FORMATS[config.job.format].picture)
