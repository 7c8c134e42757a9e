"""The hooks that turn final latents into images, and images into latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

from stepfusion import _checks
from stepfusion.kernels.launch import plain_torch

Decode = Callable[[torch.Tensor], torch.Tensor]


def decoder_on(decode: Decode | None, device: torch.device, name: str = "decode") -> Decode | None:
    """A hook on a device: a module is copied there in eval mode, unless it is already there; others stay.

    ``name`` is the argument's.

    Raises:
        TypeError: it is not callable.
    """
    if decode is not None and not callable(decode):
        raise TypeError(f"{name} must be callable, got {type(decode).__name__}")
    if not isinstance(decode, torch.nn.Module):
        return decode
    tensors = (*decode.parameters(), *decode.buffers())
    if not decode.training and all(tensor.device == device for tensor in tensors):
        return decode
    return copy.deepcopy(decode).to(device).eval()


def decode_batches(decode: Decode, latents: torch.Tensor, batch: int) -> torch.Tensor:
    """The images [n, C', H', W'] of latents [n, C, H, W], ``batch`` at a time; ValueError if they are no images."""
    parts = []
    for latent in torch.split(latents, batch):
        part = decode(latent)
        image = isinstance(part, torch.Tensor) and part.is_floating_point()
        if not image or part.ndim != 4 or len(part) != len(latent):
            given = _checks.describe(part) if isinstance(part, torch.Tensor) else type(part).__name__
            raise ValueError(f"decode must return floating-point images [{len(latent)}, C, H, W], got {given}")
        parts.append(part)
    return torch.cat(parts)


@plain_torch(gradients=False)
def decoded_shape(decode: Decode | None, shape: Sequence[int], device: torch.device | str = "cpu") -> tuple[int, ...]:
    """The shape (C', H', W') of the image that a hook makes of a latent of ``shape``; without a hook, of the latent.

    A hook may say it, by a method ``image_shape`` of a latent's shape; any other decodes a latent of zeros.

    Raises:
        ValueError: it returns no image.
    """
    if decode is None:
        return tuple(shape)
    says: Callable[[Sequence[int]], tuple[int, ...]] | None = getattr(decode, "image_shape", None)
    if callable(says):
        return says(shape)
    return tuple(decode_batches(decode, torch.zeros((1, *shape), device=device), 1).shape[1:])
