"""Files of ``torch.save``: read by PyTorch's restricted unpickler, which runs no code of theirs.

That unpickler believes what a file says of its tensors, and gives views of the mapped file. So what is declared is
compared with what is there before a number is taken from it: each storage with the record that holds it, and the
tensors with their storages. A record that was cut short would be filled up with its neighbours' bytes, and a view
that repeats a few numbers would ask for more memory than the file has.
"""

import mmap
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from stepfusion.checkpoints.weights import DTYPES, Stored, first_line
from stepfusion.errors import CheckpointError

# What torch.save wrote before PyTorch 1.6 begins with: a pickle, of any protocol, of its magic number.
_LEGACY = re.compile(rb"\x80.(\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
_LOCAL_HEADER = 30  # bytes of a zip record's header before its name


Recognise = Callable[[Mapping[Any, Any]], str | None]


def stored_in_archive(path: Path, recognise: Recognise = lambda _: None) -> dict[str, Stored]:
    """Open a state dict that ``torch.save`` wrote, in the zip form or in the one before PyTorch 1.6.

    Args:
        path: the file.
        recognise: says what the file is, if it is something else than what is wanted.

    Raises:
        CheckpointError: the file is neither, is damaged, holds pickled code or anything else than tensors, or its
            tensors are not backed by as many bytes as they declare.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        records = _records(path)
        state = _recognised(_load(path, mmap=True), recognise, path)
        _check_records(path, records, _storages(state, path))
        return _described(state, path)
    if _LEGACY.match(head):
        state = _recognised(_load(path), recognise, path)
        _storages(state, path)
        return _described(state, path)
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is in the tar form of PyTorch before 0.1.10, which is never opened")
    raise CheckpointError(f"{path} is not a torch.save archive (a zip file); other pickles are never opened")


def _recognised(state: dict[Any, Any], recognise: Recognise, path: Path) -> dict[Any, Any]:
    if (told := recognise(state)) is not None:
        raise CheckpointError(f"{path} {told}")
    return state


def _load(path: Path, **options: Any) -> dict[Any, Any]:
    """The state dict in a file, by the restricted unpickler."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise CheckpointError(
                f"{path} is pickled in a way that the restricted unpickler does not read; save a safetensors file"
            ) from None
        raise CheckpointError(f"{path} holds pickled code, which is never run; save a safetensors file") from None
    except Exception as error:  # a damaged file fails in the reader, the unpickler or a tensor constructor
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; accepted is a state dict")
    return state


def _storages(state: Mapping[Any, Any], path: Path) -> dict[int, int]:
    """The bytes of each storage of dense tensors by its address; CheckpointError if tensors need more than it has.

    Several tensors may be views of one storage, each with bytes of its own.
    """
    storages: dict[int, int] = {}
    needed: dict[int, int] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
            continue  # refused by name when the state is described
        storage = value.untyped_storage()
        address = storage.data_ptr()
        storages[address] = max(storage.nbytes(), storages.get(address, 0))
        needed[address] = needed.get(address, 0) + value.numel() * value.element_size()
        if needed[address] > storages[address]:
            raise CheckpointError(
                f"{path}: {short(key)} is a view that repeats bytes of its storage: it needs {needed[address]} bytes "
                f"with the tensors that share it, and there are {storages[address]}"
            )
    return {address: size for address, size in storages.items() if size}


def _records(path: Path) -> dict[int, zipfile.ZipInfo]:
    """The records of an archive of ``torch.save`` by where their data begins."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {_start(archive, record): record for record in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None
    names = {record.filename.rpartition("/")[2] for record in records.values()}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} holds a TorchScript program, which is never run; save its state dict")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip file, but not one that torch.save wrote of a state dict")
    return records


def _check_records(path: Path, records: Mapping[int, zipfile.ZipInfo], storages: Mapping[int, int]) -> None:
    """CheckpointError unless each storage is a whole record of the archive, stored as it is.

    All storages are parts of one mapping of the file, which begins at a page. Where that is, is not told: it is where
    every storage is a record.
    """
    if not storages:
        return
    plain = {start: r.file_size for start, r in records.items() if r.compress_type == zipfile.ZIP_STORED}
    first = min(storages)
    bases = [first - start for start in plain if (first - start) % mmap.PAGESIZE == 0]
    if not any(_are_records(storages, base, plain) for base in bases):
        raise CheckpointError(f"{path} is damaged: its records are not as long as the tensors that it declares")


def _are_records(storages: Mapping[int, int], base: int, records: Mapping[int, int]) -> bool:
    return all(records.get(address - base) == size for address, size in storages.items())


def _start(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    """Where a record's data begins."""
    file: Any = archive.fp
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no record begins at {record.header_offset}")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return record.header_offset + _LOCAL_HEADER + name + extra


def _described(state: Mapping[Any, Any], path: Path) -> dict[str, Stored]:
    """The tensors of a state dict; CheckpointError if something else is in it."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    stored = {}
    for key, value in state.items():
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not is_plain:
            raise CheckpointError(
                f"{path}: {short(key)} is not a name with a dense tensor, but {type(value).__name__}"
            )
        stored[key] = Stored(tuple(value.shape), codes.get(value.dtype, str(value.dtype)), value.detach)
    return stored
