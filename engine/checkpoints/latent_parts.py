"""What stands around the network of a latent pipeline: autoencoder and text encoders, read from their folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stepfusion.checkpoints.json_file import read_object
from stepfusion.checkpoints.weight_files import find_weights, opened
from stepfusion.errors import CheckpointError
from stepfusion.latents.autoencoder import LatentDecoder, LatentEncoder, autoencoder_from
from stepfusion.latents.autoencoder_config import checked_config, latent_space
from stepfusion.latents.prompts import PromptConditions
from stepfusion.latents.text import STATES, TextEncoder, TextPart
from stepfusion.model_spec import ModelSpec
from stepfusion.networks import UNet2DCondition

_AUTOENCODERS = ("vae", "vqvae")


@dataclass(frozen=True)
class LatentParts:
    """The parts of a latent pipeline beside its network; all None for a network whose images are pixels."""

    decoder: LatentDecoder | None = None
    encoder: LatentEncoder | None = None
    text: TextEncoder | None = None

    def network_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the parts say of a `UNet2DCondition` with this config: how long texts are, what is concatenated."""
        arguments: dict[str, Any] = {}
        if self.text is not None:
            arguments["sequence_length"] = self.text.shapes[STATES][0]
        channels = config.get("in_channels", 4)
        if self.decoder is not None and isinstance(channels, int) and channels > self.decoder.space.channels:
            arguments["concatenated_channels"] = channels - self.decoder.space.channels
        return arguments

    def check(self, network: nn.Module, path: Path) -> None:
        """CheckpointError unless the network of the pipeline in ``path`` takes what these parts make."""
        if self.text is not None:
            if not isinstance(network, UNet2DCondition):
                raise CheckpointError(f"{path} has a text encoder, and its network takes no texts")
            wanted = {spec.name: spec.shape for spec in network.conditions}
            for name, shape in self.text.shapes.items():
                if wanted.get(name) != tuple(shape):
                    shown = list(wanted[name]) if name in wanted else "no such condition"
                    raise CheckpointError(
                        f"{path}: the text encoders make {name} {list(shape)}, and the network takes {shown}"
                    )
        channels = getattr(network, "image_channels", getattr(network, "in_channels", None))
        if self.decoder is not None and channels != self.decoder.space.channels:
            made = self.decoder.space.channels
            raise CheckpointError(f"{path}: the autoencoder's latents have {made} channels, the network's {channels}")

    def arguments(self, spec: ModelSpec) -> dict[str, Any]:
        """The arguments of an engine for a model with this spec."""
        arguments: dict[str, Any] = {}
        if self.decoder is not None:
            arguments["decode"] = self.decoder
        if self.encoder is not None:
            arguments["encode_images"] = self.encoder
        if self.text is not None:
            factor = 8 if self.decoder is None else self.decoder.space.factor
            ids = {one.name: one.shape[0] for one in spec.conditions}.get("time_ids")
            height, width = (factor * side for side in spec.shape[-2:])
            arguments["prompts"] = PromptConditions(self.text, ids, height, width)
        return arguments

    def contents(self) -> Iterator[tuple[str, Tensor | str]]:
        """By name, every weight of the parts, and what else decides their results."""
        for name, part in (("decoder", self.decoder), ("encoder", self.encoder)):
            if part is not None:
                yield f"{name}.space", repr(part.space)
                yield from ((f"{name}.{key}", value) for key, value in sorted(part.state_dict().items()))
        if self.text is not None:
            yield from self.text.contents()


def read_parts(folders: Mapping[str, Path]) -> LatentParts:
    """Read the parts of a pipeline from their folders by name; every file is checked before it is used.

    Raises:
        CheckpointError: a file is missing or wrong, a tokenizer is missing, or a library of the extra ``[latent]``.
    """
    decoder, encoder = None, None
    for name in _AUTOENCODERS:
        if name in folders:
            config, tensors = _read_part(folders[name])
            autoencoder = autoencoder_from(config, tensors)
            space = latent_space(checked_config(config)[1])
            decoder, encoder = LatentDecoder(autoencoder, space), LatentEncoder(autoencoder, space)
    return LatentParts(decoder, encoder, _read_text(folders))


def _read_text(folders: Mapping[str, Path]) -> TextEncoder | None:
    parts = []
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if name in folders:
            if tokenizer not in folders:
                raise CheckpointError(f"{folders[name]} has no tokenizer: the folder {tokenizer!r} is missing")
            parts.append(TextPart(folders[tokenizer], *_read_part(folders[name])))
    # SDXL has a pooled text, and its empty prompt is zeros unless its pipeline says otherwise.
    return TextEncoder.from_parts(*parts, zeros_for_empty="text_encoder_2" in folders) if parts else None


def _read_part(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A part's config and its weights by name."""
    config = read_object(folder / "config.json")
    with opened(find_weights(folder)) as stored:
        return config, {name: one.read().clone() for name, one in stored.items()}
