"""What EDM's UNets are made of (Karras et al. 2022, appendix F.2), under the names of their authors' arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from stepfusion import _checks
from stepfusion.networks.unet2d.config import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, MAX_SIZE

Resample = Literal["up", "down"]

_MAX_LABELS = 1 << 20


@dataclass(frozen=True)
class BlockPlan:
    """One residual block of a UNet.

    Attributes:
        name: under which the state dict has it, in ``enc`` or ``dec``.
        in_channels: of its input; if it `joins`, with those of what the way down left.
        out_channels: of its output.
        heads: of its attention; 0 without one.
        resample: whether it changes the resolution.
        joins: whether it takes what the way down left.
    """

    name: str
    in_channels: int
    out_channels: int
    heads: int = 0
    resample: Resample | None = None
    joins: bool = False


@dataclass(frozen=True)
class EDMUNetConfig:
    """What :class:`SongUNetConfig` and :class:`DhariwalUNetConfig` have in common.

    Attributes:
        img_resolution: height and width, or a pair of them if they differ: multiples of 2 for each level but the
            first. The state dict names a level by its height; inputs of other sizes are taken, too.
        in_channels, out_channels: of x and of the output.
        label_dim: number of classes; 0 without labels.
        augment_dim: entries of the vector that said in training how an image was augmented; 0 without one. Images
            are made as if none was, so that its weights are there and change nothing.
        model_channels: what the `channel_mult` multiply.
        channel_mult: an entry for each level.
        channel_mult_emb: width of the embedding of time and class, in `model_channels`.
        num_blocks: residual blocks of a level, one more on the way up.
        attn_resolutions: heights at which there is attention; the middle always attends.
        dropout: in training.

    Raises:
        TypeError, ValueError: naming the field.
    """

    img_resolution: int | tuple[int, int]
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1

    norm_eps: ClassVar[float]
    adaptive_scale: ClassVar[bool]
    skip_scale: ClassVar[float]
    resample_proj: ClassVar[bool]

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "model_channels", "channel_mult_emb"):
            _checks.integer(name, getattr(self, name), 1, MAX_CHANNELS)
        for name in ("label_dim", "augment_dim"):
            _checks.integer(name, getattr(self, name), 0, _MAX_LABELS)
        _checks.integer("num_blocks", self.num_blocks, 1, MAX_LAYERS)
        _checks.number("dropout", self.dropout, 0.0, 1.0)
        for name, high in (("channel_mult", MAX_CHANNELS), ("attn_resolutions", MAX_SIZE)):
            object.__setattr__(self, name, _integers(name, getattr(self, name), high))
        if not 1 <= len(self.channel_mult) <= MAX_LEVELS:
            raise ValueError(f"channel_mult must have 1 to {MAX_LEVELS} entries, got {len(self.channel_mult)}")
        if max(self.channels) > MAX_CHANNELS:
            raise ValueError(
                f"model_channels times channel_mult must be at most {MAX_CHANNELS}, got {max(self.channels)}"
            )
        object.__setattr__(self, "img_resolution", self._checked_resolution())
        self._check_channels()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.img_resolution if isinstance(self.img_resolution, tuple) else (self.img_resolution,) * 2

    @property
    def factor(self) -> int:
        """What height and width are multiples of."""
        return 1 << (len(self.channel_mult) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(mult * self.model_channels for mult in self.channel_mult)

    @property
    def emb_channels(self) -> int:
        """Width of the embedding of time and class."""
        return self.model_channels * self.channel_mult_emb

    @property
    def noise_channels(self) -> int:
        """Width of what the noise level is embedded as at first."""
        return self.model_channels

    @property
    def first_channels(self) -> int:
        """Channels of the first convolution's output."""
        return self.channels[0]

    def level_name(self, level: int) -> str:
        """What the names of a level in the state dict begin with; the largest is level 0."""
        height = self.size[0] >> level
        return f"{height}x{height}"

    def heads(self, channels: int) -> int:
        """Heads of an attention over so many channels."""
        raise NotImplementedError

    def attends_up(self, level: int, block: int) -> bool:
        """Whether a block of the way up attends."""
        return self._attends(level)

    def encoder(self) -> Iterator[tuple[int, list[BlockPlan]]]:
        """The blocks of each level on the way down, after the first convolution."""
        width = self.first_channels
        for level, out in enumerate(self.channels):
            name, plans = self.level_name(level), list[BlockPlan]()
            if level:
                plans.append(BlockPlan(f"{name}_down", width, width, resample="down"))
            for block in range(self.num_blocks):
                heads = self.heads(out) if self._attends(level) else 0
                plans.append(BlockPlan(f"{name}_block{block}", width, out, heads))
                width = out
            yield level, plans

    def decoder(self) -> Iterator[tuple[int, list[BlockPlan]]]:
        """The blocks of each level on the way up, from the lowest level on."""
        skips = [self.first_channels, *(plan.out_channels for _, plans in self.encoder() for plan in plans)]
        width, lowest = skips[-1], len(self.channels) - 1
        for level, out in reversed(list(enumerate(self.channels))):
            name = self.level_name(level)
            plans = [BlockPlan(f"{name}_up", width, width, resample="up")]
            if level == lowest:
                plans = [BlockPlan(f"{name}_in0", width, width, self.heads(width))]
                plans.append(BlockPlan(f"{name}_in1", width, width))
            for block in range(self.num_blocks + 1):
                heads = self.heads(out) if self.attends_up(level, block) else 0
                plans.append(BlockPlan(f"{name}_block{block}", width + skips.pop(), out, heads, joins=True))
                width = out
            yield level, plans

    def _attends(self, level: int) -> bool:
        return self.size[0] >> level in self.attn_resolutions

    def _checked_resolution(self) -> int | tuple[int, int]:
        given = self.img_resolution
        sizes = tuple(given) if isinstance(given, list | tuple) else (given,)
        if len(sizes) > 2 or not sizes:
            raise ValueError(f"img_resolution must be a size or (height, width), got {given!r}")
        for size in sizes:
            if _checks.integer("img_resolution", size, 1, MAX_SIZE) % self.factor:
                levels = len(self.channel_mult)
                raise ValueError(
                    f"img_resolution must be a multiple of {self.factor}, for there are {levels} levels, got {size}"
                )
        return sizes[0] if len(set(sizes)) == 1 else (sizes[0], sizes[-1])

    def _check_channels(self) -> None:
        """Every norm has whole groups, every attention whole heads, every sinusoid pairs."""
        if self.noise_channels % 2 or self.noise_channels < 4:
            raise ValueError(f"model_channels must be an even number from 4 on, got {self.model_channels}")
        for _, plans in (*self.encoder(), *self.decoder()):
            for plan in plans:
                for channels in (plan.in_channels, plan.out_channels):
                    if channels < 4 or channels % norm_groups(channels):
                        raise ValueError(
                            "model_channels times channel_mult must give norms of at least 4 channels that are a "
                            f"multiple of their {norm_groups(channels)} groups, got a norm of {channels} channels"
                        )
                if plan.heads and plan.out_channels % plan.heads:
                    raise ValueError(
                        f"model_channels times channel_mult must be a multiple of the {plan.heads} heads of an "
                        f"attention, got {plan.out_channels}"
                    )


