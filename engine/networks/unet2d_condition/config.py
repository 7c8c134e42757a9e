"""What a conditioned UNet is made of: the fields of a diffusers ``UNet2DConditionModel`` config, each checked."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from stepfusion.errors import CheckpointError
from stepfusion.networks.rules import (
    BOOLEAN,
    EMA_KEYS,
    Rule,
    choice,
    for_all_or_per_level,
    height_and_width,
    integer,
    number,
    optional,
    per_level,
    refusal,
)
from stepfusion.networks.unet2d.config import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, MAX_PARAMETERS, MAX_SIZE

_MAX_DEPTH = 64
#: What diffusers also knows, and what each is where it has no effect; nothing else is implemented.
_NOT_IMPLEMENTED: dict[str, object] = {
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": False,
    "num_attention_heads": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


@dataclass(frozen=True)
class Level:
    """One level of the UNet, on the way down, in the middle or on the way up.

    Attributes:
        channels: of its output.
        inputs: channels of the input of each residual block; on the way up with those of what the way down left.
        transformers: one behind each of the first so many residual blocks.
        heads, depth: of a transformer: of its attentions, and its blocks.
        only_cross: the first attention of such a block attends to the text, too, and not to the image.
        resamples: whether the level ends with another resolution.
    """

    channels: int
    inputs: tuple[int, ...]
    transformers: int
    heads: int
    depth: int
    only_cross: bool = False
    resamples: bool = False


@dataclass(frozen=True)
class UNet2DConditionConfig:
    """The configuration of a `UNet2DCondition`: names, meanings and defaults of diffusers' ``UNet2DConditionModel``.

    `attention_head_dim` is the number of heads, as it is in diffusers. `upcast_attention` has no effect: softmax is
    in float32 at least, whatever it says. `layers_per_block`, `attention_head_dim`, `transformer_layers_per_block`
    and `only_cross_attention` hold for all levels, or are lists with an entry for each.

    Raises:
        CheckpointError: a field has a wrong type or value, or fields contradict each other; the sentence names the
            field, what was given and what is accepted.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False
    time_embedding_dim: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):
                value = tuple(value)
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
    def from_dict(cls, config: Mapping[str, Any]) -> UNet2DConditionConfig:
        """Read the dict of a diffusers ``config.json``; keys that start with ``_`` are notes and are skipped, and so
        is what an ``EMAModel`` says of its average.

        Raises:
            CheckpointError: an unknown key, a wrong value (see the class), something that is not implemented, or the
                config of another model class.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"a UNet config is {reprlib.repr(config)}; accepted is a JSON object")
        name = config.get("_class_name", "UNet2DConditionModel")
        if name != "UNet2DConditionModel":
            raise refusal("_class_name", name, "'UNet2DConditionModel'")
        known = {field.name for field in fields(cls)}
        given = {}
        for key, value in config.items():
            if str(key).startswith("_") or key in EMA_KEYS:
                continue
            if key in known:
                given[str(key)] = value
            elif key not in _NOT_IMPLEMENTED:
                accepted = ", ".join(sorted(known | _NOT_IMPLEMENTED.keys()))
                raise CheckpointError(
                    f"the UNet config has the unknown key {reprlib.repr(key)}; accepted are {accepted}"
                )
            elif value is not None and not _equal(value, _NOT_IMPLEMENTED[key]):
                raise refusal(key, value, f"{json.dumps(_NOT_IMPLEMENTED[key])} (nothing else is implemented)")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return the dict that diffusers reads back as a ``UNet2DConditionModel`` config (JSON types only)."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"_class_name": "UNet2DConditionModel", **values}

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding: four times the first level's channels unless given."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def resnet_time_scale_shift(self) -> str:
        """How residual blocks take the time: it is added to their channels."""
        return "default"

    @property
    def num_levels(self) -> int:
        """Resolutions that the UNet works at; height and width are multiples of ``2 ** (num_levels - 1)``."""
        return len(self.block_out_channels)

    @property
    def takes_labels(self) -> bool:
        """Whether there is a class embedding."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def down_levels(self) -> tuple[Level, ...]:
        """The levels on the way down, from the top."""
        levels, channels = [], self.block_out_channels
        for index, kind in enumerate(self.down_block_types):
            inputs = [channels[max(index - 1, 0)], *self._widths(index)][:-1]
            levels.append(self._level(index, kind, inputs, index < self.num_levels - 1))
        return tuple(levels)

    @property
    def mid_level(self) -> Level | None:
        """The middle, if there is one: two residual blocks, the first with a transformer."""
        if self.mid_block_type is None:
            return None
        last = self.num_levels - 1
        channels = self.block_out_channels[last]
        heads, depth = self._entry("attention_head_dim", last), self._entry("transformer_layers_per_block", last)
        return Level(channels, (channels, channels), 1, heads, depth)

    @property
    def up_levels(self) -> tuple[Level, ...]:
        """The levels on the way up, from the bottom: each with one residual block more than on the way down."""
        levels, channels = [], self.block_out_channels
        for index, kind in zip(reversed(range(self.num_levels)), self.up_block_types, strict=True):
            states = [channels[min(index + 1, self.num_levels - 1)], *self._widths(index)]
            skips = [*self._widths(index), channels[max(index - 1, 0)]]
            inputs = [state + skip for state, skip in zip(states, skips, strict=True)]
            levels.append(self._level(index, kind, inputs, index > 0))
        return tuple(levels)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, by arithmetic alone: nothing is allocated."""
        return _count_parameters(self)

    def _widths(self, index: int) -> list[int]:
        """Channels of the outputs of a level's residual blocks on the way down."""
        return [self.block_out_channels[index]] * self._entry("layers_per_block", index)

    def _level(self, index: int, kind: str, inputs: Sequence[int], resamples: bool) -> Level:
        return Level(
            self.block_out_channels[index],
            tuple(inputs),
            len(inputs) if "CrossAttn" in kind else 0,
            self._entry("attention_head_dim", index),
            self._entry("transformer_layers_per_block", index),
            bool(self._entry("only_cross_attention", index)),
            resamples,
        )

    def _entry(self, key: str, level: int) -> int:
        """What holds at a level, counted from the top."""
        value = getattr(self, key)
        entry: int = value[level] if isinstance(value, tuple) else value
        return entry


