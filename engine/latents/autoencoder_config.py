"""The configs of the autoencoders that are read, checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel
from stepfusion.latents.filled import settings

Channels = Annotated[int, Field(ge=1, le=1 << 13)]
Count = Annotated[int, Field(ge=1, le=64)]
Down = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
Up = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
Blocks = Annotated[list[Channels], Field(min_length=1, max_length=8)]
Scale = Annotated[float, Field(gt=0, le=1e6)]
Shift = Annotated[float, Field(ge=-1e6, le=1e6)]


class _Common(StrictModel):
    """What the autoencoders have in common; the defaults are those of diffusers."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    scaling_factor: Scale = 0.18215
    force_upcast: bool = True


class _Convolutional(_Common):
    """The autoencoders of latent diffusion (Rombach et al. 2022)."""

    down_block_types: list[Down] = Field(["DownEncoderBlock2D"])
    up_block_types: list[Up] = Field(["UpDecoderBlock2D"])
    block_out_channels: Blocks = Field([64])
    layers_per_block: Count = 1
    act_fn: Literal["silu", "swish"] = "silu"
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    sample_size: Channels | list[Channels] = 32
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        blocks = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == blocks:
            raise ValueError(
                f"down_block_types, up_block_types and block_out_channels must have the same length, got "
                f"{len(self.down_block_types)}, {len(self.up_block_types)}, {blocks}"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels must be multiples of norm_num_groups ({self.norm_num_groups}), got "
                    f"{channels}"
                )
        return self

    @property
    def factor(self) -> int:
        """How many pixels a latent pixel has along each axis."""
        return 1 << (len(self.block_out_channels) - 1)


class KLConfig(_Convolutional):
    """``AutoencoderKL`` of diffusers."""

    shift_factor: Shift | None = None
    latents_mean: Annotated[list[Shift], Field(min_length=1)] | None = None
    latents_std: Annotated[list[Scale], Field(min_length=1)] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @model_validator(mode="after")
    def _counted(self) -> Self:
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"{name} must have latent_channels ({self.latent_channels}) values, got {len(values)}"
                )
        return self


class VQConfig(_Convolutional):
    """``VQModel`` of diffusers, of those that quantise what they decode."""

    latent_channels: Channels = 3
    num_vq_embeddings: Annotated[int, Field(ge=1, le=1 << 20)] = 256
    vq_embed_dim: Channels | None = None
    norm_type: Literal["group"] = "group"
    lookup_from_codebook: Literal[False] = False
    force_upcast: bool = False


class TinyConfig(_Common):
    """``AutoencoderTiny`` of diffusers."""

    encoder_block_out_channels: Blocks = Field([64, 64, 64, 64])
    decoder_block_out_channels: Blocks = Field([64, 64, 64, 64])
    block_out_channels: Blocks | None = None
    act_fn: Literal["relu", "silu", "gelu", "mish"] = "relu"
    upsample_fn: Literal["nearest"] = "nearest"
    latent_channels: Channels = 4
    upsampling_scaling_factor: Literal[2] = 2
    num_encoder_blocks: Annotated[list[Count], Field(min_length=1, max_length=8)] = Field([1, 3, 3, 3])
    num_decoder_blocks: Annotated[list[Count], Field(min_length=1, max_length=8)] = Field([3, 3, 3, 1])
    latent_magnitude: Annotated[float, Field(gt=0)] = 3
    latent_shift: float = 0.5
    scaling_factor: Scale = 1.0
    shift_factor: Shift = 0.0
    force_upcast: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = {
            len(self.encoder_block_out_channels),
            len(self.decoder_block_out_channels),
            len(self.num_encoder_blocks),
            len(self.num_decoder_blocks),
        }
        if len(lengths) != 1:
            raise ValueError(
                f"the lists of blocks and of their channels must have the same length, got {sorted(lengths)}"
            )
        return self

    @property
    def factor(self) -> int:
        """How many pixels a latent pixel has along each axis."""
        return 1 << (len(self.num_decoder_blocks) - 1)


Config = KLConfig | VQConfig | TinyConfig
KINDS: dict[str, type[KLConfig] | type[VQConfig] | type[TinyConfig]] = {
    "AutoencoderKL": KLConfig,
    "VQModel": VQConfig,
    "AutoencoderTiny": TinyConfig,
}


@dataclass(frozen=True)
class LatentSpace:
    """How the latents of a denoiser and those of its autoencoder follow from each other, channel by channel.

    z = latents * std / scaling + mean, where a missing std is 1.

    Attributes:
        channels: of a latent.
        factor: pixels of an image along each axis for one of its latent.
        scaling: the scaling factor, which gives latents about unit variance (Rombach et al. 2022, appendix G).
        mean: of the autoencoder's latents: one number, or one for each channel.
        std: a number for each channel, or None.
    """

    channels: int
    factor: int
    scaling: float
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] | None = None


def checked_config(config: Mapping[str, Any]) -> tuple[str, Config]:
    """The class that an autoencoder's ``config.json`` names, and its settings.

    Raises:
        CheckpointError: the class is none of these, or a setting is unknown, of another type or out of range.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise CheckpointError(f"_class_name of an autoencoder must be one of {', '.join(KINDS)}, got {name!r:.100}")
    try:
        return name, KINDS[name].of(settings(config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the config of {name}: {error}") from None


def latent_space(config: Config) -> LatentSpace:
    """The latents that a config describes; shift and mean are two names of one thing (SD3, Playground v2.5)."""
    channels = config.latent_channels
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] | None = None
    if isinstance(config, KLConfig) and config.latents_mean is not None and config.latents_std is not None:
        mean, std = tuple(config.latents_mean), tuple(config.latents_std)
    elif not isinstance(config, VQConfig) and config.shift_factor is not None:
        mean = (config.shift_factor,)
    if isinstance(config, VQConfig):
        channels = config.vq_embed_dim or channels
    return LatentSpace(channels, config.factor, config.scaling_factor, mean, std)
