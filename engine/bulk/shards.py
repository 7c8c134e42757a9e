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
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from stepfusion.bulk.directory import METADATA, entries_of, is_in_a_folder
from stepfusion.bulk.job import IMAGES, SUFFIXES, Unit
from stepfusion.files.atomic import atomic_directory, atomic_write_below
from stepfusion.files.images import Pixels, encode_png
from stepfusion.files.regular import folder_below, open_below

_SYNCS_AT_ONCE = 16  # a file system commits them together
_CHUNK = 1 << 20

#: Of one image, (H, W, C).
PixelsShape = tuple[int, int, int]
#: An array as dtype, shape, and its bytes in parts, so that no memory need hold all of it.
Parts = tuple[np.dtype[Any], tuple[int, ...], Iterable[bytes]]


@dataclass(frozen=True)
class Format:
    """One way of writing shards.

    Attributes:
        suffix: of a shard's name.
        picture: whether images are PNGs, which have 1, 3 or 4 channels.
        encode: one image uint8 [H, W, C] to the bytes that ``write`` stores.
        write: (directory of the job, name of the shard, unit, encoded images, shape of an image), whole or not at
            all, and on disk when it returns.
    """

    suffix: str
    picture: bool
    encode: Callable[[Pixels], bytes]
    write: Callable[[Path, str, Unit, Sequence[bytes], PixelsShape], None]


def shard_digest(out: Path, name: str) -> tuple[str, int]:
    """SHA-256 and size in bytes of a shard; of a folder, what ``sha256sum * | sha256sum`` prints in it.

    Raises:
        OSError: the shard cannot be read, or something in it or on the way to it is a link or no regular file.
    """
    if Path(name).suffix:
        return file_digest(out, f"{IMAGES}/{name}")
    listing, size = hashlib.sha256(), 0
    for entry in names_in_folder(out, name):
        digest, part = file_digest(out, f"{IMAGES}/{name}/{entry}")
        listing.update(f"{digest}  {entry}\n".encode())
        size += part
    return listing.hexdigest(), size


def file_digest(out: Path, name: str) -> tuple[str, int]:
    """SHA-256 and size in bytes of a file below ``out``; OSError if it is no regular file."""
    digest, size = hashlib.sha256(), 0
    with open_below(out, name) as file:
        while part := file.read(_CHUNK):
            digest.update(part)
            size += len(part)
    return digest.hexdigest(), size


def shard_size(out: Path, name: str) -> int:
    """Size of a shard in bytes, -1 if there is none."""
    try:
        with folder_below(out, IMAGES) as images:
            found = os.stat(images.at(name), dir_fd=images.descriptor, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            return found.st_size
        with folder_below(out, f"{IMAGES}/{name}") as folder:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries_of(folder))
    except FileNotFoundError:
        return -1


def names_in_folder(out: Path, name: str) -> list[str]:
    """The names of the files in a shard that is a folder, in order."""
    with folder_below(out, f"{IMAGES}/{name}") as folder:
        return sorted(entry.name for entry in entries_of(folder))


def write_npz(file: IO[bytes], arrays: Mapping[str, Parts]) -> None:
    """An uncompressed .npz of arrays by name; the same arrays give the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, (dtype, shape, parts) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                entry.write(array_header(dtype, shape))
                for part in parts:
                    entry.write(part)


def array_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of an array in .npy."""
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def tar_entries(unit: Unit, position: int) -> dict[str, bytes]:
    """What stands in a tar beside the PNG of the image at a position in its unit: the label, and what it is."""
    index = unit.indices[position]
    metadata, entries = {"seed": unit.seed, "index": index}, {}
    if unit.labels is not None:
        metadata["label"] = unit.labels[position]
        entries[f"{index:010d}.cls"] = str(unit.labels[position]).encode()
    return {**entries, f"{index:010d}.json": json.dumps(metadata).encode()}


def folder_entries(unit: Unit) -> dict[str, bytes]:
    """What stands in a folder beside the PNGs: the table of labels, if there are labels."""
    if unit.labels is None:
        return {}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file_name", "label"))
    rows.writerows(zip(map(png_name, unit.indices), unit.labels, strict=True))
    return {METADATA: text.getvalue().encode()}


def png_name(index: int) -> str:
    """The name of an image's PNG."""
    return f"{index:010d}.png"


def numbers_of(unit: Unit) -> dict[str, bytes]:
    """The arrays int64 [k] in an npz beside the images: labels, if there are labels, and indices."""
    numbers = {"arr_1": unit.labels, "indices": unit.indices}
    return {
        name: np.array(values, dtype=np.int64).tobytes() for name, values in numbers.items() if values is not None
    }


def _write_tar(out: Path, name: str, unit: Unit, images: Sequence[bytes], _: PixelsShape) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for position, image in enumerate(images):
            entries = {png_name(unit.indices[position]): image, **tar_entries(unit, position)}
            for entry, data in entries.items():
                member = tarfile.TarInfo(entry)  # no time and no owner: the same images give the same bytes
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    atomic_write_below(out, f"{IMAGES}/{name}", buffer.getvalue())


def _is_of_a_shard(folder: Path, name: str) -> bool:
    """Whether a shard of this kind can hold a file of this name, whatever the folder."""
    return is_in_a_folder(name)


def _write_folder(out: Path, name: str, unit: Unit, images: Sequence[bytes], _: PixelsShape) -> None:
    """``atomic_directory`` syncs the names; the files are synced together, since each alone takes milliseconds."""
    with atomic_directory(out / IMAGES / name, overwrite=True, ours=_is_of_a_shard) as folder:
        files = dict(zip(map(png_name, unit.indices), images, strict=True)) | folder_entries(unit)
        for entry, data in files.items():
            (folder / entry).write_bytes(data)
        with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
            for _done in pool.map(_sync, (folder / entry for entry in files)):
                pass


def _write_arrays(out: Path, name: str, unit: Unit, images: Sequence[bytes], shape: PixelsShape) -> None:
    count = (len(images),)
    arrays: dict[str, Parts] = {"arr_0": (np.dtype(np.uint8), count + shape, images)}
    arrays |= {key: (np.dtype(np.int64), count, [data]) for key, data in numbers_of(unit).items()}
    buffer = io.BytesIO()
    write_npz(buffer, arrays)
    atomic_write_below(out, f"{IMAGES}/{name}", buffer.getvalue())


def _raw(pixels: Pixels) -> bytes:
    return pixels.tobytes()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


FORMATS = {
    "webdataset": Format(SUFFIXES["webdataset"], True, encode_png, _write_tar),
    "png": Format(SUFFIXES["png"], True, encode_png, _write_folder),
    "npz": Format(SUFFIXES["npz"], False, _raw, _write_arrays),
}
