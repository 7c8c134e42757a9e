"""What decides an image's bits beside the job, as engine.json records it: device, dtype, paths, batch, versions."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import stepfusion
from stepfusion import _checks
from stepfusion.bulk.job import ENGINE, refuse_differences
from stepfusion.bulk.stored import read_stored, to_json
from stepfusion.engine import Engine
from stepfusion.execution.plan import choose_device, make_plan
from stepfusion.files.atomic import publish_once
from stepfusion.kernels.backend import backend_from_environment
from stepfusion.options import ExecutionOptions

_MAX_JSON_BYTES = 1 << 20
_MAX_BATCH, _MAX_THREADS = 1 << 20, 1 << 20


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

    def __post_init__(self) -> None:
        _checks.integer("batch", self.batch, 1, _MAX_BATCH)
        _checks.boolean("invariant", self.invariant)
        if self.threads is not None:
            _checks.integer("threads", self.threads, 1, _MAX_THREADS)

    def complete(self, execution: ExecutionOptions) -> ExecutionOptions:
        """The options with what they leave open as it is recorded; :func:`refuse_other_options` checks the rest."""
        found = replace(
            execution,
            dtype=self.dtype if execution.dtype == "auto" else execution.dtype,
            network=self.network if execution.network == "auto" else execution.network,
            batch=self.batch,
            invariant=self.invariant,
        )
        # what is asked for by its name must run every step, and a threshold's runs as the reference if it was not
        chosen = make_plan(found.device, found.dtype, found.backend, found.network).backend.value
        return found if chosen == self.backend else replace(found, backend=self.backend)

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
        dtype=plan.dtype_choice.value,
        backend=plan.backend.value,
        network=plan.network.value,
        batch=engine.batch,
        invariant=engine.invariant,
        threads=threads if plan.device.type == "cpu" else None,
        versions=_versions(engine, pictures),
    )


def read_settings(out: Path) -> RecordedSettings | None:
    """The settings that the job was begun with; None if no worker has started yet. BulkError if they are damaged."""
    return read_stored(out / ENGINE, RecordedSettings, _MAX_JSON_BYTES) if os.path.lexists(out / ENGINE) else None


def refuse_other_options(
    out: Path, recorded: RecordedSettings, execution: ExecutionOptions, threads: int | None
) -> None:
    """BulkError if an option that is given is not what the job was begun with."""
    backend = backend_from_environment() if execution.backend == "auto" else execution.backend
    given = {
        "dtype": str(execution.dtype).removeprefix("torch."),
        "backend": backend or "auto",
        "network": execution.network,
        "batch": execution.batch,
        "invariant": execution.invariant or None,
        "threads": None if recorded.threads is None else threads,
    }
    asked = {name: value for name, value in given.items() if value not in (None, "auto")}
    refuse_differences(out, {name: getattr(recorded, name) for name in asked}, asked)


def refuse_other_device(out: Path, recorded: RecordedSettings, device: str | torch.device) -> None:
    """BulkError if a device is not of the kind that the job was begun with."""
    refuse_differences(out, {"device": recorded.device}, {"device": _kind(choose_device(device)[0])})


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


def _versions(engine: Engine, pictures: bool) -> dict[str, str]:
    backend, network = engine.plan.backend.value, engine.plan.network.value
    packages = ["torch"]
    packages += ["triton"] if backend == "triton" or "compile" in network else []
    packages += ["openvino"] if network == "openvino" else []
    packages += ["pillow"] if pictures else []
    packages += ["transformers", "tokenizers"] if engine.runners.takes_prompts else []
    packages += ["diffusers"] if engine.image_shape != engine.shape else []
    found = {"stepfusion": stepfusion.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
