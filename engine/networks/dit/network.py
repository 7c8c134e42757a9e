"""The diffusion transformer (Peebles & Xie 2023, "Scalable diffusion models with transformers").

It has the state-dict keys of diffusers' ``DiTTransformer2DModel`` and the same outputs. Its forward pass is in the
parts of :class:`stepfusion.networks.time_conditioned.TimeConditioned`. The authors' checkpoints are converted by
:mod:`stepfusion.networks.dit.author_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import _checks
from stepfusion.networks.dit.block import MODULATIONS, NORM_EPS, DiTBlock, Embedding, Gated
from stepfusion.networks.dit.config import DiTConfig
from stepfusion.networks.dit.modulation import fused_modulations, modulations
from stepfusion.networks.dit.positions import position_embedding
from stepfusion.networks.inputs import check_batch, check_labels, check_projections, check_timesteps
from stepfusion.networks.layer_norm import LayerNormModulate
from stepfusion.networks.time_conditioned import TimeConditioned

_STD = 0.02  # of the initial embeddings


class PatchEmbedding(nn.Module):
    """Patches as tokens, with the embedding of their places: [B, C, S, S] -> [B, N, D]."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, kernel_size=self.patch, stride=self.patch)
        self.register_buffer("pos_embed", position_embedding(config.grid, config.width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, size, _ = x.shape
        p, grid = self.patch, size // self.patch
        patches = x.reshape(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, grid * grid, channels * p * p)
        # a convolution whose patches do not overlap is one matrix product, whatever the layout of x
        return functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias) + self.pos_embed


class DiT(TimeConditioned):
    """A transformer over the patches of an image or a latent, conditioned on a timestep and a class label.

    Args:
        config: what to build. Weights are initialised as the paper says: modulations and output are zero.

    Attributes:
        config: as given.
        in_channels, sample_size: from the config. out_channels: of the output, `in_channels`, or twice as many.
        num_classes: labels that it takes, the null label too. null_label: the last of them, for no class.
        projection_size: P, the columns of the modulations: 6 D for each block, and 2 D.
        fused: modulations, and queries with keys and values, are made by one matrix product each; the weights may not
            change afterwards. What stands side by side for that is a copy: half as much memory again.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.output_channels
        self.sample_size = config.sample_size
        self.num_classes = config.num_embeds_ada_norm + 1
        self.null_label = config.num_embeds_ada_norm
        self.projection_size = MODULATIONS * width * config.num_layers + 2 * width
        self.pos_embed = PatchEmbedding(config)
        embeddings = [Embedding(config) for _ in range(config.embeddings)]
        each = embeddings * (config.num_layers // config.embeddings)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config, embedding) for embedding in each)
        self.norm_out = LayerNormModulate(width, NORM_EPS)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.patch_size**2 * self.out_channels)
        self._initialise()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The network that a diffusers config describes (:meth:`DiTConfig.from_dict`).

        Raises:
            CheckpointError: an unknown key, a wrong or unsupported value, or the config of another model class.
        """
        return cls(DiTConfig.from_dict(config))

    def to_config(self) -> dict[str, Any]:
        """Return what `from_config` reads, JSON types only."""
        return self.config.to_dict()

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict eps, x0 or v, whatever the weights were trained for, and the variance if it is learned.

        Args:
            x: [B, in_channels, S, S] in the weights' dtype, NCHW or channels_last, S the `sample_size`.
            timesteps: int64, float32 or float64 [B].
            class_labels: int64 [B]. Values are not checked here.

        Returns:
            [B, out_channels, S, S] in the weights' dtype.

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps)
        check_labels(class_labels, timesteps, conditioned=True)
        return super().forward(x, timesteps, class_labels)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] for every block, or once for all if they share it: [B, E D] in the weights' dtype."""
        check_timesteps(timesteps)
        return torch.cat([embedding.embed_time(timesteps) for embedding in self._embeddings], dim=1)

    def condition(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Make the modulations of all blocks and of the last norm: [B, projection_size].

        The columns are shift, scale and gate of the attention and the same of the MLP, D each, block by block, and
        then shift and scale of the last norm.

        Args:
            time: [B, E D] of `embed_time`. class_labels: int64 [B].

        Raises:
            ValueError: `time` does not fit, or no labels are given: the images would be of no class.
        """
        wanted = self.config.embeddings * self.config.width
        if time.ndim != 2 or time.shape[1] != wanted or time.dtype != self._dtype:
            accepted = f"{str(self._dtype).removeprefix('torch.')} [B, {wanted}]"
            raise ValueError(f"time is {_checks.describe(time)}; accepted is {accepted}")
        check_labels(class_labels, time, conditioned=True)
        labels = cast(Tensor, class_labels)
        if self.defers:
            return fused_modulations(self, self._blocks, self._embeddings, self.proj_out_1, time, labels)
        return modulations(self._blocks, self._embeddings, self.proj_out_1, time, labels)

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`, with projections [B, projection_size] from `condition`."""
        self._check_image(x)
        check_projections(projections, x, self.projection_size)
        width = self.config.width
        *each, last = torch.split(projections, MODULATIONS * width, dim=1)
        tokens, fused = Gated(self.pos_embed(x)), self.defers
        for block, modulation in zip(self.transformer_blocks, each, strict=True):
            tokens = block(tokens, modulation, fused)
        shift, scale = last.chunk(2, dim=1)
        normed, _ = tokens.normalised(self.norm_out, scale, shift, fused)
        return self._image(self.proj_out_2(normed))

    def _image(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, p p C'], rows of a patch outermost, as an image [B, C', S, S]."""
        batch, channels, size = tokens.shape[0], self.out_channels, self.sample_size
        p, grid = self.config.patch_size, self.config.grid
        pixels = tokens.reshape(batch, grid, grid, p, p, channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, size, size)

    @property
    def _blocks(self) -> list[DiTBlock]:
        return [cast(DiTBlock, block) for block in self.transformer_blocks]

    @property
    def _embeddings(self) -> list[Embedding]:
        """One of all blocks, or one of each."""
        return [block.norm1.emb for block in self._blocks[: self.config.embeddings]]

    @property
    def _dtype(self) -> torch.dtype:
        return self.proj_out_1.weight.dtype

    def _check_image(self, x: Tensor) -> None:
        shape = [self.in_channels, self.sample_size, self.sample_size]
        if x.ndim != 4 or list(x.shape[1:]) != shape or x.dtype != self._dtype:
            accepted = f"{str(self._dtype).removeprefix('torch.')} [B, {', '.join(map(str, shape))}]"
            raise ValueError(f"x is {_checks.describe(x)}; accepted is {accepted}")

    def _initialise(self) -> None:
        """Weights as in the paper (section 3.2, "DiT block with adaLN-Zero", and the authors' code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in self._embeddings:
            mlp, table = embedding.timestep_embedder, embedding.class_embedder.embedding_table
            for weight in (mlp.linear_1.weight, mlp.linear_2.weight, table.weight):
                nn.init.normal_(weight, std=_STD)
        for layer in (*(block.norm1.linear for block in self._blocks), self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(layer.weight)
