"""Shards: the images of one unit as a WebDataset tar, a folder of PNGs, or an npz; the same images, the same bytes.

::

    images/000003.tar              0000000768.png, .cls (the label), .json (seed, index, label): a WebDataset
    images/000003/                 0000000768.png, ..., metadata.csv (file_name, label)
    images/000003.npz              arr_0 uint8 [k, H, W, C], arr_1 int64 [k] (the labels), indices int64 [k]
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepfusion.bulk.job import Unit
from stepfusion.errors import BulkError
from stepfusion.files.atomic import atomic_directory, atomic_write
from stepfusion.files.images import Pixels, encode_png

_SYNCS_AT_ONCE = 16  # a file system commits them together
_METADATA = "metadata.csv"

#: An array as dtype, shape, and its bytes in parts, so that no memory need hold all of it.
Parts = tuple[np.dtype[Any], tuple[int, ...], Iterable[bytes]]


@dataclass(frozen=True)
class Contents:
    """What is in a shard: indices, labels (None for a model without labels) and pixels uint8 [k, H, W, C]."""

    indices: list[int]
    labels: list[int] | None
    pixels: Pixels


@dataclass(frozen=True)
class Format:
    """One way of writing shards.

    Attributes:
        suffix: of a shard's name.
        picture: whether images are PNGs, which have 1, 3 or 4 channels.
        encode: one image uint8 [H, W, C] to the bytes that ``write`` stores.
        write: (path, unit, encoded images), whole or not at all, and on disk when it returns.
        read: (path) -> Contents; BulkError or ValueError if it is no such shard.
    """

    suffix: str
    picture: bool
    encode: Callable[[Pixels], bytes]
    write: Callable[[Path, Unit, Sequence[bytes], tuple[int, int, int]], None]
    read: Callable[[Path], Contents]


def shard_digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size in bytes of a shard; of a folder, what ``sha256sum * | sha256sum`` prints in it."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
    listing, size = hashlib.sha256(), 0
    for name in sorted(os.listdir(path)):
        digest, part = shard_digest(path / name)
        listing.update(f"{digest}  {name}\n".encode())
        size += part
    return listing.hexdigest(), size


def shard_size(path: Path) -> int:
    """Size of a shard in bytes, -1 if there is none."""
    try:
        return sum(entry.stat().st_size for entry in path.iterdir()) if path.is_dir() else path.stat().st_size
    except FileNotFoundError:
        return -1


def write_npz(file: IO[bytes], arrays: Mapping[str, Parts]) -> None:
    """An uncompressed .npz of arrays by name; the same arrays give the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, (dtype, shape, parts) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for part in parts:
                    entry.write(part)


def _write_tar(path: Path, unit: Unit, images: Sequence[bytes], _: tuple[int, int, int]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)  # no time and no owner: the same images give the same bytes
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for position, (index, image) in enumerate(zip(unit.indices, images, strict=True)):
            metadata = {"seed": unit.seed, "index": index}
            add(f"{index:010d}.png", image)
            if unit.labels is not None:
                metadata["label"] = unit.labels[position]
                add(f"{index:010d}.cls", str(unit.labels[position]).encode())
            add(f"{index:010d}.json", json.dumps(metadata).encode())
    atomic_write(path, buffer.getvalue())


def _read_tar(path: Path) -> Contents:
    indices, labels, pictures = [], list[int](), []
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            key, _, kind = member.name.partition(".")
            file = archive.extractfile(member)
            assert file is not None
            if kind == "png":
                indices.append(int(key))
                pictures.append(_decode(file.read()))
            elif kind == "cls":
                labels.append(int(file.read()))
    return Contents(indices, labels or None, np.stack(pictures))


def _write_folder(path: Path, unit: Unit, images: Sequence[bytes], _: tuple[int, int, int]) -> None:
    """``atomic_directory`` syncs the names; the files are synced together, since each alone takes milliseconds."""
    with atomic_directory(path, overwrite=True) as folder:
        files = {f"{index:010d}.png": image for index, image in zip(unit.indices, images, strict=True)}
        if unit.labels is not None:
            text = io.StringIO()
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(("file_name", "label"))
            rows.writerows(zip(files, unit.labels, strict=True))
            files[_METADATA] = text.getvalue().encode()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
            for _done in pool.map(_sync, (folder / name for name in files)):
                pass


def _read_folder(path: Path) -> Contents:
    names = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".png")
    labels: list[int] | None = None
    if (path / _METADATA).is_file():
        with (path / _METADATA).open(newline="") as file:
            rows = list(csv.DictReader(file))
        if [row["file_name"] for row in rows] != names:
            raise BulkError(f"{path / _METADATA} does not list the pictures beside it")
        labels = [int(row["label"]) for row in rows]
    pictures = [_decode((path / name).read_bytes()) for name in names]
    return Contents([int(name.partition(".")[0]) for name in names], labels, np.stack(pictures))


def _write_arrays(path: Path, unit: Unit, images: Sequence[bytes], shape: tuple[int, int, int]) -> None:
    count = (len(images),)
    arrays: dict[str, Parts] = {"arr_0": (np.dtype(np.uint8), count + shape, images)}
    numbers = {"arr_1": unit.labels, "indices": unit.indices}
    for name, values in numbers.items():
        if values is not None:
            arrays[name] = (np.dtype(np.int64), count, [np.array(values, dtype=np.int64).tobytes()])
    buffer = io.BytesIO()
    write_npz(buffer, arrays)
    atomic_write(path, buffer.getvalue())


def _read_arrays(path: Path) -> Contents:
    with np.load(path, allow_pickle=False) as arrays:
        labels: list[int] | None = arrays["arr_1"].tolist() if "arr_1" in arrays else None
        pixels: NDArray[np.uint8] = arrays["arr_0"]
        return Contents(arrays["indices"].tolist(), labels, pixels)


def _decode(png: bytes) -> Pixels:
    """The pixels of a PNG, uint8 [H, W, C]."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        pixels = np.array(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _raw(pixels: Pixels) -> bytes:
    return pixels.tobytes()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


FORMATS = {
    "webdataset": Format(".tar", True, encode_png, _write_tar, _read_tar),
    "png": Format("", True, encode_png, _write_folder, _read_folder),
    "npz": Format(".npz", False, _raw, _write_arrays, _read_arrays),
}
