"""What is installed on this machine, and whether an artefact that was made elsewhere runs here."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import import_module, metadata
from importlib.util import find_spec

import torch

from stepfusion.errors import ExportError
from stepfusion.export.manifest import ANY_DEVICE, Manifest

#: Entries of ``versions`` that must be the same where an artefact runs; the others say where it came from.
_BINDING = {
    "tensorrt": ("tensorrt", "platform", "compute_capability"),
    "tensorrt-rtx": ("tensorrt-rtx", "platform", "compute_capability"),
    "torch-tensorrt": ("torch", "torch-tensorrt", "platform", "compute_capability"),
    "aoti": ("torch", "platform", "compute_capability"),
}


def require(packages: Iterable[str], extra: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        ExportError: one is not installed; the sentence names the extra that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ExportError(f"the package {package} is not installed: pip install 'stepfusion[{extra}]'")


def here(name: str, device: torch.device | None = None) -> str:
    """The version of a package here; for "platform" the system and processor, for "compute_capability" the GPU's.

    It is "not installed" or "none" if there is none.
    """
    if name == "platform":
        return f"{platform.system().lower()}-{platform.machine().lower()}"
    if name == "compute_capability":
        if device is None or device.type != "cuda" or not torch.cuda.is_available():
            return "none"
        return "{}.{}".format(*torch.cuda.get_device_capability(device))
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass  # installed under another name, as tensorrt-cu13 is
    try:
        return str(import_module(name.replace("-", "_")).__version__)
    except (ImportError, OSError):
        return "not installed"


def versions(*packages: str) -> dict[str, str]:
    """The versions of stepfusion, torch and these packages, and the platform."""
    return {name: here(name) for name in ("stepfusion", "torch", *packages, "platform")}


def check_runs_here(manifest: Manifest, *, device: str | torch.device, dtype: str | torch.dtype) -> None:
    """Compare what an artefact needs with what is here.

    Raises:
        ExportError: it is for another kind of device, dtype, GPU, platform or version; the sentence names both.
    """
    where = torch.device(device)
    if manifest.device not in (where.type, ANY_DEVICE):
        raise ExportError(f"the {manifest.format} bundle was made for {manifest.device}, and device is {where}")
    wanted = str(dtype).removeprefix("torch.")
    if manifest.dtype != wanted:
        raise ExportError(f"the {manifest.format} bundle has a {manifest.dtype} network, and dtype is {wanted}")
    for name in _BINDING.get(manifest.format, ()):
        if name in manifest.versions:
            _check_version(manifest, name, here(name, where))


def _check_version(manifest: Manifest, name: str, found: str) -> None:
    """Refuse an artefact whose ``versions[name]`` does not admit what is here; local builds (+cpu) count as equal."""
    made = manifest.versions[name]
    accepted = made.split() if name == "compute_capability" else [made.partition("+")[0]]
    if found.partition("+")[0] not in accepted:
        what = name.replace("_", " ")
        raise ExportError(f"the {manifest.format} bundle was made for {what} {made}, and {what} here is {found}")
