"""What a cache was filled with ahead of time: ``warm.json``, which ``stepfusion warm`` leaves in it.

A cache that ships with a container fits one set of versions and one instruction set. With another it is of no use,
and its user is told in one line, for what it lacks is compiled again.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

import stepfusion
from stepfusion.execution.cache import inductor_folder
from stepfusion.files.atomic import atomic_write
from stepfusion.files.json_files import FileModel, read_typed
from stepfusion.kernels.cache import cache_directory, compiled_anew
from stepfusion.kernels.cpu.compiler import instruction_set

MANIFEST = "warm.json"
_MOST_BYTES = 1 << 20
_told: set[Path] = set()


class WarmCacheError(ValueError):
    """``warm.json`` cannot be read."""


class Environment(FileModel):
    """What has to be the same where a cache is made and where it is used."""

    stepfusion: str
    torch: str
    triton: str | None
    python: str
    system: str
    instructions: str
    gpu: str | None

    def differences(self, here: Environment, *, on_gpu: bool) -> list[str]:
        """How ``here`` differs, a phrase each; the GPU counts where the model runs on one."""
        return [
            f"{name} {mine or 'none'}, and here is {theirs or 'none'}"
            for name in type(self).model_fields
            if (on_gpu or name != "gpu") and (mine := getattr(self, name)) != (theirs := getattr(here, name))
        ]


class WarmRun(FileModel):
    """One model that a cache was filled for.

    Attributes:
        model, weights: what it is called, and the SHA-256 of its file of weights, where that is known.
        device, dtype, backend, network: how it runs.
        batches: the numbers of images. lanes: those of a server; None without one. guided: with guidance, too.
        sampler: the name of its table. compiled: what its process had to compile.
        environment: what it was made with.
    """

    model: str
    weights: str | None
    device: str
    dtype: str
    backend: str
    network: str
    invariant: bool
    batches: list[int]
    lanes: int | None
    guided: bool
    sampler: str
    compiled: list[str]
    environment: Environment

    def __str__(self) -> str:
        served = "" if self.lanes is None else f", {self.lanes} lanes"
        batches = f"batch {', '.join(map(str, self.batches))}" if self.batches else "no batch"
        return f"{self.model}, {batches}{served}, {self.device} {self.dtype}, network {self.network}"

    def same_work(self, other: WarmRun) -> bool:
        """Whether two runs differ in nothing but what had to be compiled."""
        return self.model_copy(update={"compiled": other.compiled}) == other


class WarmCache(FileModel):
    """``warm.json``."""

    format: Literal[1]
    runs: list[WarmRun]


def environment_here(network: str) -> Environment:
    """What a cache that is made now is for; what Inductor compiles is for more than PyTorch's instruction set."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    return Environment(
        stepfusion=stepfusion.__version__,
        torch=torch.__version__,
        triton=_version("triton"),
        python=".".join(map(str, sys.version_info[:2])),
        system=" ".join((platform.system(), platform.machine(), *([libc] if libc else []))),
        instructions=inductor_folder().removeprefix("inductor-") if "compile" in network else instruction_set(),
        gpu=_gpu(),
    )


def read_warm_cache(directory: Path) -> WarmCache | None:
    """What a directory was filled with; None if it has no manifest. WarmCacheError if that cannot be read."""
    path = directory / MANIFEST
    return read_typed(path, WarmCache, WarmCacheError, _MOST_BYTES) if os.path.lexists(path) else None


def add_run(directory: Path, run: WarmRun) -> None:
    """Enter what a directory was filled with; a run for the same work takes the place of the one before."""
    before = read_warm_cache(directory)
    runs = [] if before is None else [one for one in before.runs if not one.same_work(run)]
    written = WarmCache(format=1, runs=[*runs, run])
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(directory / MANIFEST, written.model_dump_json(indent=1).encode() + b"\n")


def why_not_fitting(cache: WarmCache, *, on_gpu: bool) -> str | None:
    """The reason why nothing in a cache was made for this environment; None if something was."""
    differences = [run.environment.differences(environment_here(run.network), on_gpu=on_gpu) for run in cache.runs]
    if not differences:
        return "it was made for no model"
    nearest = min(differences, key=len)
    return f"it was made with {'; '.join(nearest)}" if nearest else None


def tell_if_unfit(device: torch.device) -> None:
    """Say on stderr, once for a cache, that it was filled ahead of time and is of no use here, and why."""
    directory = cache_directory()
    if directory not in _told:
        reason = _unfit(directory, on_gpu=device.type != "cpu")
        if reason is not None:
            _told.add(directory)
            line = f"stepfusion: the warm cache {directory} does not fit: {reason}; what is missing is compiled anew"
            print(line, file=sys.stderr, flush=True)


def tell_compiled(what: Sequence[str]) -> None:
    """Say on stderr what was compiled although the cache was filled ahead of time, and for what that was."""
    try:
        cache = read_warm_cache(cache_directory())
    except WarmCacheError:
        return  # said before
    if cache is not None and cache.runs and what:
        runs = "; ".join(map(str, cache.runs))
        line = f"stepfusion: compiled anew: {', '.join(what)}; {cache_directory()} has {runs}"
        print(line, file=sys.stderr, flush=True)


def cache_fact(device: torch.device) -> tuple[str, str] | None:
    """How warm the cache is, in a word and a sentence; None if it was not filled ahead of time."""
    directory = cache_directory()
    reason = _unfit(directory, on_gpu=device.type != "cpu")
    if reason is None and not (directory / MANIFEST).exists():
        return None
    made = compiled_anew()
    anew = f"compiled anew: {', '.join(made)}" if made else "nothing was compiled anew"
    if reason is not None:
        return "unfit", f"{directory}: {reason}; {anew}"
    return "partly warm" if made else "warm", f"{directory}: {anew}"


def _unfit(directory: Path, *, on_gpu: bool) -> str | None:
    try:
        cache = read_warm_cache(directory)
    except WarmCacheError as error:
        return str(error)
    return None if cache is None else why_not_fitting(cache, on_gpu=on_gpu)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}"
