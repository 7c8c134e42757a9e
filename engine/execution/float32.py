"""What float32 means on a CUDA device: float32, unless a user asks for TF32.

TF32 multiplies with ten bits of the mantissa. PyTorch leaves it off for matrix products and on for convolutions, by
switches of the process. Here a network's dtype decides, for both: the switches are set while a network is called or
captured, and are as before afterwards. A captured tick keeps what its capture chose.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch


class _Switches(NamedTuple):
    """PyTorch's settings: the older three, None if they contradict the newer ones, and the newer ones."""

    precision: str | None
    products: bool | None
    convolutions: bool | None
    newer: tuple[str, ...]


_Value = TypeVar("_Value")
_LOCK = threading.Lock()
_UNDER_WAY: Counter[bool] = Counter()  # calls with and without TF32
_BEFORE: list[_Switches] = []  # the settings of the user, while a call is under way


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Convolutions and matrix products of float32 in this block use TF32, or do not.

    The switches are those of the process. While any block without TF32 is under way, in whichever thread, there is
    none, so that calls with TF32 beside it are more exact, and slower. What a user sets meanwhile is lost.
    """
    _count(tf32, 1)
    try:
        yield
    finally:
        _count(tf32, -1)


def _count(tf32: bool, change: int) -> None:
    with _LOCK:
        if not +_UNDER_WAY:
            _BEFORE.append(_read())
        _UNDER_WAY[tf32] += change
        if _UNDER_WAY[False]:
            _set(False)
        elif _UNDER_WAY[True]:
            _set(True)
        else:
            _restore(_BEFORE.pop())


def _newer() -> tuple[Any, ...]:
    """What has a setting of the newer kind; the last is changed by the older one for matrix products, too."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


def _read() -> _Switches:
    backends = torch.backends
    return _Switches(
        _unless_contradicted(torch.get_float32_matmul_precision),
        _unless_contradicted(lambda: backends.cuda.matmul.allow_tf32),
        _unless_contradicted(lambda: backends.cudnn.allow_tf32),
        tuple(each.fp32_precision for each in _newer()),
    )


def _unless_contradicted(read: Callable[[], _Value]) -> _Value | None:
    """A setting of the older kind; None if PyTorch finds that those of the newer kind say something else."""
    try:
        return read()
    except RuntimeError:
        return None


def _set(tf32: bool) -> None:
    # Both kinds: PyTorch raises an error if somebody reads one that contradicts the other.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    for each in _newer()[:3]:
        each.fp32_precision = "tf32" if tf32 else "ieee"


def _restore(before: _Switches) -> None:
    if before.products is not None:
        torch.backends.cuda.matmul.allow_tf32 = before.products
    if before.precision is not None:
        torch.set_float32_matmul_precision(before.precision)
    if before.convolutions is not None:
        torch.backends.cudnn.allow_tf32 = before.convolutions
    for each, value in zip(_newer(), before.newer, strict=True):
        each.fp32_precision = value
