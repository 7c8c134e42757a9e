"""The labels of a job in which every image has its own: read from a user's file, and kept in labels.npy."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepfusion.bulk.job import JOB, LABELS, Job
from stepfusion.bulk.shards import array_header
from stepfusion.errors import BulkError
from stepfusion.files.atomic import atomic_write_below
from stepfusion.files.regular import read_regular

_MAX_BYTES = 1 << 32


def read_labels_file(
    path: Path, num: int, classes: int, read_label: Callable[[str], int], *, name: str = "labels"
) -> NDArray[np.int64]:
    """The labels int64 [num] of a user's file: an array of integers in ``.npy``, or lines of text.

    Args:
        path: the file.
        num: of images.
        classes: how many the model has.
        read_label: the number of the label that a line names; ValueError if it names none.
        name: of the argument, for messages.

    Raises:
        ValueError: the file is missing, too large, damaged, or has other labels than these.
    """
    if not path.is_file():
        raise ValueError(f"{name} {path} is missing, or no file")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{name} {path} is larger than {_MAX_BYTES} bytes")
    labels = _read_array(path, name) if path.suffix == ".npy" else _read_lines(path, read_label, name)
    if labels.shape != (num,):
        raise ValueError(f"{name} must have one label for each of the {num} images, got {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels[(labels < 0) | (labels >= classes)][0])
        raise ValueError(f"{name} must have labels from 0 to {classes - 1}, got {wrong}")
    return labels


def labels_digest(labels: NDArray[np.int64]) -> str:
    """SHA-256 of the labels.npy of labels int64 [num]."""
    return hashlib.sha256(_content(labels)).hexdigest()


def write_labels(labels: NDArray[np.int64], out: Path) -> None:
    """Write labels int64 [num] to labels.npy, unless that is what it holds."""
    data = _content(labels)
    with suppress(FileNotFoundError):
        if read_regular(out / LABELS, _MAX_BYTES) == data:
            return
    atomic_write_below(out, LABELS, data)


def read_labels(job: Job, out: Path) -> NDArray[np.int64] | None:
    """The labels int64 [num] of labels.npy; None if the job has no such file. BulkError if it is damaged."""
    if job.labels_sha256 is None:
        return None
    header = array_header(np.dtype(np.int64), (job.num,))
    try:
        data = read_regular(out / LABELS, len(header) + 8 * job.num)
    except OSError as error:
        raise BulkError(f"{out / LABELS} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != job.labels_sha256:
        raise BulkError(f"{out / LABELS} is damaged: its hash is not the one in {JOB}")
    if not data.startswith(header) or len(data) != len(header) + 8 * job.num:
        raise BulkError(f"{out / LABELS} does not hold {job.num} labels")
    labels = np.frombuffer(data, dtype=np.int64, offset=len(header))
    if labels.min() < 0:
        raise BulkError(f"{out / LABELS} has the label {labels.min()}; accepted are labels from 0 on")
    return labels


def _content(labels: NDArray[np.int64]) -> bytes:
    """labels.npy of labels int64 [num]."""
    buffer = io.BytesIO()
    np.save(buffer, labels, allow_pickle=False)
    return buffer.getvalue()


def _read_array(path: Path, name: str) -> NDArray[np.int64]:
    try:
        labels: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)  # allocates nothing that is not there
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} {path} is not an array: {error}") from None
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        raise ValueError(f"{name} {path} must hold integers, got {getattr(labels, 'dtype', 'an archive')}")
    return labels.astype(np.int64)


def _read_lines(path: Path, read_label: Callable[[str], int], name: str) -> NDArray[np.int64]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{name} {path} is not text; accepted are lines of text, or .npy") from None
    known = {text: read_label(text.strip()) for text in dict.fromkeys(lines)}
    return np.array([known[text] for text in lines], dtype=np.int64)
