"""Making images from an image: start from it noised, and keep a part of it.

``strength`` s starts from q(x_t | image) (Ho et al. 2020, equation 4) and takes the last ceil(s * steps) rows of a
table (Meng et al. 2022, SDEdit). A mask keeps what it says: after every step the kept region is the image noised
again to the level that the step reached (Lugmayr et al. 2022, equation 8a), inside the step itself, and after the
last step the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn import functional

from stepfusion import _checks
from stepfusion.execution.decoder import Decode
from stepfusion.kernels import STREAM_FORWARD
from stepfusion.model_spec import ModelSpec
from stepfusion.options import SamplingOptions
from stepfusion.samplers.table import StepTable

#: The condition of networks for inpainting: a mask, and the latent of what it does not hide.
CONCATENATED = "concatenated"

_ROUNDING = 1e-9  # of strength * steps: 0.07 * 100 is above 7


@dataclass(frozen=True)
class Edit:
    """What :meth:`stepfusion.Engine.sample` was given: an image, how much of the noise to start from, and a mask."""

    image: torch.Tensor
    strength: float
    mask: torch.Tensor | None

    def shorten(self, table: StepTable) -> StepTable:
        """The rows of ``table`` that are walked; ValueError if they cannot make images from an image.

        Heun's corrector without its predictor would be an evaluation that changes nothing, and is left out.
        """
        if not table.edits:
            raise ValueError(f"image needs a sampler's table, whose rows lead to images, got {table!r}")
        rows = max(1, math.ceil(self.strength * len(table) - _ROUNDING))
        tail = table.last(rows)
        return table.last(rows - 1) if rows > 1 and tail.starts_idle else tail

    @property
    def noised(self) -> bool:
        """True if images start from the image; at strength 1 they start from noise, as without an image."""
        return self.strength < 1

    def images(self, count: int) -> torch.Tensor:
        """The image of each of ``count``, float32 [count, C, H, W]."""
        return self.image.to(torch.float32).expand(count, *self.image.shape[1:])

    def known(self, count: int) -> torch.Tensor | None:
        """What is kept, float32 [count, C, H, W] and NaN where the sampler is free; None without a mask."""
        if self.mask is None:
            return None
        image = self.image.to(torch.float32)
        known = torch.where(self.mask.to(image.device) != 0, math.nan, image)  # one for all images, or one each
        return known.expand(count, *known.shape[1:])


def make_edit(
    image: torch.Tensor | None, strength: float | None, mask: torch.Tensor | None, start: torch.Tensor | None
) -> Edit | None:
    """The edit that these arguments ask for, None for none; TypeError or ValueError naming the argument."""
    for name, value in (("strength", strength), ("mask", mask)):
        if image is None and value is not None:
            raise ValueError(f"{name} needs an image, got none")
    if image is None:
        return None
    if start is not None:
        raise ValueError("image and start exclude each other, got both")
    if strength is None and mask is None:
        raise ValueError("image needs a strength in (0, 1], or a mask, got neither")
    strength = 1.0 if strength is None else _checks.number("strength", strength, 0.0, 1.0, open_low=True)
    return Edit(image, strength, mask)


def in_latents(options: SamplingOptions, encode: Decode, spec: ModelSpec, device: torch.device) -> SamplingOptions:
    """The options with image and mask as latents of ``spec.shape``; as they are if the image already is a latent.

    A latent's pixel is kept where the mask keeps all of the image under it. A network for inpainting, whose
    condition ``concatenated`` is a mask and the latent of the image without what it hides, is shown these instead.

    Args:
        encode: makes latents [n, C, h, w] of images float32 [n, C', H, W] in [-1, 1].

    Raises:
        ValueError: the image has another size than the model's latents stand for.
    """
    image, mask = options.get("image"), options.get("mask")
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or tuple(image.shape[1:]) == spec.shape:
        return options
    if not image.is_floating_point() or image.is_meta or not bool(image.isfinite().all()):
        raise ValueError("image must be finite floating-point values in [-1, 1]")
    image = image.to(device, torch.float32)
    changed: SamplingOptions = {**options, "image": _encoded(image, encode, spec.shape)}
    fits = isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[2:] == image.shape[2:]
    if not isinstance(mask, torch.Tensor) or not fits or mask.is_meta or len(mask) not in (1, len(image)):
        return changed
    hidden = (mask != 0).any(1, keepdim=True).to(device, torch.float32)
    if CONCATENATED in (one.name for one in spec.conditions):
        return _concatenated(changed, _encoded(image * (1 - hidden), encode, spec.shape), hidden)
    return {**changed, "mask": functional.adaptive_max_pool2d(hidden, spec.shape[-2:])}


def _concatenated(options: SamplingOptions, shown: torch.Tensor, hidden: torch.Tensor) -> SamplingOptions:
    """The options of a network for inpainting: latents of what is shown, and where something is hidden."""
    small = functional.interpolate(hidden, shown.shape[-2:])  # the nearest pixel, as the networks were trained
    condition = torch.cat((small.expand(len(shown), -1, -1, -1), shown), dim=1)
    given = {CONCATENATED: condition[0] if len(condition) == 1 else condition}
    options = {**options, "mask": None, "conditions": {**given, **(options.get("conditions") or {})}}
    strength = options.get("strength")
    return {**options, "image": None, "strength": None} if strength in (None, 1) else options


def _encoded(images: torch.Tensor, encode: Decode, shape: tuple[int, ...]) -> torch.Tensor:
    """Latents [n, ...] of images [n, ...], one at a time; ValueError unless they have this shape."""
    latents = torch.cat([encode(one) for one in torch.split(images, 1)])
    if tuple(latents.shape[1:]) != shape:
        raise ValueError(
            f"image must have the size of the model's, whose latents are {list(shape)}, "
            f"got {list(images.shape[1:])} with latents {list(latents.shape[1:])}"
        )
    return latents


def check_edit(edit: Edit, count: int, shape: tuple[int, ...]) -> None:
    """TypeError or ValueError unless image and mask fit ``count`` images of this shape."""
    _check_batch("image", edit.image, count, (shape,))
    if not edit.image.is_floating_point():
        raise TypeError(f"image must be a floating-point tensor in [-1, 1], got {edit.image.dtype}")
    if not bool(edit.image.isfinite().all()):
        raise ValueError("image must be finite, got NaN or infinite values")
    if edit.mask is not None:
        _check_batch("mask", edit.mask, count, ((1, *shape[1:]), shape))
        if not bool(((edit.mask == 0) | (edit.mask == 1)).all()):
            raise ValueError("mask must hold 1 where to repaint and 0 where to keep, and nothing else")


def _check_batch(name: str, value: torch.Tensor, count: int, shapes: tuple[tuple[int, ...], ...]) -> None:
    """One tensor for all images, or one each."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    accepted = dict.fromkeys((n, *shape) for shape in shapes for n in (1, count))
    if tuple(value.shape) not in accepted:
        wanted = " or ".join(str(list(shape)) for shape in accepted)
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")


def noised(
    images: torch.Tensor,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    indices: torch.Tensor,
    table: StepTable,
    ops: ModuleType,
) -> torch.Tensor:
    """Images float32 [n, C, H, W] where rows of a table start, with the noise of their seeds and indices.

    Rows, seeds and indices are int64 [n]. The noise is that of q_sample at the rows' ``timesteps``.
    """
    device = images.device
    pairs = (torch.from_numpy(column.copy()).to(device, torch.float32) for column in table.pairs())
    keys = torch.from_numpy(table.timesteps.copy()).to(device)[rows]
    noise = ops.normal(seeds, indices, keys, tuple(images.shape[1:]), STREAM_FORWARD)
    result: torch.Tensor = ops.q_sample(images, rows, *pairs, noise=noise)[0]
    return result
