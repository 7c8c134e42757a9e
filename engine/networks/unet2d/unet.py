"""The DDPM UNet (Ho et al. 2020; scale-shift and resampling blocks: Dhariwal & Nichol 2021).

It has the state-dict keys of diffusers' ``UNet2DModel`` and the same outputs. Its forward pass is in the parts of
:class:`stepfusion.networks.time_conditioned.TimeConditioned`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepfusion import _checks
from stepfusion.networks.blocks import DownBlock, MidBlock, ResnetBlock, TimeMLP, UpBlock, activation, sinusoid
from stepfusion.networks.fused import convolve, normalised, projected
from stepfusion.networks.inputs import check_batch, check_image, check_projections, check_timesteps
from stepfusion.networks.levels import LevelledNetwork, kept_shape, run_levels
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion.networks.unet2d.config import UNet2DConfig

_NO_LABELS = "class_labels is None; this network is conditioned on a class and needs them"


class UNet2D(TimeConditioned, LevelledNetwork):
    """A UNet over images, conditioned on a timestep and, if the config says so, on a class label.

    Args:
        config: what to build. Weights are initialised as PyTorch's layers do.

    Attributes:
        config: as given.
        in_channels, out_channels, sample_size: from the config.
        num_classes: number of labels that the class embedding takes; None if there is none, or no number of them.
        projection_size: P, the columns of the time projections.
    """

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        channels, levels, width = config.block_out_channels, config.num_levels, config.time_embed_dim
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.out_channels
        self.sample_size = config.sample_size
        self.num_classes = config.num_classes
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], kernel_size=3, padding=1)
        if config.time_embedding_type == "learned":
            self.time_proj = nn.Embedding(config.num_train_timesteps or 0, channels[0])
        self.time_embedding = TimeMLP(channels[0], width)
        self.class_embedding = self._make_class_embedding()
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            block = DownBlock(config, channels[max(i - 1, 0)], channels[i], kind, i < levels - 1)
            self.down_blocks.append(block)
        self.mid_block = MidBlock(config, channels[-1]) if config.mid_block_type is not None else None
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
            below, above = channels[min(i + 1, levels - 1)], channels[max(i - 1, 0)]
            self.up_blocks.append(UpBlock(config, below, channels[i], above, kind, i > 0))
        self.act = activation(config.act_fn)
        self.conv_norm_out = GroupNormAct(config.norm_num_groups, channels[0], config.norm_eps, nn.SiLU())
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, kernel_size=3, padding=1)
        self._resnets = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        self.projection_size = 0
        for resnet in self._resnets:
            resnet.time_start = self.projection_size
            self.projection_size += resnet.time_emb_proj.out_features

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict eps, x0 or v, whatever the weights were trained for.

        Args:
            x: [B, in_channels, H, W] in the weights' dtype, NCHW or channels_last; H and W multiples of
                ``2 ** (num_levels - 1)``.
            timesteps: int64, float32 or float64 [B]; int64 if their embedding is learned.
            class_labels: int64 [B] if the config has classes (float [B, time_embed_dim] with
                ``class_embed_type="identity"``), else None. Values are not checked here.

        Returns:
            [B, out_channels, H, W] in the weights' dtype.

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps)
        self._check_labels(timesteps, class_labels)
        return super().forward(x, timesteps, class_labels)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] by the sinusoid and the time MLP: [B, time_embed_dim] in the weights' dtype."""
        check_timesteps(timesteps)
        if self.config.time_embedding_type == "learned" and timesteps.is_floating_point():
            given = _checks.describe(timesteps)
            raise ValueError(f"timesteps is {given}; accepted is int64 [B], for this network's embedding is learned")
        embedding: Tensor = self.time_embedding(self._embed_position(timesteps))
        return embedding

    def condition(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Add the class embedding to that of `embed_time`, and project it for every block: [B, projection_size].

        ValueError if the network is conditioned on a class and none is given: its images would be of no class.
        """
        if self.class_embedding is None:
            return self.project(time)
        if class_labels is None:
            raise ValueError(_NO_LABELS)
        if self.config.class_embed_type == "timestep":
            class_labels = self._embed_position(class_labels)
        return self.project(time + self.class_embedding(class_labels))

    def project(self, embedding: Tensor) -> Tensor:
        """Apply every residual block's time projection: embedding [B, D] -> [B, projection_size]."""
        activated = self.act(embedding)
        if self.fused:
            return projected(self, self._resnets, activated)
        return torch.cat([resnet.time_emb_proj(activated) for resnet in self._resnets], dim=1)

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`, with projections [B, projection_size] from `condition`."""
        return self._predict(x, projections)

    def predict_keeping(self, x: Tensor, kept: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """`predict`, which also writes what is kept (`kept_shape`) to ``kept``."""
        return self._predict(x, projections, kept)

    def predict_outer(self, x: Tensor, kept: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """Run the outermost level alone, with what is ``kept``."""
        return self._predict(x, projections, kept, outer=True)

    def kept_shape(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Of what `predict_keeping` keeps of an image of a shape (C, H, W); None if there is one level."""
        return kept_shape(self.config.block_out_channels, shape)

    def _predict(self, x: Tensor, projections: Tensor, kept: Tensor | None = None, *, outer: bool = False) -> Tensor:
        check_image(x, self.in_channels, self.conv_in.weight.dtype, 2 ** (self.config.num_levels - 1))
        check_projections(projections, x, self.projection_size)
        x = 2 * x - 1 if self.config.center_input_sample else x
        if self.defers:
            value = run_levels(self, convolve(self.conv_in, x), (projections,), kept, outer=outer)
            last = normalised(self.conv_norm_out, value)
        else:
            last = self.conv_norm_out(run_levels(self, self.conv_in(x), (projections,), kept, outer=outer))
        out: Tensor = self.conv_out(last)
        return out

    def _make_class_embedding(self) -> nn.Module | None:
        config = self.config
        if config.class_embed_type == "timestep":
            return TimeMLP(config.block_out_channels[0], config.time_embed_dim)
        if config.class_embed_type == "identity":
            return nn.Identity()
        if config.class_embedding_rows is not None:
            return nn.Embedding(config.class_embedding_rows, config.time_embed_dim)
        return None

    def _embed_position(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] as [B, block_out_channels[0]]; a float32 sinusoid, in the weights' dtype last."""
        config = self.config
        if config.time_embedding_type == "learned":
            learned: Tensor = self.time_proj(timesteps)
            return learned
        waves = sinusoid(timesteps, config.block_out_channels[0], config.freq_shift, config.flip_sin_to_cos)
        return waves.to(self.conv_in.weight.dtype)

    def _check_labels(self, timesteps: Tensor, class_labels: Tensor | None) -> None:
        if class_labels is None:
            if self.class_embedding is not None:
                raise ValueError(_NO_LABELS)
            return
        if self.class_embedding is None:
            raise ValueError("class_labels is given; this network takes none (its config has no class embedding)")
        dtype, shape = torch.int64, [timesteps.shape[0]]
        if self.config.class_embed_type == "identity":
            dtype, shape = self.conv_in.weight.dtype, [*shape, self.config.time_embed_dim]
        if class_labels.dtype != dtype or list(class_labels.shape) != shape:
            accepted = f"{str(dtype).removeprefix('torch.')} {shape}"
            raise ValueError(f"class_labels is {_checks.describe(class_labels)}; accepted is {accepted}")
