"""A worker: an engine that makes units, each into its shard, and the settings that all workers of a job share."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import stepfusion
from stepfusion.bulk.job import (
    ENGINE,
    IMAGES,
    Job,
    Unit,
    model_digest,
    read_labels,
    refuse_differences,
    table_digest,
    to_json,
)
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.shards import FORMATS, shard_digest
from stepfusion.engine import Engine
from stepfusion.errors import BulkError, NonFiniteError
from stepfusion.files.atomic import publish_once, read_json
from stepfusion.samplers.table_request import TableRequest

_MAX_JSON_BYTES = 1 << 20
_ENCODERS = 8

MOST_LEFT_OUT = 16


@dataclass(frozen=True)
class Order:
    """What a worker is told: the job, and how to run it. All of it can be sent to another process or machine.

    Attributes:
        job, out: what is made, and the directory.
        model, table: where the model is, and how its sampler's table is made.
        dtype, backend, network, batch, invariant: as for :class:`stepfusion.Engine`.
        threads: CPU threads of a worker on a CPU. None, as for ``batch``, is what the job was begun with, and when it
            is begun, PyTorch's own number divided by ``cpu_workers``, the CPU workers of this machine.
        leave_out: leave out images that become non-finite, up to :data:`MOST_LEFT_OUT` of a unit; else, an error.
    """

    job: Job
    out: Path
    model: str
    table: TableRequest
    dtype: str = "auto"
    backend: str = "auto"
    network: str = "auto"
    batch: int | None = None
    invariant: bool = False
    threads: int | None = None
    cpu_workers: int = 1
    leave_out: bool = False


@dataclass(frozen=True)
class Settings:
    """What decides an image's bits beside the job; the same for every worker of it, at any time.

    Attributes:
        device: its kind: a GPU's name, or "cpu" with its vector instructions.
        dtype, backend, network: as the engine chose them.
        batch, invariant: lanes at a time; a unit is cut into batches in the same way every time.
        threads: of a worker on a CPU, None elsewhere.
        versions: of the packages that compute or encode.
    """

    device: str
    dtype: str
    backend: str
    network: str
    batch: int
    invariant: bool
    threads: int | None
    versions: dict[str, str]


class Worker:
    """An engine on ``device`` that makes the units of an order.

    Raises:
        BulkError: the model or the table is another one, or the settings are not those that the job was begun with.
        Whatever :class:`stepfusion.Engine` raises.
    """

    def __init__(self, order: Order, device: str) -> None:
        if model_digest(order.model) != order.job.model:
            raise BulkError(f"the model {order.model} is not the one that this job was begun with")
        recorded = read_settings(order.out)
        self._order, self._format = order, FORMATS[order.job.format]
        self._labels = read_labels(order.job, order.out)
        self._engine, self.settings = _start(order, device, recorded)
        publish_once(order.out / ENGINE, to_json(asdict(self.settings)))
        agreed = read_settings(order.out)
        assert agreed is not None
        if agreed.batch != self.settings.batch and order.batch is None:  # another worker was first, and found less
            self._engine, self.settings = _start(order, device, agreed)
        refuse_differences(order.out, _flat(agreed), _flat(self.settings))
        self._table = order.table.of(self._engine)
        if table_digest(self._table) != order.job.table_sha256:
            raise BulkError(
                f"the table of {self._table.name}, {len(self._table)} steps, is not the one that this job was begun "
                f"with: {order.job.table}"
            )
        self._encoders = ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1), "stepfusion-encode")

    def make(self, number: int) -> Record:
        """Make one unit; its shard is whole and on disk when this returns.

        Raises:
            NonFiniteError: naming the image, unless it may be left out; no shard is written.
            BulkError: memory ran out, and a smaller batch would give other bits.
            OSError: the shard cannot be written.
        """
        job = self._order.job
        unit = job.unit_at(number, self._labels)
        left_out, images = self._finite_images(unit)
        unit = unit.without(left_out)
        path = self._order.out / IMAGES / f"{unit.name}{self._format.suffix}"
        try:
            self._format.write(path, unit, images, job.pixels_shape)
            digest, size = shard_digest(path)
        except OSError as error:  # which names a temporary file
            raise OSError(error.errno, error.strerror, str(path)) from error
        return Record(number, unit.indices[0], len(unit.indices), path.name, size, digest, tuple(left_out))

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
                if not self._order.leave_out or error.image is None:
                    raise
                bad[places[error.image]] = None
                if len(bad) > MOST_LEFT_OUT or len(bad) == len(unit.indices):
                    raise NonFiniteError(f"{len(bad)} images of unit {unit.number} are not finite: {error}") from None
                continue
            left_out = [unit.indices[place] for place in sorted(bad)]
            return left_out, [image for place, image in enumerate(images) if place not in bad]

    def _images(self, unit: Unit, places: list[int]) -> list[bytes]:
        """The unit's images at these places, encoded while the device makes the next batch."""
        job, images = self._order.job, list[bytes]()
        batches = self._engine.generate(
            len(places),
            self._table,
            seed=unit.seed,
            indices=[unit.indices[place] for place in places],
            labels=None if unit.labels is None else [unit.labels[place] for place in places],
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


def read_settings(out: Path) -> Settings | None:
    """The settings that the job was begun with; None where no worker has started yet."""
    if not (out / ENGINE).exists():
        return None
    value = read_json(out / ENGINE, BulkError, _MAX_JSON_BYTES)
    try:
        return Settings(**value)
    except TypeError:
        raise BulkError(f"{out / ENGINE} is not what stepfusion writes: {', '.join(sorted(value))}") from None


def _start(order: Order, device: str, recorded: Settings | None) -> tuple[Engine, Settings]:
    """The engine, with the batch and the threads as asked for, as recorded, or as it finds them."""
    batch = order.batch if order.batch is not None or recorded is None else recorded.batch
    threads = order.threads if order.threads is not None or recorded is None else recorded.threads
    if threads is None:
        threads = max(1, torch.get_num_threads() // order.cpu_workers)
    engine = Engine.from_pretrained(
        order.model,
        device=device,
        dtype=order.dtype,
        backend=order.backend,
        network=order.network,
        batch=batch,
        invariant=order.invariant,
    )
    on_cpu = engine.plan.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(threads)
    plan = engine.plan
    settings = Settings(
        device=_kind(plan.device),
        dtype=str(plan.dtype).removeprefix("torch."),
        backend=plan.backend.value,
        network=plan.network.value,
        batch=engine.batch,
        invariant=engine.invariant,
        threads=threads if on_cpu else None,
        versions=_versions(plan.backend.value, plan.network.value, FORMATS[order.job.format].picture),
    )
    return engine, settings


def _kind(device: torch.device) -> str:
    """A kind of device within which the same work gives the same bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _versions(backend: str, network: str, pictures: bool) -> dict[str, str]:
    packages = ["torch"]
    packages += ["triton"] if backend == "triton" or "compile" in network else []
    packages += ["openvino"] if network == "openvino" else []
    packages += ["pillow"] if pictures else []
    found = {"stepfusion": stepfusion.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _flat(settings: Settings) -> dict[str, Any]:
    """The settings with an entry for each version, as a message names them."""
    facts = asdict(replace(settings, versions={}))
    del facts["versions"]
    return facts | {f"the version of {name}": value for name, value in settings.versions.items()}
