"""The block of a DiT, with the sub-module names of diffusers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks.attention import attend
from stepfusion.networks.blocks import TimeMLP, sinusoid
from stepfusion.networks.dit.config import FREQUENCIES, DiTConfig
from stepfusion.networks.fused import folded
from stepfusion.networks.layer_norm import LayerNormModulate

MODULATIONS = 6  # of a block: shift, scale and gate of its attention, and of its MLP
NORM_EPS = 1e-6  # of every norm but the one before an MLP, whatever a config says


class LabelEmbedding(nn.Module):
    """A row for each label, the last of which is for none: int64 [B] -> [B, D]."""

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(labels, width)

    def forward(self, labels: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(labels)
        return out


class Embedding(nn.Module):
    """The embeddings of timestep and label, whose sum conditions a block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.freq_shift = config.freq_shift
        self.timestep_embedder = TimeMLP(FREQUENCIES, config.width)
        self.class_embedder = LabelEmbedding(config.num_embeds_ada_norm + 1, config.width)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] by a float32 sinusoid and two layers: [B, D] in the weights' dtype."""
        waves = sinusoid(timesteps, FREQUENCIES, self.freq_shift, flip_sin_to_cos=True)
        out: Tensor = self.timestep_embedder(waves.to(self.timestep_embedder.linear_1.weight.dtype))
        return out


class Modulation(LayerNormModulate):
    """The norm before the attention of a block, and what makes the modulations of the whole block."""

    def __init__(self, config: DiTConfig, emb: Embedding) -> None:
        super().__init__(config.width, NORM_EPS)
        self.emb = emb
        self.linear = nn.Linear(config.width, MODULATIONS * config.width)


class Attention(nn.Module):
    """Self-attention over all tokens: [B, N, D] -> [B, N, D]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, bias = config.width, config.attention_bias
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(config.dropout)])

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        """With `fused`, queries, keys and values come from one matrix product, whose weights are kept."""
        layers = self.to_q, self.to_k, self.to_v
        if fused:
            weight = folded(self, "weight", lambda: torch.cat([layer.weight for layer in layers]))
            bias = None
            if self.to_q.bias is not None:
                bias = folded(self, "bias", lambda: torch.cat([layer.bias for layer in layers]))
            q, k, v = functional.linear(x, weight, bias).chunk(3, dim=2)
        else:
            q, k, v = (layer(x) for layer in layers)
        out: Tensor = attend(q, k, v, self.heads)
        for layer in self.to_out:
            out = layer(out)
        return out


class GELU(nn.Module):
    """A layer, and the activation by its approximation with tanh (Hendrycks & Gimpel 2016)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x), approximate="tanh")


class MLP(nn.Module):
    """Two layers with an activation between them, for every token alone: [B, N, D] -> [B, N, D]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, inner = config.width, config.mlp_width
        self.net = nn.Sequential(GELU(width, inner), nn.Dropout(config.dropout), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Gated(NamedTuple):
    """``tokens + gate * branch``, which the norm that comes next adds up: [B, N, D] both, gate [B, D]."""

    tokens: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def normalised(self, norm: LayerNormModulate, scale: Tensor, shift: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        """The modulated norm of the sum, and the sum; `fused`: both at once, which no hook of the norm sees."""
        total = self.tokens
        if self.branch is not None and self.gate is not None:
            if fused:
                return norm.of_sum(total, scale, shift, self.branch, self.gate)
            total = torch.addcmul(total, self.gate[:, None], self.branch)
        out: Tensor = norm(total, scale, shift)
        return out, total


class DiTBlock(nn.Module):
    """Attention and an MLP, each of modulated tokens and gated (Peebles & Xie 2023, figure 3, adaLN-Zero)."""

    def __init__(self, config: DiTConfig, emb: Embedding) -> None:
        super().__init__()
        self.norm1 = Modulation(config, emb)
        self.attn1 = Attention(config)
        self.norm3 = LayerNormModulate(config.width, config.norm_eps)
        self.ff = MLP(config)

    def forward(self, x: Gated, modulations: Tensor, fused: bool = False) -> Gated:
        """Map tokens [B, N, D] and this block's modulations [B, 6 D] to tokens; `fused` as in `Attention`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations.chunk(MODULATIONS, dim=1)
        normed, tokens = x.normalised(self.norm1, scale1, shift1, fused)
        branch = self.attn1(normed, fused)
        normed, tokens = Gated(tokens, branch, gate1).normalised(self.norm3, scale2, shift2, fused)
        return Gated(tokens, self.ff(normed), gate2)
