"""Reading labelled images for training: idx files, a folder of class folders, or an .npz, each checked strictly.

The idx format is that of MNIST (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist) and Fashion-MNIST: a
big-endian int32 magic (0x0801 for labels, 0x0803 for images), one int32 for each dimension, then uint8 values.
Nothing is unpickled.
"""

import gzip
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from stepfusion import _checks

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_DATASET_BYTES = 8 * 2**30

_IDX_PREFIXES = {"train": "train", "test": "t10k"}
_IDX_UINT8_IMAGES = 0x0803
_IDX_UINT8_LABELS = 0x0801


@dataclass(frozen=True)
class ImageDataset:
    """Images and, where the source has them, labels.

    Attributes:
        images: uint8 [N, C, H, W], N >= 1, C = 1 or 3.
        labels: int64 [N] in ``range(num_classes)``, or None.
        class_names: one name for each class, or None where the source names none.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes: that of the names, else the largest label plus one; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names is not None else int(self.labels.max()) + 1


def load_dataset(path: str | Path, split: str = "train") -> ImageDataset:
    """Load images from a directory of idx files, a folder of class folders of PNG or JPEG images, or an .npz file.

    - idx: ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, plain or ``.gz`` (the test split: ``t10k-``).
    - folders: each sub-folder is a class, in the order of the sorted names; all images must be of one size and mode.
    - npz: ``arr_0`` uint8 [N, H, W, C] (as in guided-diffusion's sample files) and optionally ``arr_1``, labels.

    Args:
        path: the directory or file.
        split: "train" or "test"; only idx directories have two splits.

    Raises:
        ValueError: `path` is none of these, or a file in it is damaged; the sentence names the file.
    """
    path = Path(path)
    if split not in _IDX_PREFIXES:
        raise ValueError(f"split is {split!r}; accepted are 'train' and 'test'")
    if path.is_file() and path.suffix == ".npz":
        return _load_npz(path)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a directory nor an .npz file")
    images = _find_idx(path, f"{_IDX_PREFIXES[split]}-images-idx3-ubyte")
    if images is not None:
        labels = _find_idx(path, f"{_IDX_PREFIXES[split]}-labels-idx1-ubyte")
        return _load_idx(images, labels)
    if any(child.is_dir() for child in path.iterdir()):
        return _load_folders(path)
    raise ValueError(
        f"{path} holds neither {_IDX_PREFIXES[split]}-images-idx3-ubyte(.gz) nor class folders of images"
    )


def resize(dataset: ImageDataset, size: int) -> ImageDataset:
    """Shrink the images to `size` x `size`: every new pixel is the mean of the area it covers, rounded.

    Raises:
        TypeError, ValueError: `size` is no integer from 1 to the images' height and width.
    """
    height, width = dataset.images.shape[2:]
    size = _checks.integer("size", size, 1, min(height, width))
    rows, columns = _area_weights(height, size), _area_weights(width, size)
    parts = [(rows @ part.to(torch.float32) @ columns.T).round_() for part in torch.split(dataset.images, 4096)]
    return ImageDataset(torch.cat([part.to(torch.uint8) for part in parts]), dataset.labels, dataset.class_names)


def merge_classes(dataset: ImageDataset, groups: Mapping[str, Sequence[int]]) -> ImageDataset:
    """Make one class of each group of labels, in their order and named after it; images of no group are left out.

    Raises:
        ValueError: the data set has no labels, or a group is empty or has a label that is unknown or another's.
    """
    if dataset.labels is None:
        raise ValueError("classes can only be merged where the data set has labels, and it has none")
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
    return ImageDataset(dataset.images[kept], labels[kept], tuple(groups))


def _area_weights(old: int, new: int) -> Tensor:
    """Weights [new, old]: the share of each old pixel in the mean that a new one is."""
    edges = torch.arange(new + 1, dtype=torch.float64) * (old / new)
    pixels = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp(min=0) * (new / old)).to(torch.float32)


def read_idx(path: str | Path) -> Tensor:
    """Read one idx file of uint8 labels or images, gzip-compressed if its name ends in ``.gz``.

    Returns:
        uint8 [N] for labels, uint8 [N, H, W] for images.

    Raises:
        ValueError: not an idx file of uint8 labels or images, damaged, truncated, or of another size than its header
            says.
    """
    path = Path(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as unpacked:
                return _parse_idx(path, unpacked)
        with path.open("rb") as stream:
            return _parse_idx(path, stream)
    except EOFError:
        raise ValueError(f"{path} is truncated: the gzip stream ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a sound gzip file: {error}") from None


def _parse_idx(path: Path, stream: gzip.GzipFile | IO[bytes]) -> Tensor:
    head = stream.read(4)
    magic = struct.unpack(">i", head)[0] if len(head) == 4 else -1
    if magic not in (_IDX_UINT8_LABELS, _IDX_UINT8_IMAGES):
        raise ValueError(
            f"{path} begins with {head.hex() or 'nothing'}; an idx file begins with 00000801 (labels) or 00000803"
        )
    dimensions = magic & 0xFF
    sizes = stream.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ValueError(f"{path} is truncated: its header ends too early")
    shape = struct.unpack(f">{dimensions}i", sizes)
    if min(shape) < 1 or _product(shape) > MAX_DATASET_BYTES:
        raise ValueError(
            f"{path} declares the shape {list(shape)}; accepted are positive sizes, {MAX_DATASET_BYTES} bytes at most"
        )
    expected = _product(shape)
    payload = stream.read(expected + 1)
    if len(payload) != expected:
        given = "more" if len(payload) > expected else str(len(payload))
        raise ValueError(f"{path} declares the shape {list(shape)}, {expected} bytes, but holds {given}")
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8).reshape(shape)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


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


def _load_npz(path: Path) -> ImageDataset:
    try:
        images, labels = _read_npz(path)
    except (EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is not a sound .npz file: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}; accepted is uint8 [N, H, W, C] with C of 1 or 3"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ImageDataset(pixels, None if labels is None else _check_npz_labels(path, labels, len(images)))


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read ``arr_0`` and, if it is there, ``arr_1``, of what must be a zip: ``np.load`` alone reads more."""
    with path.open("rb") as stream, zipfile.ZipFile(stream) as members:
        size = sum(member.file_size for member in members.infolist())
    if size > MAX_DATASET_BYTES:
        raise ValueError(f"it holds {size} bytes; accepted are {MAX_DATASET_BYTES} at most")
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        if "arr_0" not in archive.files:
            raise ValueError(f"it has no arr_0; it holds {sorted(archive.files)}")
        return archive["arr_0"], archive["arr_1"] if "arr_1" in archive.files else None


def _check_npz_labels(path: Path, labels: np.ndarray, count: int) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}; accepted are integers [{count}]")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        raise ValueError(f"{path}: arr_1 has labels from {low} to {high}; accepted are 0 to {count - 1}")
    return torch.from_numpy(labels.astype(np.int64))


def _load_folders(path: Path) -> ImageDataset:
    names = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = sorted(file for file in (path / name).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"{path / name} holds no PNG or JPEG image")
        for file in files:
            image = read_image(file)
            if images and image.shape != images[0].shape:
                raise ValueError(
                    f"{file} is {list(image.shape)} (C, H, W), but the images before it are {list(images[0].shape)}"
                )
            images.append(image)
            labels.append(label)
    return ImageDataset(torch.stack(images), torch.tensor(labels, dtype=torch.int64), tuple(names))


def read_image(file: Path) -> Tensor:
    """Read a PNG or JPEG: uint8 [1, H, W] if it is grey, else [3, H, W]."""
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            grey = image.mode in ("L", "1")
            pixels = np.array(image.convert("L" if grey else "RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a sound PNG or JPEG image: {error}") from None
    return torch.from_numpy(pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1)))
