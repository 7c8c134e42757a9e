"""What a UNet is made of: the fields of a diffusers ``UNet2DModel`` config, each checked before anything is built."""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stepfusion.errors import CheckpointError
from stepfusion.networks.rules import (
    BOOLEAN,
    EMA_KEYS,
    Rule,
    choice,
    height_and_width,
    integer,
    number,
    optional,
    per_level,
    refusal,
)

MAX_CHANNELS = 16_384
MAX_LAYERS = 32
MAX_LEVELS = 16
MAX_SIZE = 65_536
MAX_PARAMETERS = 10_000_000_000

_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
_OLD_PREFIX = "UNetRes"  # of the block types' names before diffusers 0.3


@dataclass(frozen=True)
class UNet2DConfig:
    """The configuration of a `UNet2D`, with the names, meanings and defaults of diffusers' ``UNet2DModel``.

    A missing `attention_head_dim` means heads of 8 channels; ``None`` means one head over all channels. With
    ``class_embed_type="timestep"``, `num_class_embeds` is the number of labels, each embedded as a timestep is.

    Raises:
        CheckpointError: a field has a wrong type or value, or fields contradict each other; the sentence names the
            field, what was given and what is accepted.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):
                value = tuple(_block_name(entry) for entry in value) if "block_types" in field.name else tuple(value)
                object.__setattr__(self, field.name, value)
            rule = _RULES[field.name]
            if not rule.holds(value):
                raise refusal(field.name, value, rule.accepts)
        _check_levels(self)
        _check_embeddings(self)
        count = self.parameter_count
        if count > MAX_PARAMETERS:
            limit = f"{MAX_PARAMETERS:,}"
            raise CheckpointError(f"the UNet config describes {count:,} parameters; accepted are at most {limit}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNet2DConfig":
        """Read the dict of a diffusers ``config.json``; keys that start with ``_`` are notes and are skipped, and so
        is what an ``EMAModel`` says of its average.

        Raises:
            CheckpointError: an unknown key, a wrong value (see the class), or the config of another model class.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"a UNet config is {reprlib.repr(config)}; accepted is a JSON object")
        name = config.get("_class_name", "UNet2DModel")
        if name != "UNet2DModel":
            raise refusal("_class_name", name, "'UNet2DModel'")
        given = {
            str(key): value for key, value in config.items() if not str(key).startswith("_") and key not in EMA_KEYS
        }
        known = {field.name for field in fields(cls)}
        unknown = sorted(given.keys() - known)
        if unknown:
            key, accepted = reprlib.repr(unknown[0]), ", ".join(sorted(known))
            raise CheckpointError(f"the UNet config has the unknown key {key}; accepted are {accepted}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return the dict that diffusers reads back as a ``UNet2DModel`` config (JSON types only)."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"_class_name": "UNet2DModel", **values}

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding: four times the first level's channels unless given."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def num_levels(self) -> int:
        """Resolutions that the UNet works at; height and width are multiples of ``2 ** (num_levels - 1)``."""
        return len(self.block_out_channels)

    @property
    def num_classes(self) -> int | None:
        """Number of labels that the network takes; None if it takes none, or does not say how many."""
        return self.num_class_embeds if self.class_embed_type != "identity" else None

    @property
    def class_embedding_rows(self) -> int | None:
        """Rows of the class embedding table; None without one (diffusers lets other types of embedding win)."""
        return self.num_class_embeds if self.class_embed_type is None else None

    def resamples_by_resnet(self, block_type: str) -> bool:
        """True for a block that changes the resolution by a residual block and not by a convolution."""
        if block_type.startswith("Resnet"):
            return True
        kind = self.downsample_type if "Down" in block_type else self.upsample_type
        return "Attn" in block_type and kind == "resnet"

    def head_dim(self, channels: int) -> int:
        """Channels of one attention head in a block of `channels`."""
        return channels if self.attention_head_dim is None else self.attention_head_dim

    @property
    def mid_attention_groups(self) -> int | None:
        """Groups of the middle attention's GroupNorm; ``None``: it has no norm (the scale-shift default)."""
        if self.attn_norm_num_groups is not None:
            return self.attn_norm_num_groups
        return self.norm_num_groups if self.resnet_time_scale_shift == "default" else None

    @property
    def parameter_count(self) -> int:
        """Number of parameters, by arithmetic alone: nothing is allocated."""
        return _count_parameters(self)


