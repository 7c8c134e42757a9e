"""What a DiT is made of: the fields of a diffusers ``DiTTransformer2DModel`` config, checked before use.

Two fields are ours: `freq_shift`, in which diffusers and the authors differ, and `shared_embeddings`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stepfusion import _checks
from stepfusion.errors import CheckpointError
from stepfusion.networks.unet2d.config import MAX_CHANNELS, MAX_PARAMETERS, MAX_SIZE

FREQUENCIES = 256  # channels of the sinusoid of a timestep
_MLP_RATIO = 4
_CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")
_MAX_BLOCKS = 1024
#: Fields with one accepted value: nothing else is implemented.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "upcast_attention": False,
}
#: What configs of ``Transformer2DModel``, the class of the published checkpoints, say of parts that a DiT lacks.
_ABSENT: dict[str, Any] = {
    **dict.fromkeys(("cross_attention_dim", "num_vector_embeds", "caption_channels", "interpolation_scale")),
    **dict.fromkeys(("only_cross_attention", "double_self_attention", "use_linear_projection"), False),
    "use_additional_conditions": None,
    "attention_type": "default",
}
#: Ours; a config says nothing of them where they have these values, which diffusers' DiT has.
_OURS: dict[str, Any] = {"freq_shift": 1, "shared_embeddings": False}


@dataclass(frozen=True)
class DiTConfig:
    """The configuration of a `DiT`, with the names, meanings and defaults of diffusers' ``DiTTransformer2DModel``.

    Attributes:
        num_attention_heads, attention_head_dim: their product is D, the width, a multiple of 4.
        in_channels, out_channels: C, and the channels of the output: C, if None, or 2 C with a learned variance.
        num_layers: L, blocks.
        dropout: in training, after attention and inside the MLP.
        norm_num_groups: has no effect.
        attention_bias: whether queries, keys and values have biases.
        sample_size: height and width of an image, a multiple of `patch_size`.
        patch_size: height and width of a patch, p; an image is ``(sample_size / p) ** 2`` tokens.
        num_embeds_ada_norm: labels, without the null label, which is one more.
        norm_eps: of the norm before an MLP; the other norms have 1e-6, which the authors have everywhere.
        activation_fn, norm_type, norm_elementwise_affine, upcast_attention: have one accepted value each.
        freq_shift: the sinusoid of a timestep has the frequencies ``10000 ** (-i / (128 - freq_shift))``: 1 in
            diffusers, 0 in the authors' code.
        shared_embeddings: all blocks have one embedding of timestep and label, as the authors', which the state dict
            has once for each block. It saves their memory and L - 1 of L computations; outputs are the same.

    Raises:
        CheckpointError: a field has a wrong type or value, or fields contradict each other; the sentence names the
            field, what was given and what is accepted.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    freq_shift: int = 1
    shared_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in _FIXED.items():
            _check_fixed(name, getattr(self, name), value)
        try:
            self._check_fields()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the DiT config is refused: {error}") from None
        if self.width % 4:
            accepted = "a number whose product with num_attention_heads is a multiple of 4"
            raise _refusal("attention_head_dim", self.attention_head_dim, accepted)
        if self.width > MAX_CHANNELS:
            accepted = f"a number whose product with num_attention_heads is at most {MAX_CHANNELS}"
            raise _refusal("attention_head_dim", self.attention_head_dim, accepted)
        if self.sample_size % self.patch_size:
            raise _refusal("sample_size", self.sample_size, f"a multiple of {self.patch_size}, the patch_size")
        if (count := self.parameter_count) > MAX_PARAMETERS:
            limit = f"{MAX_PARAMETERS:,}"
            raise CheckpointError(f"the DiT config describes {count:,} parameters; accepted are at most {limit}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiTConfig:
        """Read the dict of a diffusers ``config.json``; keys that start with ``_`` are notes and are skipped.

        Configs of ``Transformer2DModel`` are accepted too, if they have `patch_size` and no part that a DiT lacks.

        Raises:
            CheckpointError: an unknown key, a wrong value (see the class), or the config of another model class.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"a DiT config is {reprlib.repr(config)}; accepted is a JSON object")
        name = config.get("_class_name", _CLASS_NAMES[0])
        if name not in _CLASS_NAMES:
            raise _refusal("_class_name", name, " or ".join(map(repr, _CLASS_NAMES)))
        given = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
        if name == _CLASS_NAMES[1]:
            for key in _DIFFERENT_DEFAULTS:
                if key not in given:
                    raise CheckpointError(f"the DiT config lacks {key}, which is needed with _class_name = {name!r}")
        for key in [key for key in given if key in _ABSENT]:
            _check_fixed(key, given.pop(key), _ABSENT[key])
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            key, accepted = reprlib.repr(unknown[0]), ", ".join(sorted(known))
            raise CheckpointError(f"the DiT config has the unknown key {key}; accepted are {accepted}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, JSON types only; what is ours only where diffusers' DiT differs from it."""
        values = {key: value for key, value in asdict(self).items() if key not in _OURS or value != _OURS[key]}
        return {"_class_name": _CLASS_NAMES[0], **values}

    @property
    def width(self) -> int:
        """D, channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Channels between the layers of an MLP, 4 D."""
        return _MLP_RATIO * self.width

    @property
    def grid(self) -> int:
        """Patches along the height and along the width of an image."""
        return self.sample_size // self.patch_size

    @property
    def output_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def embeddings(self) -> int:
        """How many embeddings of timestep and label there are: one, or one a block."""
        return 1 if self.shared_embeddings else self.num_layers

    @property
    def parameter_count(self) -> int:
        """Number of parameters, by arithmetic alone: nothing is allocated."""
        d, pixels = self.width, self.patch_size**2
        embedding = (FREQUENCIES + 1) * d + (d + 1) * d + (self.num_embeds_ada_norm + 1) * d
        attention = 4 * d * d + (4 if self.attention_bias else 1) * d
        mlp = 2 * d * self.mlp_width + self.mlp_width + d
        block = attention + mlp + 6 * (d + 1) * d
        last = 2 * (d + 1) * d + (d + 1) * pixels * self.output_channels
        return (self.in_channels * pixels + 1) * d + self.embeddings * embedding + self.num_layers * block + last

    def _check_fields(self) -> None:
        """TypeError or ValueError naming the field."""
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "norm_num_groups"):
            _checks.integer(name, getattr(self, name), 1, MAX_CHANNELS)
        if self.out_channels is not None:
            _checks.integer("out_channels", self.out_channels, 1, MAX_CHANNELS)
        _checks.integer("num_layers", self.num_layers, 1, _MAX_BLOCKS)
        _checks.number("dropout", self.dropout, 0.0, 1.0)
        _checks.boolean("attention_bias", self.attention_bias)
        for name in ("sample_size", "patch_size"):
            _checks.integer(name, getattr(self, name), 1, MAX_SIZE)
        _checks.integer("num_embeds_ada_norm", self.num_embeds_ada_norm, 1, 1_000_000)
        _checks.number("norm_eps", self.norm_eps, 0.0, 1.0, open_low=True)
        _checks.integer("freq_shift", self.freq_shift, 0, 1)
        _checks.boolean("shared_embeddings", self.shared_embeddings)


#: Fields that ``Transformer2DModel`` gives another default than a DiT has.
_DIFFERENT_DEFAULTS = (
    *("attention_head_dim", "in_channels", "num_layers", "attention_bias", "sample_size", "patch_size"),
    *("activation_fn", "num_embeds_ada_norm", "norm_type", "norm_elementwise_affine"),
)


def _check_fixed(key: str, value: object, accepted: object) -> None:
    """CheckpointError unless a field has the one value that is implemented; 0 is not False."""
    if value != accepted or type(value) is not type(accepted):
        word = "null" if accepted is None else str(accepted).lower() if isinstance(accepted, bool) else repr(accepted)
        raise _refusal(key, value, f"{word} (nothing else is implemented)")


def _refusal(key: str, value: object, accepts: str) -> CheckpointError:
    return CheckpointError(f"the DiT config has {key} = {reprlib.repr(value)}; accepted is {accepts}")
