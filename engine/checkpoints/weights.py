"""The weights in a file: what the file says of each, compared with what a network needs before anything is read."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import torch
from torch import Tensor

from stepfusion.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGER = ("I64", str(torch.int64))


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what the file says of it, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def check_state(
    stored: Mapping[str, Stored],
    wanted: Mapping[str, tuple[int, ...]],
    path: Path,
    source: str = "config",
    *,
    integers: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """Compare the stored tensors with the shapes that are wanted, as `source` says, then read them as float32.

    Those that `integers` names stay int64.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen, of another kind or not finite; it names them.
    """
    problems = [
        _problem("missing", sorted(wanted.keys() - stored.keys())),
        _problem("unexpected", sorted(stored.keys() - wanted.keys())),
        _problem(
            "misshapen",
            [
                f"{key} {list(stored[key].shape)} instead of {list(shape)}"
                for key, shape in wanted.items()
                if key in stored and stored[key].shape != shape
            ],
        ),
        _problem(
            "not floating point",
            [
                f"{key} {stored[key].dtype}"
                for key in wanted
                if key in stored and key not in integers and stored[key].dtype not in DTYPES
            ],
        ),
        _problem(
            "not int64",
            [
                f"{key} {stored[key].dtype}"
                for key in sorted(integers & stored.keys())
                if stored[key].dtype not in _INTEGER
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(f"{path} does not fit its {source}: {'; '.join(filter(None, problems))}")
    return {
        key: stored[key].read().clone() if key in integers else _finite_float32(key, stored[key].read(), path)
        for key in wanted
    }


def _problem(what: str, entries: list[str], shown: int = 3) -> str:
    """Say how many keys are `what`, and the first few of them; nothing if there are none."""
    if not entries:
        return ""
    safe = [entry if entry.isprintable() and len(entry) <= 200 else short(entry) for entry in entries[:shown]]
    rest = ", ..." if len(entries) > shown else ""
    return f"{len(entries)} {what} ({', '.join(safe)}{rest})"


def _finite_float32(key: str, tensor: Tensor, path: Path) -> Tensor:
    """Copy out of the mapped file, so that the network outlives what happens to it."""
    weights = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not weights.isfinite().all():
        raise CheckpointError(f"{path}: {key} has values that are not finite")
    return weights


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; the name of its class if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
