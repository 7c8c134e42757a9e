"""What an ADM UNet is made of, under the names of guided-diffusion's command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from stepfusion import _checks
from stepfusion.networks.unet2d.config import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, MAX_SIZE

GROUPS = 32

#: Channels of each level as multiples of ``num_channels``, where ``channel_mult`` is None (Dhariwal & Nichol 2021).
CHANNEL_MULTS: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


@dataclass(frozen=True)
class ADMUNetConfig:
    """The configuration of an `ADMUNet`; the defaults are those of guided-diffusion's scripts.

    Attributes:
        image_size: height and width, a multiple of 2 for each level but the last.
        num_channels: the channels that `channel_mult` multiplies; every product is a multiple of 32.
        num_res_blocks: residual blocks a level, one more on the way up.
        channel_mult: an entry a level; None takes the published one of this image size.
        attention_resolutions: heights at which there is attention: at the level whose images are ``image_size //
            size`` times smaller, if there is one; the middle always attends.
        in_channels: of x. The output has as many, or twice as many with `learn_sigma`.
        learn_sigma: the network returns its variance too (Nichol & Dhariwal 2021, equation 15).
        class_cond, num_classes: whether it takes labels, and how many there are.
        num_heads, num_heads_upsample: heads of every attention, and on the way up (None: the same).
        num_head_channels: channels of a head instead, or None.
        use_scale_shift_norm: time scales and shifts the second norm of a block instead of being added before it.
        resblock_updown: residual blocks change the resolution instead of convolutions.
        dropout: in training.
        timestep_scale: what timesteps are multiplied with before their embedding (1000 / T with
            ``rescale_timesteps``).

    Raises:
        TypeError, ValueError: naming the field.
    """

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: tuple[float, ...] | None = None
    attention_resolutions: tuple[int, ...] = (16, 8)
    in_channels: int = 3
    learn_sigma: bool = False
    class_cond: bool = False
    num_classes: int = 1000
    num_heads: int = 4
    num_heads_upsample: int | None = None
    num_head_channels: int | None = None
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    dropout: float = 0.0
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.integer("image_size", self.image_size, 1, MAX_SIZE)
        for name, high in (("num_channels", MAX_CHANNELS), ("num_res_blocks", MAX_LAYERS), ("in_channels", 1024)):
            _checks.integer(name, getattr(self, name), 1, high)
        _checks.integer("num_classes", self.num_classes, 1, 1 << 20)
        _checks.integer("num_heads", self.num_heads, 1, MAX_CHANNELS)
        for name in ("num_heads_upsample", "num_head_channels"):
            if getattr(self, name) is not None:
                _checks.integer(name, getattr(self, name), 1, MAX_CHANNELS)
        for name in (field.name for field in fields(self) if field.type == "bool"):
            _checks.boolean(name, getattr(self, name))
        _checks.number("dropout", self.dropout, 0.0, 1.0)
        _checks.number("timestep_scale", self.timestep_scale, 0.0, 1e6, open_low=True)
        self._check_levels()
        self._check_attention()

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(factor * self.num_channels) for factor in self._mults)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.num_channels

    def attends(self, level: int) -> bool:
        """Whether there is attention at a level, counted from 0, the largest."""
        return 2**level in {self.image_size // size for size in self.attention_resolutions}

    @property
    def _mults(self) -> tuple[float, ...]:
        return CHANNEL_MULTS[self.image_size] if self.channel_mult is None else self.channel_mult

    def _check_levels(self) -> None:
        if self.channel_mult is None and self.image_size not in CHANNEL_MULTS:
            sizes = ", ".join(map(str, CHANNEL_MULTS))
            raise ValueError(f"channel_mult is needed for image_size {self.image_size}: only {sizes} have a default")
        if self.channel_mult is not None:
            object.__setattr__(self, "channel_mult", _sequence("channel_mult", self.channel_mult))
            for factor in self.channel_mult:
                _checks.number("channel_mult", factor, 0.0, MAX_CHANNELS, open_low=True)
        if len(self._mults) > MAX_LEVELS:
            raise ValueError(f"channel_mult must have at most {MAX_LEVELS} entries, got {len(self._mults)}")
        for width in self.channels:
            if width % GROUPS or not 0 < width <= MAX_CHANNELS:
                raise ValueError(
                    f"num_channels times channel_mult must be multiples of {GROUPS} up to {MAX_CHANNELS}, got {width}"
                )
        if self.num_channels % 2:
            raise ValueError(f"num_channels must be even, got {self.num_channels}")
        factor = 2 ** (len(self._mults) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"image_size must be a multiple of {factor}, for there are {len(self._mults)} levels, "
                f"got {self.image_size}"
            )

    def _check_attention(self) -> None:
        resolutions = _sequence("attention_resolutions", self.attention_resolutions, empty=True)
        object.__setattr__(self, "attention_resolutions", resolutions)
        for size in self.attention_resolutions:
            _checks.integer("attention_resolutions", size, 1, MAX_SIZE)
        attended = {width for level, width in enumerate(self.channels) if self.attends(level)} | {self.channels[-1]}
        divisors = {"num_head_channels": self.num_head_channels}
        if self.num_head_channels is None:
            divisors = {"num_heads": self.num_heads, "num_heads_upsample": self.num_heads_upsample}
        for name, divisor in divisors.items():
            for width in sorted(attended):
                if divisor is not None and width % divisor:
                    raise ValueError(f"{name} must divide the {width} channels of an attention, got {divisor}")


def _sequence(name: str, value: object, *, empty: bool = False) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not (empty or value):
        raise TypeError(f"{name} must be a sequence of numbers, got {value!r}")
    return tuple(value)