_RULES: dict[str, Rule] = {
    "sample_size": optional(height_and_width(MAX_SIZE)),
    "in_channels": integer(1, MAX_CHANNELS),
    "out_channels": integer(1, MAX_CHANNELS),
    "center_input_sample": BOOLEAN,
    "time_embedding_type": choice("positional", "learned"),
    "time_embedding_dim": optional(integer(1, 4 * MAX_CHANNELS)),
    "freq_shift": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "flip_sin_to_cos": BOOLEAN,
    "down_block_types": per_level(choice(*_DOWN_BLOCKS), MAX_LEVELS),
    "mid_block_type": optional(choice("UNetMidBlock2D")),
    "up_block_types": per_level(choice(*_UP_BLOCKS), MAX_LEVELS),
    "block_out_channels": per_level(integer(1, MAX_CHANNELS), MAX_LEVELS),
    "layers_per_block": integer(1, MAX_LAYERS),
    "mid_block_scale_factor": number("a number above 0, up to 1000", lambda value: 0 < value <= 1000),
    "downsample_padding": integer(0, 1),
    "downsample_type": choice("conv", "resnet"),
    "upsample_type": choice("conv", "resnet"),
    "dropout": number("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "act_fn": choice("silu", "swish", "mish", "gelu", "relu"),
    "attention_head_dim": optional(integer(1, MAX_CHANNELS)),
    "norm_num_groups": integer(1, MAX_CHANNELS),
    "attn_norm_num_groups": optional(integer(1, MAX_CHANNELS)),
    "norm_eps": number("a number above 0, up to 1", lambda value: 0 < value <= 1),
    "resnet_time_scale_shift": choice("default", "scale_shift"),
    "add_attention": BOOLEAN,
    "class_embed_type": optional(choice("timestep", "identity")),
    "num_class_embeds": optional(integer(1, 1_000_000)),
    "num_train_timesteps": optional(integer(1, 1_000_000)),
}


def _check_levels(config: UNet2DConfig) -> None:
    """Hold the per-level lists, the sample size and the group and head sizes against each other."""
    levels = config.num_levels
    for key in ("down_block_types", "up_block_types"):
        types = getattr(config, key)
        if len(types) != levels:
            raise refusal(key, types, f"a list of {levels} entries, one for each of block_out_channels")
    sizes = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,)
    if any(size is not None and size % 2 ** (levels - 1) for size in sizes):
        raise refusal("sample_size", config.sample_size, f"a multiple of {2 ** (levels - 1)}, with {levels} levels")
    if any(channels % config.norm_num_groups for channels in config.block_out_channels):
        channels = list(config.block_out_channels)
        raise refusal("norm_num_groups", config.norm_num_groups, f"a divisor of every block_out_channels {channels}")
    last = config.block_out_channels[-1]
    if last % (config.attn_norm_num_groups or 1):
        raise refusal("attn_norm_num_groups", config.attn_norm_num_groups, f"null or a divisor of {last}")
    attended = _attended_channels(config)
    if attended and config.attention_head_dim is not None and config.attention_head_dim > min(attended):
        raise refusal("attention_head_dim", config.attention_head_dim, f"null or at most {min(attended)}")


def _attended_channels(config: UNet2DConfig) -> set[int]:
    """Return the widths of all blocks that attend."""
    down = zip(config.block_out_channels, config.down_block_types, strict=True)
    up = zip(reversed(config.block_out_channels), config.up_block_types, strict=True)
    attended = {channels for channels, kind in (*down, *up) if "Attn" in kind}
    if config.mid_block_type is not None and config.add_attention:
        attended.add(config.block_out_channels[-1])
    return attended


def _check_embeddings(config: UNet2DConfig) -> None:
    """Refuse embeddings that have no size: a sinusoid without frequencies, a table without rows."""
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise refusal("num_train_timesteps", None, "an integer, since time_embedding_type is 'learned'")
    if config.time_embedding_type == "positional" and config.block_out_channels[0] // 2 <= config.freq_shift:
        raise refusal("freq_shift", config.freq_shift, "below half of the first of block_out_channels")


def _count_parameters(config: UNet2DConfig) -> int:
    """Sum the sizes of every weight and bias, level by level as `UNet2D` builds them."""
    channels, layers, width = config.block_out_channels, config.layers_per_block, config.time_embed_dim
    first, last = channels[0], channels[-1]
    mlp = _affine(first, width) + _affine(width, width)
    total = _affine(9 * config.in_channels, first) + 2 * first + _affine(9 * first, config.out_channels) + mlp
    if config.time_embedding_type == "learned":
        total += first * (config.num_train_timesteps or 0)
    if config.class_embed_type == "timestep":
        total += mlp
    total += width * (config.class_embedding_rows or 0)
    if config.mid_block_type is not None:
        total += 2 * _resnet(config, last, last)
        total += _attention(config, last, config.mid_attention_groups) if config.add_attention else 0
    for level, (size, kind) in enumerate(zip(channels, config.down_block_types, strict=True)):
        total += _resnet(config, channels[max(level - 1, 0)], size) + (layers - 1) * _resnet(config, size, size)
        total += _block_extras(config, size, kind, layers, level < len(channels) - 1)
    for level, (size, kind) in enumerate(zip(reversed(channels), config.up_block_types, strict=True)):
        below = channels[min(len(channels) - level, len(channels) - 1)]
        above = channels[max(len(channels) - level - 2, 0)]
        total += _resnet(config, below + size, size) + (layers - 1) * _resnet(config, 2 * size, size)
        total += _resnet(config, size + above, size)
        total += _block_extras(config, size, kind, layers + 1, level < len(channels) - 1)
    return total


def _affine(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _resnet(config: UNet2DConfig, inputs: int, outputs: int) -> int:
    projected = outputs if config.resnet_time_scale_shift == "default" else 2 * outputs
    shortcut = _affine(inputs, outputs) if inputs != outputs else 0
    norms, convs = 2 * inputs + 2 * outputs, _affine(9 * inputs, outputs) + _affine(9 * outputs, outputs)
    return norms + convs + _affine(config.time_embed_dim, projected) + shortcut


def _attention(config: UNet2DConfig, channels: int, groups: int | None) -> int:
    inner = channels // config.head_dim(channels) * config.head_dim(channels)
    return (2 * channels if groups is not None else 0) + 3 * _affine(channels, inner) + _affine(inner, channels)


def _block_extras(config: UNet2DConfig, size: int, kind: str, layers: int, resamples: bool) -> int:
    attention = layers * _attention(config, size, config.norm_num_groups) if "Attn" in kind else 0
    if not resamples:
        return attention
    by_resnet = config.resamples_by_resnet(kind)
    return attention + (_resnet(config, size, size) if by_resnet else _affine(9 * size, size))


def _block_name(name: object) -> object:
    """A block type by its name of today."""
    return name.removeprefix(_OLD_PREFIX) if isinstance(name, str) else name
