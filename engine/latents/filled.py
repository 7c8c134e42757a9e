"""Networks of other libraries, built without memory, and filled with tensors that fit in every name and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn

from stepfusion import _checks
from stepfusion.errors import CheckpointError, first_line
from stepfusion.kernels.launch import plain_torch
from stepfusion.networks.meta import Unfilled

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STORED = (*FLOATS, torch.float64)


def built(build: Callable[[], Any], what: str) -> nn.Module:
    """What ``build`` returns, on the meta device and without initial values.

    Raises:
        CheckpointError: the library refuses the config; ``what`` begins the sentence.
    """
    try:
        with plain_torch(gradients=False), torch.device("meta"), Unfilled():
            module = build()
    except (ValueError, TypeError, NotImplementedError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{what} cannot be built: {first_line(error)[:300]}") from None
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{what} is {type(module).__name__}, and no network")
    return module


def fill(module: nn.Module, tensors: Mapping[str, Tensor], what: str, dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter and every persistent buffer of a module its tensor; it is frozen, and in eval mode.

    Args:
        module: on the meta device.
        tensors: by the names of its ``state_dict``, all of them and no others, floating point and finite. Those that
            have the dtype already are not copied.
        what: begins the sentences: "the autoencoder".
        dtype: of the module from now on.

    Raises:
        CheckpointError: the first tensor that is missing, unknown, misshapen, of another kind or not finite is named.
    """
    wanted = module.state_dict()
    for name in (*wanted, *tensors):
        if name not in tensors:
            raise CheckpointError(f"{what} lacks the tensor {shown(name)}")
        if name not in wanted:
            raise CheckpointError(f"{what} has no place for the tensor {shown(name)}")
        _check(name, tensors[name], wanted[name], what)
    given = {name: tensors[name].detach().to(dtype).contiguous() for name in wanted}
    for name, tensor in given.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{what}: {name} has values that are not finite in {str(dtype).removeprefix('torch.')}"
            )
    module.load_state_dict(given, strict=True, assign=True)
    module.requires_grad_(False).eval()


def _check(name: str, given: object, wanted: Tensor, what: str) -> None:
    if not isinstance(given, Tensor):
        raise CheckpointError(f"{what}: {name} is {type(given).__name__}; accepted is a tensor")
    if given.shape != wanted.shape or given.dtype not in _STORED or given.is_meta:
        place = " on the meta device" if given.is_meta else ""
        raise CheckpointError(
            f"{what}: {name} is {_checks.describe(given)}{place}; accepted is floating point {list(wanted.shape)}"
        )


def shown(name: object) -> str:
    """A name as messages give it: whole, if it is a name and no mischief."""
    return repr(name) if isinstance(name, str) and len(name) <= 200 else short(name)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config: without notes, whose keys start with "_", and with lists for tuples."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if isinstance(key, str) and not key.startswith("_")
    }
