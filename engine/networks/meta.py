"""Networks on the meta device, which have shapes and are to be given their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """While it is entered, initialisers leave tensors as they are.

    On the meta device there is nothing to fill, but PyTorch has some initialisers in Python there, and imports its
    compiler for them, which takes more than a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)
