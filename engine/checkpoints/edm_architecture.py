"""What the names and shapes of EDM's weights say of the UNet that they are of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from stepfusion.checkpoints.weights import Stored
from stepfusion.errors import CheckpointError

_OF_ANY = "map_layer0.weight"  # every one of these UNets has it
_FIRST = re.compile(r"enc\.(\d{1,6})x\1_conv\.weight")
_BLOCK = re.compile(r"enc\.(\d{1,6})x\1_block(\d{1,3})\.conv0\.weight")
_MOST_TAPS = 16


def without_prefix(stored: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """The network's weights under its own names: without ``model.`` of the preconditioning, and of other wrappers.

    Raises:
        CheckpointError: there are none of EDM's.
    """
    found = [key for key in stored if key == _OF_ANY or key.endswith(f".{_OF_ANY}")]
    if len(found) != 1:
        raise CheckpointError(
            f"{path} has {len(found) or 'no'} tensors named {_OF_ANY}; every SongUNet and DhariwalUNet of EDM has one"
        )
    prefix = found[0].removesuffix(_OF_ANY)
    weights = {key.removeprefix(prefix): value for key, value in stored.items()}
    if len(weights) < len(stored):
        raise CheckpointError(f"{path} has tensors under one name with and without {prefix!r} before it")
    return weights


def read_architecture(weights: Mapping[str, Stored], path: Path) -> tuple[str, dict[str, Any]]:
    """The class of the UNet, "SongUNet" or "DhariwalUNet", and the fields of its config that its weights tell.

    All but `dropout` are told, and the width of images that are not square.

    Raises:
        CheckpointError: the weights are of neither.
    """
    shapes = _Shapes(weights, path)
    resolution, first = shapes.first()
    last = f"dec.{resolution}x{resolution}_aux_conv.weight"
    song = last in weights
    if not song and "out_conv.weight" not in weights:
        raise CheckpointError(f"{path} has neither {last}, as a SongUNet has, nor out_conv.weight, as a DhariwalUNet")
    inner = shapes.of(_OF_ANY, 2)
    width = first[0] if song else inner[1]
    blocks = [(int(found[1]), int(found[2])) for key in weights if (found := _BLOCK.fullmatch(key))]
    sizes = sorted({size for size, _ in blocks}, reverse=True)
    channels = [shapes.of(f"enc.{size}x{size}_block0.conv0.weight", 4)[0] for size in sizes]
    out = shapes.of(last if song else "out_conv.weight", 4)
    fields = {
        "img_resolution": resolution,
        "in_channels": first[1],
        "out_channels": out[0],
        "label_dim": shapes.columns("map_label.weight"),
        "augment_dim": shapes.columns("map_augment.weight"),
        "model_channels": width,
        "channel_mult": [shapes.multiple(count, width) for count in channels],
        "channel_mult_emb": shapes.multiple(inner[0], width),
        "num_blocks": sum(size == resolution for size, _ in blocks),
        "attn_resolutions": [size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in weights],
    }
    if not song:
        return "DhariwalUNet", fields
    fields["channel_mult_noise"] = shapes.multiple(inner[1], width)
    return "SongUNet", fields | _of_song(weights, path)


def _of_song(weights: Mapping[str, Stored], path: Path) -> dict[str, Any]:
    """What tells DDPM++ from NCSN++."""
    encoders = {"aux_residual.": "residual", "aux_skip.": "skip"}
    found = [kind for part, kind in encoders.items() if any(part in key for key in weights)]
    fields: dict[str, Any] = {
        "embedding_type": "fourier" if "map_noise.freqs" in weights else "positional",
        "encoder_type": found[0] if found else "standard",
        "decoder_type": "skip" if any("aux_up." in key for key in weights) else "standard",
    }
    filters = (key for key in weights if key.endswith(".resample_filter"))
    if (key := next(filters, None)) is not None:
        fields["resample_filter"] = _taps(weights[key], f"{path}: {key}")
    return fields


def _taps(filter_: Stored, name: str) -> list[int]:
    """f of ``outer(f, f) / sum(f)**2``, in units of its first tap."""
    shape = filter_.shape
    if len(shape) != 4 or shape[:2] != (1, 1) or shape[2] != shape[3] or not 1 <= shape[2] <= _MOST_TAPS:
        raise CheckpointError(f"{name} is {list(shape)}; accepted is [1, 1, K, K] with K up to {_MOST_TAPS}")
    taps = filter_.read().double().sum((0, 1, 2))
    taps = taps / taps[0]
    if not taps.isfinite().all() or not (taps >= 1).all():
        raise CheckpointError(f"{name} is not a filter whose taps grow from its ends")
    return [round(tap) for tap in taps.tolist()]


class _Shapes:
    """The shapes of a file's tensors; what is missing or of another rank is named."""

    def __init__(self, weights: Mapping[str, Stored], path: Path) -> None:
        self.weights, self.path = weights, path

    def of(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with so many sizes of at least 1."""
        if key not in self.weights:
            raise CheckpointError(f"{self.path} lacks {key}, which a UNet of EDM with its other weights has")
        shape = self.weights[key].shape
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(f"{self.path}: {key} is {list(shape)}; accepted are {rank} sizes of at least 1")
        return shape

    def first(self) -> tuple[int, tuple[int, ...]]:
        """The resolution of the first convolution, and the shape of its weight."""
        found = [match for key in self.weights if (match := _FIRST.fullmatch(key))]
        if len(found) != 1:
            names = short([match[0] for match in found])
            raise CheckpointError(f"{self.path} has the first convolutions {names}; accepted is one enc.HxH_conv")
        return int(found[0][1]), self.of(found[0][0], 4)

    def columns(self, key: str) -> int:
        """The inputs of a linear layer, 0 if there is none."""
        return self.of(key, 2)[1] if key in self.weights else 0

    def multiple(self, channels: int, width: int) -> int:
        """How many times the network's width some channels are."""
        if channels % width:
            raise CheckpointError(f"{self.path} has layers of {channels} channels, which are no multiple of {width}")
        return channels // width
