"""Values that are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Value = TypeVar("Value")


class Memo:
    """Values by key, each made once. A copy of a Memo, or one from a pickle, is empty: values can be made again."""

    def __init__(self) -> None:
        self._values: dict[Hashable, object] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, from ``make`` if it was never asked for."""
        if key not in self._values:
            if torch.compiler.is_compiling():  # what is made here comes from NumPy, and is no part of a graph
                make = torch.compiler.disable(make)  # type: ignore[no-untyped-call]
            with torch.inference_mode(False):  # autograd could not use a tensor that was made in inference mode
                self._values[key] = make()
        return self._values[key]  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()