_LEVELS = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block", "only_cross_attention")
_DIMENSION = integer(1, 4 * MAX_CHANNELS)

_RULES: dict[str, Rule] = {
    "sample_size": optional(height_and_width(MAX_SIZE)),
    "in_channels": integer(1, MAX_CHANNELS),
    "out_channels": integer(1, MAX_CHANNELS),
    "flip_sin_to_cos": BOOLEAN,
    "freq_shift": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "down_block_types": per_level(choice("DownBlock2D", "CrossAttnDownBlock2D"), MAX_LEVELS),
    "mid_block_type": optional(choice("UNetMidBlock2DCrossAttn")),
    "up_block_types": per_level(choice("UpBlock2D", "CrossAttnUpBlock2D"), MAX_LEVELS),
    "only_cross_attention": for_all_or_per_level(BOOLEAN, MAX_LEVELS),
    "block_out_channels": per_level(integer(1, MAX_CHANNELS), MAX_LEVELS),
    "layers_per_block": for_all_or_per_level(integer(1, MAX_LAYERS), MAX_LEVELS),
    "downsample_padding": integer(0, 1),
    "mid_block_scale_factor": number("a number above 0, up to 1000", lambda value: 0 < value <= 1000),
    "dropout": number("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "act_fn": choice("silu", "swish"),
    "norm_num_groups": integer(1, MAX_CHANNELS),
    "norm_eps": number("a number above 0, up to 1", lambda value: 0 < value <= 1),
    "cross_attention_dim": _DIMENSION,
    "transformer_layers_per_block": for_all_or_per_level(integer(0, _MAX_DEPTH), MAX_LEVELS),
    "attention_head_dim": for_all_or_per_level(integer(1, MAX_CHANNELS), MAX_LEVELS),
    "use_linear_projection": BOOLEAN,
    "class_embed_type": optional(choice("timestep")),
    "num_class_embeds": optional(integer(1, 1_000_000)),
    "addition_embed_type": optional(choice("text_time")),
    "addition_time_embed_dim": optional(_DIMENSION),
    "projection_class_embeddings_input_dim": optional(_DIMENSION),
    "upcast_attention": optional(BOOLEAN),
    "time_embedding_dim": optional(_DIMENSION),
}


def _equal(value: object, wanted: object) -> bool:
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _check_levels(config: UNet2DConditionConfig) -> None:
    """Hold the per-level lists, the sample size, the groups and the heads against each other."""
    levels = config.num_levels
    for key in ("down_block_types", "up_block_types", *_LEVELS):
        value = getattr(config, key)
        if isinstance(value, tuple) and len(value) != levels:
            raise refusal(key, value, f"a list of {levels} entries, one for each of block_out_channels")
    sizes = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,)
    factor = 2 ** (levels - 1)
    if any(size is not None and size % factor for size in sizes):
        raise refusal("sample_size", config.sample_size, f"a multiple of {factor}, with {levels} levels")
    if any(channels % config.norm_num_groups for channels in config.block_out_channels):
        channels = list(config.block_out_channels)
        raise refusal("norm_num_groups", config.norm_num_groups, f"a divisor of every block_out_channels {channels}")
    for level in (*config.down_levels, *config.up_levels, config.mid_level):
        if level is not None and level.transformers and level.channels % level.heads:
            accepted = f"a divisor of {level.channels} channels where there is attention: the number of heads"
            raise refusal("attention_head_dim", config.attention_head_dim, accepted)


