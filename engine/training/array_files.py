"""Arrays of images and labels in files: MNIST's idx format and NumPy's .npz, each checked strictly.

The idx format is that of MNIST (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist) and Fashion-MNIST: a
big-endian int32 magic (0x0801 for labels, 0x0803 for images), one int32 for each dimension, then uint8 values.
Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepfusion.files.regular import open_regular

MAX_DATASET_BYTES = 8 * 2**30

_IDX_UINT8_IMAGES = 0x0803
_IDX_UINT8_LABELS = 0x0801


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
        with open_regular(path, follow=True) as stream:
            if path.suffix != ".gz":
                return _parse_idx(path, stream)
            with gzip.open(stream) as unpacked:
                return _parse_idx(path, unpacked)
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
    expected = math.prod(shape)
    if min(shape) < 1 or expected > MAX_DATASET_BYTES:
        raise ValueError(
            f"{path} declares the shape {list(shape)}; accepted are positive sizes, {MAX_DATASET_BYTES} bytes at most"
        )
    payload = stream.read(expected + 1)
    if len(payload) != expected:
        given = "more" if len(payload) > expected else str(len(payload))
        raise ValueError(f"{path} declares the shape {list(shape)}, {expected} bytes, but holds {given}")
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8).reshape(shape)


def read_npz(path: Path, most_labels: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Read ``arr_0``, images, and if it is there ``arr_1``, their labels.

    Args:
        path: the file.
        most_labels: labels must be smaller; by default than the number of images.

    Returns:
        uint8 [N, C, H, W] with C of 1 or 3, and int64 [N] or None.

    Raises:
        ValueError: the file is no sound .npz, or the arrays in it are others.
    """
    try:
        images, labels = _read_npz(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (EOFError, zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not a sound .npz file: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}; accepted is uint8 [N, H, W, C] with C of 1 or 3"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return pixels, None if labels is None else _check_npz_labels(path, labels, len(images), most_labels)


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read ``arr_0`` and, if it is there, ``arr_1``, of what must be a zip: ``np.load`` alone reads more."""
    with open_regular(path, follow=True) as stream, zipfile.ZipFile(stream) as members:
        size = sum(member.file_size for member in members.infolist())
    if size > MAX_DATASET_BYTES:
        raise ValueError(f"it holds {size} bytes; accepted are {MAX_DATASET_BYTES} at most")
    with open_regular(path, follow=True) as stream, np.load(stream, allow_pickle=False) as archive:
        if "arr_0" not in archive.files:
            raise ValueError(f"it has no arr_0; it holds {sorted(archive.files)}")
        found = [archive[name] for name in ("arr_0", "arr_1") if name in archive.files]
    if not all(isinstance(array, np.ndarray) for array in found):  # NumPy hands out what is no array as bytes
        raise ValueError("it holds something else than arrays")
    return found[0], found[1] if len(found) > 1 else None


def _check_npz_labels(path: Path, labels: NDArray[Any], count: int, most: int | None) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}; accepted are integers [{count}]")
    low, high, most = int(labels.min()), int(labels.max()), count if most is None else most
    if low < 0 or high >= most:
        raise ValueError(f"{path}: arr_1 has labels from {low} to {high}; accepted are 0 to {most - 1}")
    return torch.from_numpy(labels.astype(np.int64))
