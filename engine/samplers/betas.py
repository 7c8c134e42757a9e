"""The betas of a schedule, taken from whatever holds numbers; a clear refusal of what does not."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

MAX_TIMESTEPS = 1 << 20


def check_betas(betas: Any, name: str = "betas") -> NDArray[np.float64]:
    """A copy of ``betas`` as float64 [T].

    Args:
        betas: a sequence of real numbers, a NumPy array or a tensor, one-dimensional with 1 to 2**20 entries, each in
            (0, 1), the last one possibly 1 (zero terminal SNR).
        name: what messages call it.

    Raises:
        TypeError: it holds something else than real numbers, or a tensor that requires a gradient: a schedule is a
            constant, and nothing would flow back through it.
        ValueError: it has another shape, or a number lies outside.
    """
    array = _as_float64(betas, name)
    if array.ndim != 1 or not 1 <= len(array) <= MAX_TIMESTEPS:
        raise ValueError(f"{name} must be one-dimensional with 1 to {MAX_TIMESTEPS} entries, got shape {array.shape}")
    inside = (array > 0) & (array < 1)
    inside[-1] |= array[-1] == 1
    if not inside.all():
        t = int(np.argmin(inside))
        raise ValueError(f"{name} must lie in (0, 1), the last one in (0, 1], got {name}[{t}] = {array[t]}")
    return array


def _as_float64(betas: Any, name: str) -> NDArray[np.float64]:
    if isinstance(betas, torch.Tensor):
        return _of_tensor(betas, name)
    if isinstance(betas, np.ndarray):
        if np.ma.is_masked(betas):
            raise TypeError(f"{name} must be numbers, got an array with masked entries")
        if betas.dtype.kind in "iuf":
            return betas.astype(np.float64)
        if betas.dtype.kind != "O":
            raise TypeError(f"{name} must be real numbers, got an array of {betas.dtype}")
        betas = betas.tolist()
    if hasattr(betas, "__array__"):
        return _as_float64(np.asarray(betas), name)
    if isinstance(betas, str | bytes) or not isinstance(betas, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers, got {short(betas)}")
    values = [_number(entry, name, t) for t, entry in enumerate(betas)]
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be numbers: {error}") from error


def _of_tensor(tensor: torch.Tensor, name: str) -> NDArray[np.float64]:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.requires_grad:
        raise TypeError(f"{name} must be constants, got a tensor that requires a gradient ({kind}): detach it")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got a tensor of {kind}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise TypeError(f"{name} must be numbers, got a tensor that is sparse, quantised or without data ({kind})")
    result: NDArray[np.float64] = tensor.to("cpu", torch.float64, copy=True).numpy()
    return result


def _number(entry: Any, name: str, t: int) -> Any:
    """An entry that is a real number as a float; a nested sequence as it is, for its shape to be refused."""
    if isinstance(entry, torch.Tensor | np.ndarray):
        return _as_float64(entry, f"{name}[{t}]")
    if isinstance(entry, Sequence) and not isinstance(entry, str | bytes):
        return [_number(inner, name, t) for inner in entry]
    if isinstance(entry, bool | np.bool_) or not isinstance(entry, numbers.Real):
        raise TypeError(f"{name} must be real numbers, got {name}[{t}] = {short(entry)}")
    try:
        return float(entry)
    except OverflowError:
        raise ValueError(
            f"{name} must lie in (0, 1), the last one in (0, 1], got {name}[{t}] = {short(entry)}"
        ) from None
