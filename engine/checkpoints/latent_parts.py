"""What stands around the network of a latent pipeline: autoencoder and text encoders, read from their folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from stepfusion.checkpoints.json_file import read_object
from stepfusion.checkpoints.lora_files import LoraFiles
from stepfusion.checkpoints.weight_files import find_weights, opened
from stepfusion.errors import CheckpointError
from stepfusion.latents.autoencoder import LatentDecoder, LatentEncoder, autoencoder_from
from stepfusion.latents.autoencoder_config import checked_config, latent_space
from stepfusion.latents.prompts import NoPrompts, PromptConditions
from stepfusion.latents.text import STATES, TextEncoder, TextPart
from stepfusion.model_spec import ModelSpec
from stepfusion.networks import UNet2DCondition

_AUTOENCODERS = ("vae", "vqvae")
#: The text encoders of a pipeline in their order, and the folders of their tokenizers.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class LatentParts:
    """The parts of a latent pipeline beside its network; all None for a network whose images are pixels.

    Attributes:
        missing_text: why there is no text encoder for a network that takes texts, for people; None if there is one.
    """

    decoder: LatentDecoder | None = None
    encoder: LatentEncoder | None = None
    text: TextEncoder | None = None
    missing_text: str | None = None

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
        if self.missing_text is not None:
            arguments["prompts"] = NoPrompts(self.missing_text)
        elif self.text is not None:
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


def read_parts(
    folders: Mapping[str, Path], settings: Mapping[str, Any] = MappingProxyType({}), loras: LoraFiles | None = None
) -> LatentParts:
    """Read the parts of a pipeline from their folders by name; every file is checked before it is used.

    Args:
        folders: of the parts.
        settings: of the pipeline, of which ``force_zeros_for_empty_prompt`` is read.
        loras: what is added to the weights of the text encoders.

    Raises:
        CheckpointError: a file is missing or wrong, a tokenizer is missing, or a library of the extra ``[latent]``.
    """
    decoder, encoder = None, None
    for name in _AUTOENCODERS:
        if name in folders:
            decoder, encoder = coders(*_read_part(folders[name]))
    texts = {}
    for name, tokenizer in TOKENIZERS.items():
        if name in folders:
            if tokenizer not in folders:
                raise CheckpointError(f"{folders[name]} has no tokenizer: the folder {tokenizer!r} is missing")
            texts[name] = TextPart(folders[tokenizer], *_read_part(folders[name]))
    zeros = settings.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise CheckpointError(f"force_zeros_for_empty_prompt must be true or false, got {zeros!r:.100}")
    # Of SDXL alone, which has a pooled text, no prompt is zeros, unless its pipeline says otherwise.
    return LatentParts(decoder, encoder, text_encoder(texts, loras, zeros=zeros and "text_encoder_2" in folders))


def coders(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LatentDecoder, LatentEncoder]:
    """The two halves of an autoencoder.

    Raises:
        CheckpointError: config or tensors do not fit, or diffusers is missing.
    """
    autoencoder = autoencoder_from(config, tensors)
    space = latent_space(checked_config(config)[1])
    return LatentDecoder(autoencoder, space), LatentEncoder(autoencoder, space)


def text_encoder(texts: Mapping[str, TextPart], loras: LoraFiles | None, *, zeros: bool) -> TextEncoder | None:
    """The text encoders of a pipeline by their names, with LoRA files added; None if there are none.

    Raises:
        CheckpointError: what does not fit, in a file of LoRA too.
    """
    if loras:
        states = loras.merged_texts({name: part.tensors for name, part in texts.items()})
        texts = {name: replace(part, tensors=states[name]) for name, part in texts.items()}
    return TextEncoder.from_parts(*texts.values(), zeros_for_empty=zeros) if texts else None


def _read_part(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A part's config and its weights by name."""
    config = read_object(folder / "config.json")
    with opened(find_weights(folder)) as stored:
        return config, {name: one.read().clone() for name, one in stored.items()}
