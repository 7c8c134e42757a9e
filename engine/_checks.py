"""Checks of arguments: one clear sentence that names the argument, what was given and what is accepted."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch


def integer(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int in [low, high]; a bool or a float is a TypeError, another size a ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    result = int(value)
    if not low <= result <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {result}")
    return result


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> float:
    """``value`` as a finite float in [low, high], or in (low, high] with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    result = float(value)
    inside = low < result <= high if open_low else low <= result <= high
    if not math.isfinite(result) or not inside:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be a finite number in {bracket}{low:g}, {high:g}], got {value}")
    return result


def choice(name: str, value: Any, accepted: Collection[str]) -> str:
    """``value`` if it is one of ``accepted``."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return value


def boolean(name: str, value: Any) -> bool:
    """``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def describe(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape, as messages give them: "float32 [2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