def _check_embeddings(config: UNet2DConditionConfig) -> None:
    """Refuse embeddings that have no size: sinusoids without frequencies, and added ones that are not described."""
    first = config.block_out_channels[0] // 2
    if config.addition_embed_type is not None:
        ids, both = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
        if ids is None:
            raise refusal("addition_time_embed_dim", ids, "an integer, since addition_embed_type is 'text_time'")
        if both is None or both <= ids:
            accepted = f"an integer above addition_time_embed_dim, {ids}"
            raise refusal("projection_class_embeddings_input_dim", both, accepted)
        first = min(first, ids // 2)
    if first <= config.freq_shift:
        raise refusal("freq_shift", config.freq_shift, "below half of the channels of every sinusoid")


def _count_parameters(config: UNet2DConditionConfig) -> int:
    """Sum the sizes of every weight and bias, level by level as `UNet2DCondition` builds them."""
    channels, width = config.block_out_channels, config.time_embed_dim
    top = channels[0]
    total = _affine(9 * config.in_channels, top) + 2 * top + _affine(9 * top, config.out_channels)
    total += _mlp(top, width)
    if config.class_embed_type is not None:
        total += _mlp(top, width)
    elif config.num_class_embeds is not None:
        total += width * config.num_class_embeds
    if config.addition_embed_type is not None:
        total += _mlp(config.projection_class_embeddings_input_dim or 0, width)
    for level in (*config.down_levels, config.mid_level, *config.up_levels):
        if level is not None:
            total += sum(_resnet(width, inputs, level.channels) for inputs in level.inputs)
            total += level.transformers * _transformer(config, level)
            total += _affine(9 * level.channels, level.channels) if level.resamples else 0
    return total


def _affine(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _mlp(inputs: int, width: int) -> int:
    return _affine(inputs, width) + _affine(width, width)


def _resnet(width: int, inputs: int, outputs: int) -> int:
    shortcut = _affine(inputs, outputs) if inputs != outputs else 0
    norms, convs = 2 * inputs + 2 * outputs, _affine(9 * inputs, outputs) + _affine(9 * outputs, outputs)
    return norms + convs + _affine(width, outputs) + shortcut


def _transformer(config: UNet2DConditionConfig, level: Level) -> int:
    size, text = level.channels, config.cross_attention_dim
    queries_and_outputs, norms = 2 * (size * size + _affine(size, size)), 6 * size
    keys_and_values = 2 * size * ((text if level.only_cross else size) + text)
    feed_forward = _affine(size, 8 * size) + _affine(4 * size, size)
    block = norms + queries_and_outputs + keys_and_values + feed_forward
    return 2 * size + 2 * _affine(size, size) + level.depth * block
