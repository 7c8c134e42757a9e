"""Frechet and kernel distances between two folders of images, by the libraries whose numbers papers report.

FID is Heusel et al. 2017 (equation 6), KID Binkowski et al. 2018 (section 4), both of Inception features. Neither
library comes with stepfusion, and each downloads the weights of its Inception network when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.bench.optional import need, why_not
from stepfusion.execution.plan import choose_device

_SUFFIXES = (".png", ".jpg", ".jpeg")  # the pictures that both libraries look for
_SUBSET = 1000  # images that one estimate of the kernel distance compares, by default in both libraries


def folder_distance(a: Path, b: Path, library: str = "auto", device: str = "auto") -> dict[str, Any]:
    """Distances between the images of two folders.

    Args:
        a, b: folders of at least two PNG or JPEG images each.
        library: "torch-fidelity", "clean-fid", or "auto", the first of these that is installed. Their numbers are not
            comparable: they shrink images differently (Parmar et al. 2022).
        device: "auto", or a device that PyTorch finds here.

    Returns:
        library, images (of each folder), frechet, kernel, and kernel_std if the library says it.

    Raises:
        ValueError: a folder is none, or holds fewer than two images. ImportError: the library is not installed.
    """
    _checks.choice("library", library, ("auto", *LIBRARIES))
    counts = [_count(name, folder) for name, folder in (("a", a), ("b", b))]
    where, _ = choose_device(device)
    chosen = _installed(library)
    return {"library": chosen, "images": counts, **LIBRARIES[chosen][1](a, b, min(counts), where)}


def _count(name: str, folder: Path) -> int:
    if not folder.is_dir():
        raise ValueError(f"{name} must be a folder of images, got {str(folder)!r}")
    count = sum(file.suffix.lower() in _SUFFIXES for file in folder.iterdir())
    if count < 2:
        raise ValueError(f"{name} must hold at least two PNG or JPEG images, and {folder} holds {count}")
    return count


def _installed(library: str) -> str:
    candidates = list(LIBRARIES) if library == "auto" else [library]
    for name in candidates:
        if why_not(LIBRARIES[name][0]) is None:
            return name
    raise ImportError(f"{' or '.join(candidates)} is needed and not installed: pip install {candidates[0]}")


def _torch_fidelity(a: Path, b: Path, images: int, device: torch.device) -> dict[str, float]:
    metrics = need("torch_fidelity").calculate_metrics(
        input1=str(a),
        input2=str(b),
        cuda=device.type == "cuda",
        fid=True,
        kid=True,
        kid_subset_size=min(_SUBSET, images),
        verbose=False,
    )
    return {
        "frechet": float(metrics["frechet_inception_distance"]),
        "kernel": float(metrics["kernel_inception_distance_mean"]),
        "kernel_std": float(metrics["kernel_inception_distance_std"]),
    }


def _clean_fid(a: Path, b: Path, images: int, device: torch.device) -> dict[str, float]:
    fid = need("cleanfid.fid")
    options = {"mode": "clean", "num_workers": 0, "device": device, "use_dataparallel": False, "verbose": False}
    frechet, kernel = (compute(str(a), str(b), **options) for compute in (fid.compute_fid, fid.compute_kid))
    return {"frechet": float(frechet), "kernel": float(kernel)}


#: Library -> the module it is imported as, and what asks it.
LIBRARIES: dict[str, tuple[str, Callable[[Path, Path, int, torch.device], dict[str, float]]]] = {
    "torch-fidelity": ("torch_fidelity", _torch_fidelity),
    "clean-fid": ("cleanfid", _clean_fid),
}
