"""Values that are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

Value = TypeVar("Value")


class Memo:
    """Values by key, each made once."""

    def __init__(self) -> None:
        self._values: dict[Hashable, object] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, from ``make`` if it was never asked for."""
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]  # type: ignore[return-value]
