"""Checks of arguments: one clear sentence that names the argument, what was given and what is accepted.

What has a value for each image of a request is kept in little memory however many images there are: millions of them
mostly have one value for all, consecutive numbers, or a tensor. These are kept as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Integral, Real
from typing import Any, Generic, TypeVar, overload

import torch
from numpy.typing import NDArray

T = TypeVar("T")


def integer(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int in [low, high]; a bool or a float is a TypeError, another size a ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    result = int(value)
    if not low <= result <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {result}")
    return result


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> float:
    """``value`` as a finite float in [low, high], or in (low, high] with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, Real):
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


def images(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError unless ``value`` is a floating-point tensor of this shape."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        given = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {given}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")


# One value for each image


class Same(Sequence[T], Generic[T]):
    """One value, ``count`` times."""

    def __init__(self, value: T, count: int) -> None:
        self.value = value
        self._places = range(count)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Same[T]: ...
    def __getitem__(self, place: int | slice) -> T | Same[T]:
        if isinstance(place, slice):
            return Same(self.value, len(self._places[place]))
        self._places[place]  # IndexError if there is none
        return self.value


class Packed(Sequence[Any]):
    """Numbers in an array [n], or tuples of them in one [n, k]; nobody else may write to it."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Packed: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return Packed(self.values[place])
        value = self.values[place].tolist()
        return tuple(value) if self.values.ndim == 2 else value


def integers(name: str, value: Any, count: int, low: int, high: int) -> Sequence[int]:
    """An integer in [low, high] for each of ``count`` images; TypeError or ValueError naming the argument."""
    each = _each(name, value, count, "iu")

    def check(one: Any) -> int:
        return integer(name, one, low, high)

    plain = isinstance(each, range | Packed) or (isinstance(each, list) and set(map(type, each)) == {int})
    return _checked(each, check, plain, low, high)


def numbers(name: str, value: Any, count: int, low: float, high: float) -> Sequence[float]:
    """A finite number in [low, high] for each of ``count`` images; TypeError or ValueError naming the argument."""
    each = _each(name, value, count, "iuf")
    each = Packed(each.values.astype("float64")) if isinstance(each, Packed) else each

    def check(one: Any) -> float:
        return number(name, one, low, high)

    return _checked(each, check, isinstance(each, Packed), low, high)


def contexts(values: torch.Tensor, count: int) -> Sequence[tuple[float, ...]]:
    """A vector for each of ``count`` images, from a tensor [K] for all or [n, K]."""
    if values.ndim == 1:
        return Same(tuple(values.tolist()), count)
    return Packed(_array(values))


def any_other(each: Sequence[float], value: float) -> bool:
    """Whether one of them is not ``value``."""
    if isinstance(each, Same):
        return len(each) > 0 and bool(each.value != value)
    if isinstance(each, Packed):
        return bool((each.values != value).any())
    return any(one != value for one in each)


def _each(name: str, value: Any, count: int, kinds: str) -> Sequence[Any]:
    """``value`` for each image, or the ``count`` values that it has; packed, if it is a tensor [n] of these kinds."""
    if isinstance(value, torch.Tensor):
        array = _array(value) if value.ndim == 1 and not value.is_complex() else None
        value = value.tolist() if array is None or array.dtype.kind not in kinds else Packed(array)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return Same(value, count)
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one for each of the {count} images, got {len(value)}")
    return value if isinstance(value, range | Packed) else list(value)


def _checked(each: Sequence[Any], check: Callable[[Any], T], plain: bool, low: float, high: float) -> Sequence[T]:
    """The values as ``check`` returns them, which are the ``plain`` ones themselves if they are within the bounds."""
    if isinstance(each, Same):
        return Same(check(each.value), len(each))
    if plain and (not len(each) or _within(each, low, high)):
        return each
    return [check(one) for one in each]


def _within(each: Sequence[Any], low: float, high: float) -> bool:
    if isinstance(each, range):
        return low <= min(each[0], each[-1]) and max(each[0], each[-1]) <= high
    if isinstance(each, Packed):
        return bool(low <= each.values.min().item() and each.values.max().item() <= high)  # False for a NaN
    return bool(low <= min(each) and max(each) <= high)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """A copy on the host, of floats as float64."""
    host = tensor.detach().to("cpu", copy=True)
    return (host.double() if host.is_floating_point() else host).numpy()
