"""Autoencoders of latent diffusion: images of latents, and latents of images (Rombach et al. 2022).

The networks are those of diffusers, built from a checked config and tensors; nothing is downloaded or unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from stepfusion import _checks
from stepfusion.latents.autoencoder_config import LatentSpace, checked_config, latent_space
from stepfusion.latents.filled import FLOATS, built, fill
from stepfusion.latents.libraries import library
from stepfusion.latents.norms import NormAct, join_norms
from stepfusion.latents.tiles import decode_tiles

MAX_SIDE = 1 << 16
#: Of images that are coded at a time: four of 512 x 512, or one of 1024 x 1024. A decoder of Stable Diffusion holds
#: about 2 KiB for each pixel while its last blocks run, so that 64 images of 512 x 512 at once would take 32 GiB;
#: more at a time is no faster, for four such images keep a GPU busy.
PIXELS_AT_ONCE = 1 << 20

_IMAGE_CHANNELS = 3

_OLD_ATTENTION = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")
_OF_TODAY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def autoencoder_from(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build an ``AutoencoderKL``, ``VQModel`` or ``AutoencoderTiny`` of diffusers.

    Args:
        config: what its ``config.json`` says.
        tensors: its weights by name; attention may have the names of 2022. All are checked before they are used.
        dtype: float32, bfloat16, or float16; a config with ``force_upcast`` makes float32 of float16, in which the
            activations of such an autoencoder overflow.

    Returns:
        The network of diffusers, frozen and in eval mode, on the device of the tensors.

    Raises:
        CheckpointError: the config or the tensors do not fit, or diffusers is missing; the first fault is named.
        ValueError: dtype is another one.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    name, checked = checked_config(config)
    kind = getattr(library("diffusers", f"an autoencoder ({name})"), name)
    what = f"the autoencoder ({name})"
    arguments = checked.model_dump(exclude={"block_out_channels"} if name == "AutoencoderTiny" else None)
    network = built(lambda: kind(**arguments), what)
    upcast = checked.force_upcast and dtype == torch.float16
    fill(network, _names_of_today(tensors), what, torch.float32 if upcast else dtype)
    return network


class LatentDecoder(nn.Module):
    """Images of latents: what a sampler's ``decode`` is, a module that can be moved and copied.

    An image depends on its own latent alone, up to rounding: the networks have no norms over a batch, and a VQ-VAE
    finds the codebook's vectors for one latent at a time.

    Attributes:
        space: how latents are scaled, and how large images are.
        tile: latents with a longer side are decoded in overlapping tiles of this length; None for never.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: nn.Module, space: LatentSpace, *, tile: int | None = None) -> None:
        """Take the decoder of an autoencoder, whose own norms are joined with the activations after them.

        Args:
            autoencoder: of :func:`autoencoder_from`.
            space: of its config.
            tile: the length of a tile's sides in latent pixels, at least 8.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        super().__init__()
        self.space, self.kind = space, type(autoencoder).__name__
        self.tile = None if tile is None else _checks.integer("tile", tile, 8, MAX_SIDE)
        self.quantize = getattr(autoencoder, "quantize", None)
        self.post_quant_conv = getattr(autoencoder, "post_quant_conv", None)
        self.decoder = _part(autoencoder, "decoder")
        join_norms(self.decoder)
        _add_scaling(self, space)
        self.eval()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        tile: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The decoder of an autoencoder's config and weights; arguments and errors of :func:`autoencoder_from`."""
        space = latent_space(checked_config(config)[1])
        return cls(autoencoder_from(config, tensors, dtype=dtype), space, tile=tile)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latents: floating point [n, C, h, w], as a denoiser makes them: scaled to about unit variance.

        Returns:
            Images float32 [n, 3, f h, f w], about in [-1, 1]: nothing is clamped.

        Raises:
            ValueError: they have another shape or dtype.
        """
        _check_images("latents", latents, self.space.channels)
        dtype = next(self.decoder.parameters()).dtype
        z = latents.float() * self.std / self.space.scaling + self.mean
        if self.quantize is not None and len(z):  # one at a time: a near tie must not depend on the batch
            z = torch.cat([_nearest(one, self.quantize.embedding.weight.float()) for one in torch.split(z, 1)])
        z = z.to(dtype)
        tile = self.tile
        if tile is not None and max(z.shape[-2:]) > tile:
            sides = [min(tile, side) for side in z.shape[-2:]]
            return _few_at_once(lambda few: decode_tiles(self._decode, few, tile), z, self._pixels(sides))
        return _few_at_once(self._decode, z, self._pixels(z.shape[-2:]))

    @property
    def explanation(self) -> str:
        """What decodes latents, and how large images are, for people."""
        dtype = str(next(self.decoder.parameters()).dtype).removeprefix("torch.")
        return f"{self.kind}, images {self.space.factor} times as large as latents, in {dtype}"

    def _pixels(self, sides: Sequence[int]) -> int:
        return self.space.factor**2 * sides[0] * sides[1]

    def image_shape(self, latent: Sequence[int]) -> tuple[int, ...]:
        """The shape (3, f h, f w) of the image of a latent of shape (C, h, w)."""
        return (_IMAGE_CHANNELS, *(self.space.factor * side for side in latent[1:]))

    def fuse(self, fused: bool | None) -> None:
        """Run norms and activations as one kernel always, never, or by default (None) where Triton drives a GPU."""
        _fuse(self, fused)

    def _decode(self, z: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        images: Tensor = self.decoder(z)
        return images


class LatentEncoder(nn.Module):
    """Latents of images: the mode of their distribution, so that the same image has the same latent.

    Attributes:
        space: how latents are scaled, and how large they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: nn.Module, space: LatentSpace) -> None:
        """Take the encoder of an autoencoder of :func:`autoencoder_from`, and the space of its config."""
        super().__init__()
        self.space = space
        self.encoder = _part(autoencoder, "encoder")
        self.quant_conv = getattr(autoencoder, "quant_conv", None)
        join_norms(self.encoder)
        _add_scaling(self, space)
        self.eval()

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
    ) -> Self:
        """The encoder of an autoencoder's config and weights; arguments and errors of :func:`autoencoder_from`."""
        space = latent_space(checked_config(config)[1])
        return cls(autoencoder_from(config, tensors, dtype=dtype), space)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: floating point [n, 3, H, W] in [-1, 1]; H and W are multiples of the space's factor.

        Returns:
            Latents float32 [n, C, H / f, W / f], scaled as a denoiser has them.

        Raises:
            ValueError: they have another shape or dtype.
        """
        _check_images("images", images, None)
        if any(side % self.space.factor for side in images.shape[-2:]):
            raise ValueError(
                f"images must have sides that are multiples of {self.space.factor}, got {list(images.shape[-2:])}"
            )
        images = images.to(next(self.encoder.parameters()).dtype)
        z = _few_at_once(self._encode, images, images.shape[-2] * images.shape[-1])
        latents: Tensor = (z - self.mean) * self.space.scaling / self.std
        return latents

    def _encode(self, images: Tensor) -> Tensor:
        h = self.encoder(images)
        if self.quant_conv is not None:
            h = self.quant_conv(h)
        mode: Tensor = h[:, : self.space.channels]  # of a Gaussian's mean and log variance the first
        return mode

    def fuse(self, fused: bool | None) -> None:
        """Run norms and activations as one kernel always, never, or by default (None) where Triton drives a GPU."""
        _fuse(self, fused)


def _names_of_today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose attention is named as it is now, and not as in 2022."""
    return {_OLD_ATTENTION.sub(lambda m: m[1] + _OF_TODAY[m[2]] + m[3], name): t for name, t in tensors.items()}


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """The nearest vector of a codebook [K, C] for each pixel of z [n, C, h, w] (van den Oord et al. 2017)."""
    pixels = z.movedim(1, -1)
    chosen = torch.cdist(pixels.reshape(-1, pixels.shape[-1]), codebook).argmin(dim=1)
    return codebook[chosen].view(pixels.shape).movedim(-1, 1)


