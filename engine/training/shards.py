"""What ``stepfusion generate`` wrote, as training data: shards as folders of PNGs, WebDataset tars or npz files.

A tar holds for each picture a file of its key and suffix, and if it has a label a file of that key and ``.cls``.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor

from stepfusion.files.images import Pixels
from stepfusion.files.picture_reader import MAX_BYTES, SUFFIXES, decode_any_picture, read_any_picture
from stepfusion.files.regular import open_regular
from stepfusion.training.array_files import read_npz
from stepfusion.training.folders import find_pictures
from stepfusion.training.stack import PictureStack

_JOB, _IMAGES = "job.json", "images"
_MOST_LABELS = 1 << 16
_MAX_LABEL_BYTES = 32

#: A picture's name, its pixels uint8 [H, W, C], and its label or None.
Labelled = tuple[str, Pixels, int | None]


def find_shards(path: Path) -> list[Path] | None:
    """The shards of the directory of a bulk job, of ``images`` in it, or the one shard that `path` is; else None."""
    path = path.resolve()
    if path.suffix == ".tar" and path.is_file():
        return [path]
    if _is_job(path):
        path = path / _IMAGES
    if path.name == _IMAGES and _is_job(path.parent):
        return sorted(child for child in path.iterdir() if not child.name.startswith("."))
    return [path] if path.parent.name == _IMAGES and _is_job(path.parent.parent) else None


def read_shards(shards: list[Path]) -> tuple[Tensor, list[int] | None]:
    """The pictures of all shards, uint8 [N, C, H, W], and a label for each, if they have labels.

    Raises:
        ValueError: a shard is damaged, or there is nothing in any; labels are missing for some, or out of range.
    """
    stack, labels = PictureStack(), list[int | None]()
    for shard in shards:
        for name, pixels, label in _read(shard):
            stack.add(name, pixels)
            labels.append(label)
    if not labels:
        raise ValueError(f"{shards[0] if shards else 'the directory of the job'} holds no picture")
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        raise ValueError(f"{shards[0].parent} has labels for {len(known)} of its {len(labels)} pictures")
    if known and not 0 <= min(known) <= max(known) < _MOST_LABELS:
        raise ValueError(
            f"{shards[0].parent} has labels from {min(known)} to {max(known)}; accepted are 0 to {_MOST_LABELS - 1}"
        )
    return stack.whole(), known or None


def _is_job(path: Path) -> bool:
    return (path / _JOB).is_file() and (path / _IMAGES).is_dir()


def _read(shard: Path) -> Iterator[Labelled]:
    if shard.is_dir():
        return _read_folder(shard)
    return {".tar": _read_tar, ".npz": _read_arrays}.get(shard.suffix, _read_nothing)(shard)


def _read_folder(shard: Path) -> Iterator[Labelled]:
    found = find_pictures(shard)
    for place, file in enumerate(found.files):
        yield str(file), read_any_picture(file), None if found.labels is None else found.labels[place]


def _read_arrays(shard: Path) -> Iterator[Labelled]:
    images, labels = read_npz(shard, most_labels=_MOST_LABELS)
    for place, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        yield str(shard), np.ascontiguousarray(pixels), None if labels is None else int(labels[place])


def _read_nothing(shard: Path) -> Iterator[Labelled]:
    raise ValueError(f"{shard} is no shard: neither a folder, nor a .tar or .npz file")


def _read_tar(shard: Path) -> Iterator[Labelled]:
    pictures, labels = dict[str, bytes](), dict[str, int]()
    try:
        for key, suffix, data in _members(shard):
            if suffix == ".cls":
                labels[key] = int(data[:_MAX_LABEL_BYTES])
            elif suffix in SUFFIXES:
                pictures[key] = data
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{shard} is not a sound tar of pictures and labels: {error}") from None
    for key, data in pictures.items():
        yield f"{shard}: {key}", decode_any_picture(f"{shard}: {key}", data), labels.get(key)


def _members(shard: Path) -> Iterator[tuple[str, str, bytes]]:
    """Key, suffix and content of every file in a tar; keys are without suffix, and not used as paths."""
    with open_regular(shard, follow=True) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
            if content is None:
                continue
            if member.size > MAX_BYTES:
                raise ValueError(f"{member.name} has {member.size} bytes; accepted are {MAX_BYTES} at most")
            name = PurePosixPath(member.name)
            yield str(name.with_suffix("")), name.suffix.lower(), content.read()