@dataclass(frozen=True)
class SongUNetConfig(EDMUNetConfig):
    """A :class:`stepfusion.networks.SongUNet`: DDPM++ by default, NCSN++ as below (Song et al. 2021).

    Attributes:
        embedding_type: of the noise level: "positional" (DDPM++) or "fourier" (NCSN++).
        channel_mult_noise: width of that embedding, in `model_channels`: 1 (DDPM++) or 2 (NCSN++).
        encoder_type: "standard" (DDPM++), "residual" (NCSN++) or "skip".
        decoder_type: "standard" (both) or "skip".
        resample_filter: taps of the filter that changes the resolution, an even number of them: (1, 1) (DDPM++) or
            (1, 3, 3, 1) (NCSN++).
    """

    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)

    norm_eps = 1e-6
    adaptive_scale = False
    skip_scale = 0.5**0.5
    resample_proj = True

    def __post_init__(self) -> None:
        _checks.choice("embedding_type", self.embedding_type, ("positional", "fourier"))
        _checks.choice("encoder_type", self.encoder_type, ("standard", "skip", "residual"))
        _checks.choice("decoder_type", self.decoder_type, ("standard", "skip"))
        _checks.integer("channel_mult_noise", self.channel_mult_noise, 1, MAX_CHANNELS)
        taps = _integers("resample_filter", self.resample_filter, 1 << 20)
        if len(taps) % 2 or not 2 <= len(taps) <= 16:
            raise ValueError(f"resample_filter must have an even number of taps from 2 to 16, got {len(taps)}")
        object.__setattr__(self, "resample_filter", taps)
        super().__post_init__()

    @property
    def noise_channels(self) -> int:
        return self.model_channels * self.channel_mult_noise

    @property
    def first_channels(self) -> int:
        return self.model_channels

    def heads(self, channels: int) -> int:
        return 1

    def attends_up(self, level: int, block: int) -> bool:
        return block == self.num_blocks and self._attends(level)


@dataclass(frozen=True)
class DhariwalUNetConfig(EDMUNetConfig):
    """A :class:`stepfusion.networks.DhariwalUNet`, EDM's form of ADM (Dhariwal & Nichol 2021).

    Heads have 64 channels or more; an attention over fewer channels than 64 is left out.
    """

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)

    norm_eps = 1e-5
    adaptive_scale = True
    skip_scale = 1.0
    resample_proj = False
    resample_filter: ClassVar[tuple[int, ...]] = (1, 1)

    def heads(self, channels: int) -> int:
        return channels // 64


def norm_groups(channels: int) -> int:
    """Groups of a norm: 32, or fewer so that each has 4 channels."""
    return max(1, min(32, channels // 4))


def _integers(name: str, value: object, high: int) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
    return tuple(_checks.integer(name, entry, 1, high) for entry in value)
