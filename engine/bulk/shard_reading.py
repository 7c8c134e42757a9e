"""Reading shards back: each image in turn, if the shard holds exactly what the job says.

A shard may have been damaged, or made by somebody else to do harm. So nothing in it is believed: what stands beside
the images must be, byte for byte, what the job would have written, and no size that it states is allocated before it
is compared with the one that the job states.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from stepfusion.bulk.job import IMAGES, Job, Unit
from stepfusion.bulk.shards import (
    PixelsShape,
    array_header,
    folder_entries,
    names_in_folder,
    numbers_of,
    png_name,
    tar_entries,
)
from stepfusion.errors import BulkError, first_line
from stepfusion.files.images import Pixels
from stepfusion.files.regular import open_below

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_START = ">8sI4sII"  # signature, length and name of the first chunk, which begins with width and height
_OVERHEAD = 8192  # bytes beside an image's values: PNG chunks, tar headers, entries


def read_shard(job: Job, out: Path, name: str, unit: Unit) -> Iterator[Pixels]:
    """The images uint8 [H, W, C] of a unit, from its shard.

    Raises:
        BulkError: the shard is damaged, or holds something else than the unit; the sentence goes on after its name.
    """
    try:
        yield from _READERS[job.format](out, name, unit, job.pixels_shape)
    except BulkError:
        raise
    except Exception as error:  # of zipfile, tarfile, zlib and Pillow, each of which has its own kinds for damage
        raise BulkError(f"cannot be read: {first_line(error)}") from None


def most_bytes(job: Job, images: int) -> int:
    """A size that no shard of so many images has."""
    return images * _most_bytes_of_image(job.pixels_shape) + _OVERHEAD


def _most_bytes_of_image(shape: PixelsShape) -> int:
    """More than the PNG of any image of this shape takes: deflate adds little to what it cannot compress."""
    return 2 * prod(shape) + _OVERHEAD


def _read_tar(out: Path, name: str, unit: Unit, shape: PixelsShape) -> Iterator[Pixels]:
    most = _most_bytes_of_image(shape)
    with open_below(out, f"{IMAGES}/{name}") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for position, index in enumerate(unit.indices):
            png = _member(archive, png_name(index), most)
            for entry, data in tar_entries(unit, position).items():
                if _member(archive, entry, len(data)) != data:
                    raise _other("labels" if entry.endswith(".cls") else "indices")
            yield _decode(png, shape)
        if archive.next() is not None:
            raise _other("indices")


def _member(archive: tarfile.TarFile, name: str, most: int) -> bytes:
    """The next member of an archive, which must be a plain file of this name with at most ``most`` bytes."""
    member = archive.next()
    if member is None or member.name != name:
        raise _other("labels" if name.endswith(".cls") else "indices")
    if member.type != tarfile.REGTYPE or member.issparse() or member.size > most:
        raise BulkError(f"cannot be read: {name} is no plain file of at most {most} bytes")
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _read_folder(out: Path, name: str, unit: Unit, shape: PixelsShape) -> Iterator[Pixels]:
    pictures, others = list(map(png_name, unit.indices)), folder_entries(unit)
    if names_in_folder(out, name) != sorted([*pictures, *others]):
        raise _other("indices")
    for entry, data in others.items():
        if _file(out, f"{name}/{entry}", len(data)) != data:
            raise _other("labels")
    for picture in pictures:
        yield _decode(_file(out, f"{name}/{picture}", _most_bytes_of_image(shape)), shape)


def _file(out: Path, name: str, most: int) -> bytes:
    """A file of a shard that is a folder, of at most ``most`` bytes."""
    with open_below(out, f"{IMAGES}/{name}") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise BulkError(f"cannot be read: {Path(name).name} is no plain file of at most {most} bytes")
    return data


def _read_arrays(out: Path, name: str, unit: Unit, shape: PixelsShape) -> Iterator[Pixels]:
    numbers = numbers_of(unit)
    count = len(unit.indices)
    with open_below(out, f"{IMAGES}/{name}") as file, zipfile.ZipFile(file) as archive:
        if archive.namelist() != [f"{key}.npy" for key in ("arr_0", *numbers)]:
            raise _other("labels" if unit.labels is not None else "indices")
        for key, data in numbers.items():
            with _array(archive, key, np.dtype(np.int64), (count,)) as array:
                if array.read() != data:
                    raise _other("labels" if key == "arr_1" else "indices")
        with _array(archive, "arr_0", np.dtype(np.uint8), (count, *shape)) as array:
            for _ in range(count):
                yield np.frombuffer(array.read(prod(shape)), dtype=np.uint8).reshape(shape)
            if array.read(1):
                raise _other("shape")


def _array(archive: zipfile.ZipFile, key: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> IO[bytes]:
    """The bytes of an array that is stored as it is, and has this dtype and shape."""
    entry = archive.getinfo(f"{key}.npy")
    header = array_header(dtype, shape)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != len(header) + dtype.itemsize * prod(shape):
        raise _other("shape")
    file = archive.open(entry)
    if file.read(len(header)) != header:
        raise _other("shape")
    return file


def _decode(png: bytes, shape: PixelsShape) -> Pixels:
    """The pixels of a PNG, uint8 [H, W, C], which must have this shape."""
    height, width, channels = shape
    stated = struct.unpack(_PNG_START, png[: struct.calcsize(_PNG_START)])
    if stated[0] != _PNG_SIGNATURE or stated[2:] != (b"IHDR", width, height):
        raise _other("shape")
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        if picture.size != (width, height) or picture.mode != _MODES.get(channels):
            raise _other("shape")
        return np.array(picture).reshape(shape)


def _other(what: str) -> BulkError:
    return BulkError(f"has other {what} than the job")


_READERS: dict[str, Callable[[Path, str, Unit, PixelsShape], Iterator[Pixels]]] = {
    "webdataset": _read_tar,
    "png": _read_folder,
    "npz": _read_arrays,
}
