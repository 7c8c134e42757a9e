"""What decides an image's bits beside the job, as engine.json records it: device, dtype, paths, batch, versions."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import stepfusion
from stepfusion.bulk.job import ENGINE, to_json
from stepfusion.engine import Engine
from stepfusion.errors import BulkError
from stepfusion.files.atomic import publish_once, read_json

_MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class RecordedSettings:
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

    def by_name(self) -> dict[str, Any]:
        """Every setting by the name that messages give it; each version is one."""
        entries = asdict(replace(self, versions={}))
        del entries["versions"]
        return entries | {f"the version of {name}": value for name, value in self.versions.items()}


def settings_of(engine: Engine, threads: int, *, pictures: bool) -> RecordedSettings:
    """The settings of an engine; ``threads`` are those of a CPU, and ``pictures`` are encoded by Pillow."""
    plan = engine.plan
    return RecordedSettings(
        device=_kind(plan.device),
        dtype=str(plan.dtype).removeprefix("torch."),
        backend=plan.backend.value,
        network=plan.network.value,
        batch=engine.batch,
        invariant=engine.invariant,
        threads=threads if plan.device.type == "cpu" else None,
        versions=_versions(plan.backend.value, plan.network.value, pictures),
    )


def read_settings(out: Path) -> RecordedSettings | None:
    """The settings that the job was begun with; None if no worker has started yet."""
    if not (out / ENGINE).exists():
        return None
    value = read_json(out / ENGINE, BulkError, _MAX_JSON_BYTES)
    try:
        return RecordedSettings(**value)
    except TypeError:
        raise BulkError(f"{out / ENGINE} is not what stepfusion writes: {', '.join(sorted(value))}") from None


def record_settings(settings: RecordedSettings, out: Path) -> RecordedSettings:
    """Write engine.json, unless another worker was first; returns what it says then."""
    publish_once(out / ENGINE, to_json(asdict(settings)))
    recorded = read_settings(out)
    assert recorded is not None
    return recorded


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
