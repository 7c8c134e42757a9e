"""What a measurement was made on: device, driver, versions, threads, commit, date."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import stepfusion
from stepfusion.bench.options import Options
from stepfusion.bench.rows import Conditions

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "openvino",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "mlcommons-loadgen",
)
_LIMITS = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS"


def conditions(part: str, options: Options) -> Conditions:
    """The conditions under which ``part`` is measured now, as ``options`` ask for it."""
    device = options.device
    versions = {"stepfusion": stepfusion.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    on_gpu = device.type == "cuda"
    return Conditions(
        part=part,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        threads=torch.get_num_threads(),
        versions=versions,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        commit=_commit(Path(__file__).resolve().parents[1]),
        command=options.command,
        sizes=_sizes(options),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def _sizes(options: Options) -> str:
    """The sizes that were asked for; those that were not are the part's own, and stand in its rows."""
    asked = {
        "models": options.models,
        "batches": options.batches,
        "steps": options.steps,
        "rounds": options.rounds,
        "dtype": options.dtype,
    }
    told = ["every size shrunk, to rehearse"] if options.tiny else []
    for name, value in asked.items():
        if value is not None:
            told.append(f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ", ".join(told) or "the part's own"


def _processor() -> str:
    """The processor's name, what PyTorch uses of it, and the limits that were set to its use."""
    capability = torch.backends.cpu.get_cpu_capability()
    half = [name for name in ("amx_bf16", "avx512_bf16") if name in _flags()]
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return ", ".join((_cpu_field("model name") or platform.machine(), capability, *half, *limits))


def _flags() -> set[str]:
    return set(_cpu_field("flags").split())


def _cpu_field(name: str) -> str:
    """The first entry of this name in Linux's description of the processors; nothing elsewhere."""
    description = Path("/proc/cpuinfo")
    if not description.exists():
        return ""
    for line in description.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _commit(root: Path) -> str | None:
    """The commit of a work tree, marked if files differ from it; None for an installed package."""
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if there is no such command, or it fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