def _part(autoencoder: nn.Module, name: str) -> nn.Module:
    part = getattr(autoencoder, name, None)
    if not isinstance(part, nn.Module):
        raise TypeError(f"autoencoder must be one of autoencoder_from, got {type(autoencoder).__name__}")
    return part


def _add_scaling(module: nn.Module, space: LatentSpace) -> None:
    """Mean and std of the latents as buffers [C, 1, 1] or [1, 1, 1], float32 whatever the module's dtype is."""
    device = next(module.parameters()).device
    for name, values in (("mean", space.mean), ("std", space.std or (1.0,))):
        buffer = torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
        module.register_buffer(name, buffer, persistent=False)


def _few_at_once(code: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
    """What ``code`` makes of x [n, ...], float32, at most :data:`PIXELS_AT_ONCE` at a time if images have so many."""
    return torch.cat([code(few).float() for few in torch.split(x, max(1, PIXELS_AT_ONCE // pixels))])


def _fuse(module: nn.Module, fused: bool | None) -> None:
    for part in module.modules():
        if isinstance(part, NormAct):
            part.fused = fused


def _check_images(name: str, value: Tensor, channels: int | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    shaped = value.ndim == 4 and channels in (None, value.shape[1]) and min(value.shape[-2:]) > 0
    if not shaped or not value.is_floating_point():
        accepted = f"[n, {channels or 'C'}, height, width]"
        raise ValueError(f"{name} must be floating point {accepted}, got {_checks.describe(value)}")
