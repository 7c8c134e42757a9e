"""Labelled images for training: where they come from, and what is made of them before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stepfusion import _checks
from stepfusion.files.picture_reader import FORMATS, read_any_picture
from stepfusion.kernels.launch import plain_torch
from stepfusion.training.array_files import read_idx, read_npz
from stepfusion.training.folders import find_pictures
from stepfusion.training.shards import find_shards, read_shards
from stepfusion.training.stack import PictureStack

_IDX_PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class ImageDataset:
    """Images and, if the source has them, labels.

    Attributes:
        images: uint8 [N, C, H, W], N >= 1, C = 1 or 3.
        labels: int64 [N] in ``range(num_classes)``, or None.
        class_names: one name for each class, or None if the source names none.
        left_out: files of the source that are no pictures, and of no use here.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    left_out: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes: that of the names, else the largest label plus one; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names is not None else int(self.labels.max()) + 1


@plain_torch(gradients=True)
def load_dataset(path: str | Path, split: str = "train") -> ImageDataset:
    """Load images from idx files, a folder of pictures, class folders of pictures, an .npz file, or shards.

    - idx: ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, plain or ``.gz`` (the test split: ``t10k-``).
    - class folders: each sub-folder is a class, in the order of the sorted names, with the pictures in and below it.
    - a folder of pictures: without classes, or with a ``metadata.csv`` of ``file_name`` and ``label``.
    - npz: ``arr_0`` uint8 [N, H, W, C] (as in guided-diffusion's sample files) and optionally ``arr_1``, labels.
    - shards: what ``stepfusion generate`` wrote, a part of it, or a WebDataset .tar of pictures and ``.cls`` labels.

    Pictures are PNG, JPEG, WebP, BMP or TIFF, as :mod:`stepfusion.files.picture_reader` reads them, and of one size;
    grey ones among coloured ones become coloured. What operating systems leave beside files is passed over.

    Args:
        path: the directory or file.
        split: "train" or "test"; only idx directories have two splits.

    Raises:
        ValueError: `path` is none of these, or a file in it is damaged; the sentence names the file.
    """
    path = Path(path)
    if split not in _IDX_PREFIXES:
        raise ValueError(f"split is {split!r}; accepted are 'train' and 'test'")
    shards = find_shards(path)
    if shards is not None:
        images, labels = read_shards(shards)
        return ImageDataset(images, None if labels is None else torch.tensor(labels))
    if path.is_file() and path.suffix == ".npz":
        return ImageDataset(*read_npz(path))
    if not path.is_dir():
        raise ValueError(f"{path} is neither a directory nor an .npz file")
    name = f"{_IDX_PREFIXES[split]}-images-idx3-ubyte"
    idx = _find_idx(path, name)
    if idx is not None:
        return _load_idx(idx, _find_idx(path, f"{_IDX_PREFIXES[split]}-labels-idx1-ubyte"))
    return _load_pictures(path, name)


@plain_torch(gradients=True)
def resize(dataset: ImageDataset, size: int) -> ImageDataset:
    """Shrink the images to `size` x `size`: every new pixel is the mean of the area it covers, rounded.

    Raises:
        TypeError, ValueError: `size` is no integer from 1 to the images' height and width.
    """
    height, width = dataset.images.shape[2:]
    size = _checks.integer("size", size, 1, min(height, width))
    rows, columns = _area_weights(height, size), _area_weights(width, size)
    parts = [(rows @ part.to(torch.float32) @ columns.T).round_() for part in torch.split(dataset.images, 4096)]
    return replace(dataset, images=torch.cat([part.to(torch.uint8) for part in parts]))


@plain_torch(gradients=True)
def merge_classes(dataset: ImageDataset, groups: Mapping[str, Sequence[int]]) -> ImageDataset:
    """Make one class of each group of labels, in their order and named after it; images of no group are left out.

    Raises:
        ValueError: the data set has no labels, or a group is empty or has a label that is unknown or another's.
    """
    if dataset.labels is None:
        raise ValueError("classes can only be merged if the data set has labels, and it has none")
    new = torch.full((dataset.num_classes,), -1, dtype=torch.int64)
    for label, (name, members) in enumerate(groups.items()):
        for member in members:
            if not 0 <= member < dataset.num_classes or new[member] != -1:
                accepted = f"labels from 0 to {dataset.num_classes - 1}, each in one group"
                raise ValueError(f"group {name!r} has the label {member}; accepted are {accepted}")
            new[member] = label
        if not len(members):
            raise ValueError(f"group {name!r} has no labels")
    labels = new[dataset.labels]
    kept = labels >= 0
    return replace(dataset, images=dataset.images[kept], labels=labels[kept], class_names=tuple(groups))


def _area_weights(old: int, new: int) -> Tensor:
    """Weights [new, old]: the share of each old pixel in the mean that a new one is."""
    edges = torch.arange(new + 1, dtype=torch.float64) * (old / new)
    pixels = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp(min=0) * (new / old)).to(torch.float32)


def _find_idx(directory: Path, name: str) -> Path | None:
    for candidate in (directory / f"{name}.gz", directory / name):
        if candidate.is_file():
            return candidate
    return None


def _load_idx(images_path: Path, labels_path: Path | None) -> ImageDataset:
    images = read_idx(images_path)
    if images.ndim != 3:
        raise ValueError(f"{images_path} holds labels; images are needed")
    if labels_path is None:
        return ImageDataset(images[:, None])
    labels = read_idx(labels_path)
    if labels.ndim != 1:
        raise ValueError(f"{labels_path} holds images; labels are needed")
    if len(labels) != len(images):
        raise ValueError(f"{labels_path} holds {len(labels)} labels, but {images_path} holds {len(images)} images")
    return ImageDataset(images[:, None], labels.to(torch.int64))


def _load_pictures(path: Path, idx: str) -> ImageDataset:
    found, stack = find_pictures(path), PictureStack()
    if not found.files:
        raise ValueError(f"{path} holds neither {idx}(.gz) nor pictures ({FORMATS})")
    for file in found.files:
        stack.add(file, read_any_picture(file))
    labels = None if found.labels is None else torch.tensor(found.labels, dtype=torch.int64)
    return ImageDataset(stack.whole(), labels, found.class_names, tuple(found.left_out))
