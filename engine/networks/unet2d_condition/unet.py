"""The UNet of latent diffusion (Rombach et al. 2022): Stable Diffusion 1 and 2, and SDXL (Podell et al. 2023).

It has the state-dict keys of diffusers' ``UNet2DConditionModel`` and the same outputs. Its forward pass is in the
parts of :class:`stepfusion.networks.conditioned.ConditionedNetwork`: keys and values of every attention to the text
are prepared once for an image, and not in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import _checks
from stepfusion.errors import CheckpointError
from stepfusion.networks.blocks import ResnetBlock, TimeMLP, sinusoid
from stepfusion.networks.conditioned import ConditionedNetwork, ConditionSpec
from stepfusion.networks.fused import convolve, normalised, projected
from stepfusion.networks.inputs import check_batch, check_image, check_labels, check_projections, check_timesteps
from stepfusion.networks.levels import LevelledNetwork, kept_shape, run_levels
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.unet2d.config import MAX_CHANNELS
from stepfusion.networks.unet2d_condition.blocks import DownBlock, MidBlock, UpBlock
from stepfusion.networks.unet2d_condition.config import UNet2DConditionConfig
from stepfusion.networks.unet2d_condition.transformer import CrossAttention

_ARGUMENTS = ("sequence_length", "num_time_ids", "concatenated_channels")
_POOLED = 1280  # of SDXL's second text encoder
_TIME_IDS = 6  # of SDXL: original size, crop, target size; its refiner has an aesthetic score for the last two


class UNet2DCondition(ConditionedNetwork, LevelledNetwork):
    """A UNet over latent images, conditioned on a timestep, a text and, if the config says so, on more.

    Its conditions, by name, each floating point:

    ``encoder_hidden_states`` [sequence_length, cross_attention_dim]
        what the text encoders returned.
    ``text_embeds`` [pooled size], ``time_ids`` [num_time_ids]
        with ``addition_embed_type="text_time"`` (SDXL): the pooled text, and sizes and crops in pixels.
    ``concatenated`` [concatenated_channels, height, width]
        with `concatenated_channels`: put behind x; of the config's `sample_size`. For inpainting the mask and the
        latent of the masked image.

    Args:
        config: what to build. Weights are initialised as PyTorch's layers do.
        sequence_length: L, positions of the text.
        num_time_ids: entries of ``time_ids``; None: as many as leave 1280 for the pooled text, which makes 6 for SDXL
            and 5 for its refiner, or else 6.
        concatenated_channels: of the config's `in_channels`, how many are not x: 5 in networks for inpainting.

    Attributes:
        config, sequence_length, concatenated_channels: as given.
        num_time_ids: as given or found; 0 without ``text_time``.
        in_channels, out_channels, sample_size: from the config.
        image_channels: C of x, `in_channels` without those that are concatenated.
        num_classes: number of labels; None if it takes none.
        projection_size: P, the columns of the time projections.
        keys_size: columns of the prepared keys and values.

    Raises:
        TypeError, ValueError: naming the argument.
        CheckpointError: the arguments contradict the config.
    """

    def __init__(
        self,
        config: UNet2DConditionConfig,
        *,
        sequence_length: int = 77,
        num_time_ids: int | None = None,
        concatenated_channels: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(config, UNet2DConditionConfig):
            raise TypeError(f"config must be a UNet2DConditionConfig, got {type(config).__name__}")
        self.config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.sample_size = config.sample_size
        self.num_classes = config.num_class_embeds
        self.sequence_length = _checks.integer("sequence_length", sequence_length, 1, 1 << 20)
        most = config.in_channels - 1
        self.concatenated_channels = _checks.integer("concatenated_channels", concatenated_channels, 0, most)
        if self.concatenated_channels and config.sample_size is None:
            raise CheckpointError("the UNet config has sample_size = None; concatenated_channels need an image size")
        self.image_channels = config.in_channels - self.concatenated_channels
        self.num_time_ids = _time_ids(config, num_time_ids)

        top, width = config.block_out_channels[0], config.time_embed_dim
        self.conv_in = nn.Conv2d(config.in_channels, top, kernel_size=3, padding=1)
        self.time_embedding = TimeMLP(top, width)
        self.class_embedding = self._make_class_embedding()
        self.add_embedding = None
        if config.addition_embed_type is not None:
            self.add_embedding = TimeMLP(config.projection_class_embeddings_input_dim or 0, width)
        self.projects_conditions = self.add_embedding is not None or self.class_embedding is not None
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in config.down_levels)
        self.mid_block = MidBlock(config, config.mid_level) if config.mid_level is not None else None
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in config.up_levels)
        self.conv_norm_out = GroupNormAct(config.norm_num_groups, top, config.norm_eps, nn.SiLU())
        self.conv_out = nn.Conv2d(top, config.out_channels, kernel_size=3, padding=1)
        self._place_columns()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **arguments: Any) -> Self:
        """The network of a diffusers ``config.json``, or the one that `to_config` described.

        Args:
            config: beside diffusers' keys it may have this class's arguments. Keys that start with ``_`` are notes
                and are skipped.
            arguments: of this class, in place of those in the config.

        Raises:
            CheckpointError: a key or an argument is unknown, or its value is not implemented or does not fit.
        """
        if isinstance(config, Mapping):
            arguments = {**{key: config[key] for key in _ARGUMENTS if key in config}, **arguments}
            config = {key: value for key, value in config.items() if key not in _ARGUMENTS}
        try:
            return cls(UNet2DConditionConfig.from_dict(config), **arguments)
        except (TypeError, ValueError) as error:
            raise CheckpointError(str(error)) from None

    def to_config(self) -> dict[str, Any]:
        """Return what `from_config` reads, JSON types only: diffusers' keys, and this class's arguments."""
        return {**self.config.to_dict(), **{name: getattr(self, name) for name in _ARGUMENTS}}

    @property
    def conditions(self) -> tuple[ConditionSpec, ...]:
        """What the network is conditioned on: see the class."""
        config = self.config
        specs = [ConditionSpec("encoder_hidden_states", (self.sequence_length, config.cross_attention_dim))]
        if self.add_embedding is not None:
            specs.append(ConditionSpec("text_embeds", (_pooled_size(config, self.num_time_ids),)))
            specs.append(ConditionSpec("time_ids", (self.num_time_ids,)))
        if self.concatenated_channels:
            size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size or 1,) * 2
            specs.append(ConditionSpec("concatenated", (self.concatenated_channels, *size)))
        return tuple(specs)

    def forward(
        self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None, **conditions: Tensor
    ) -> Tensor:
        """Predict eps or v, whatever the weights were trained for.

        Args:
            x: [B, image_channels, H, W] in the weights' dtype, NCHW or channels_last; H and W multiples of
                ``2 ** (num_levels - 1)``.
            timesteps: int64, float32 or float64 [B].
            class_labels: int64 [B] if the config has classes, else None. Values are not checked here.
            conditions: every one of `conditions` by name, [B, ...], floating point.

        Returns:
            [B, out_channels, H, W] in the weights' dtype.

        Raises:
            TypeError: a condition is missing or unknown, or is no tensor.
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps)
        check_labels(class_labels, timesteps, self.class_embedding is not None)
        return super().forward(x, timesteps, class_labels, **conditions)

    def prepare(self, conditions: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What depends on the conditions alone, in the weights' dtype.

        Args:
            conditions: what `checked` returned: every one of `conditions`, [B, ...].

        Returns:
            Keys and values of all attentions to the text [B, L, keys_size]; with ``text_time`` the added embedding
            [B, time_embed_dim]; with `concatenated_channels` what is put behind x [B, K, H, W].
        """
        text = conditions["encoder_hidden_states"]
        keys_values = [each for layer in self._cross_attentions for each in layer.prepare(text)]
        prepared = [torch.cat([text[..., :0], *keys_values], dim=2)]
        if self.add_embedding is not None:
            ids = conditions["time_ids"]
            waves = self._sinusoid(ids.flatten(), self.config.addition_time_embed_dim or 0).view(ids.shape[0], -1)
            prepared.append(self.add_embedding(torch.cat((conditions["text_embeds"], waves), dim=1)))
        if self.concatenated_channels:
            prepared.append(conditions["concatenated"])
        return tuple(prepared)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] by the sinusoid and the time MLP: [B, time_embed_dim] in the weights' dtype."""
        check_timesteps(timesteps)
        embedding: Tensor = self.time_embedding(self._sinusoid(timesteps, self.config.block_out_channels[0]))
        return embedding

    def condition(self, time: Tensor, class_labels: Tensor | None = None, *prepared: Tensor) -> Tensor:
        """Add class and added embeddings to that of `embed_time`, and project it for every block.

        Args:
            time: [B, time_embed_dim].
            class_labels: as in `forward`.
            prepared: what `prepare` returned; only the added embedding is read.

        Returns:
            [B, projection_size].

        Raises:
            ValueError: there are no labels, or nothing prepared, and the network needs them.
        """
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels is None; this network is conditioned on a class and needs them")
            if self.config.class_embed_type == "timestep":
                class_labels = self._sinusoid(class_labels, self.config.block_out_channels[0])
            time = time + self.class_embedding(class_labels)
        if self.add_embedding is not None:
            self._check_count(prepared)
            time = time + prepared[1]
        activated = functional.silu(time)
        if self.fused:
            return projected(self, self._resnets, activated)
        return torch.cat([resnet.time_emb_proj(activated) for resnet in self._resnets], dim=1)

    def predict(self, x: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`.

        Args:
            x: as in `forward`.
            projections: [B, projection_size], from `condition`.
            prepared: what `prepare` returned.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        return self._predict(x, projections, prepared)

    def predict_keeping(self, x: Tensor, kept: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """`predict`, which also writes what is kept (`kept_shape`) to ``kept``."""
        return self._predict(x, projections, prepared, kept)

    def predict_outer(self, x: Tensor, kept: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """Run the outermost level alone, with what is ``kept``."""
        return self._predict(x, projections, prepared, kept, outer=True)

    def kept_shape(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Of what `predict_keeping` keeps of an image of a shape (C, H, W); None if there is one level."""
        return kept_shape(self.config.block_out_channels, shape)

    def _predict(
        self,
        x: Tensor,
        projections: Tensor,
        prepared: tuple[Tensor, ...],
        kept: Tensor | None = None,
        *,
        outer: bool = False,
    ) -> Tensor:
        check_image(x, self.image_channels, self.conv_in.weight.dtype, 2 ** (self.config.num_levels - 1))
        check_projections(projections, x, self.projection_size)
        self._check_count(prepared)
        keys_values = prepared[0]
        if keys_values.ndim != 3 or keys_values.shape[0] != x.shape[0] or keys_values.shape[2] != self.keys_size:
            accepted = f"[{x.shape[0]}, L, {self.keys_size}], L positions of a text"
            raise ValueError(f"prepared keys and values are {_checks.describe(keys_values)}; accepted are {accepted}")
        if self.concatenated_channels:
            x = self._concatenated(x, prepared[-1])
        arguments = projections, keys_values
        if self.defers:
            value = run_levels(self, convolve(self.conv_in, x), arguments, kept, outer=outer)
            last = normalised(self.conv_norm_out, value)
        else:
            last = self.conv_norm_out(run_levels(self, self.conv_in(x), arguments, kept, outer=outer))
        out: Tensor = self.conv_out(last)
        return out

    def _concatenated(self, x: Tensor, other: Tensor) -> Tensor:
        wanted = [x.shape[0], self.concatenated_channels, *x.shape[2:]]
        if list(other.shape) != wanted or other.dtype != x.dtype:
            accepted = f"{str(x.dtype).removeprefix('torch.')} {wanted}, as x has"
            raise ValueError(f"concatenated is {_checks.describe(other)}; accepted is {accepted}")
        return torch.cat((x, other), dim=1)

    def _check_count(self, prepared: tuple[Tensor, ...]) -> None:
        wanted = 1 + (self.add_embedding is not None) + (self.concatenated_channels > 0)
        if len(prepared) != wanted:
            raise ValueError(
                f"prepared are {len(prepared)} tensors; accepted are the {wanted} that `prepare` returned"
            )

    def _place_columns(self) -> None:
        """Give every layer its columns in what is computed for all of them at once."""
        self._resnets = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        self.projection_size = 0
        for resnet in self._resnets:
            resnet.time_start = self.projection_size
            self.projection_size += resnet.time_emb_proj.out_features
        self._cross_attentions = [module for module in self.modules() if isinstance(module, CrossAttention)]
        self.keys_size = 0
        for layer in self._cross_attentions:
            layer.keys_start = self.keys_size
            self.keys_size += 2 * layer.channels

    def _make_class_embedding(self) -> nn.Module | None:
        config = self.config
        if config.class_embed_type == "timestep":
            return TimeMLP(config.block_out_channels[0], config.time_embed_dim)
        if config.num_class_embeds is not None:
            return nn.Embedding(config.num_class_embeds, config.time_embed_dim)
        return None

    def _sinusoid(self, values: Tensor, channels: int) -> Tensor:
        """[N] as [N, channels]; a float32 sinusoid, in the weights' dtype last."""
        waves = sinusoid(values, channels, self.config.freq_shift, self.config.flip_sin_to_cos)
        return waves.to(self.conv_in.weight.dtype)


def _pooled_size(config: UNet2DConditionConfig, time_ids: int) -> int:
    """Entries of the pooled text: what the time ids leave of the added embedding's input."""
    return (config.projection_class_embeddings_input_dim or 0) - time_ids * (config.addition_time_embed_dim or 0)


def _time_ids(config: UNet2DConditionConfig, given: int | None) -> int:
    """How many time ids there are."""
    if config.addition_embed_type is None:
        if given:
            raise ValueError(f"num_time_ids is {given!r}, and the config has no addition_embed_type")
        return 0
    most = MAX_CHANNELS
    if given is None:
        left = _pooled_size(config, 0) - _POOLED
        step = config.addition_time_embed_dim or 1
        count = left // step if left > 0 and left % step == 0 else _TIME_IDS
    else:
        count = _checks.integer("num_time_ids", given, 1, most)
    if _pooled_size(config, count) < 1:
        both = config.projection_class_embeddings_input_dim
        raise ValueError(f"num_time_ids is {count}, which leaves nothing of {both} for the pooled text")
    return count
