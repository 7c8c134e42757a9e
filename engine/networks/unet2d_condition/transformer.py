"""The transformers of a conditioned UNet (Rombach et al. 2022, section 3.3 and appendix E.2.1).

Keys and values of the text are not computed here: every cross-attention reads its own columns of what the network
has prepared, [B, L, P] for L positions of the text. Sub-module names are those of diffusers' ``Transformer2DModel``,
so that its state dicts load strictly.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks import fused
from stepfusion.networks.attention import attend
from stepfusion.networks.fused import Activation, Value
from stepfusion.networks.norm import GroupNormAct

_NORM_EPS = 1e-6  # of the group norm; a config's norm_eps is for residual blocks


class SelfAttention(nn.Module):
    """Attention of all positions of an image to each other (Vaswani et al. 2017), without the residual."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, tokens: Tensor, keys_values: Tensor, joined: bool = False) -> Tensor:
        """Map tokens [B, N, C] to the same shape; `joined`: by one matrix product for queries, keys and values."""
        if joined:
            q, k, v = fused.joined_queries(self, tokens)
        else:
            q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out: Tensor = self.to_out[0](attend(q, k, v, self.heads))
        return out


class CrossAttention(nn.Module):
    """Attention of all positions of an image to those of a text, without the residual.

    `keys_start`, set by the network, is the first of this layer's columns in the prepared keys and values: C of keys,
    then C of values.
    """

    def __init__(self, channels: int, text_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.channels = channels
        self.keys_start = 0
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text_channels, channels, bias=False)
        self.to_v = nn.Linear(text_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, C] of a text [B, L, D]."""
        return self.to_k(text), self.to_v(text)

    def forward(self, tokens: Tensor, keys_values: Tensor, joined: bool = False) -> Tensor:
        """Map tokens [B, N, C] and prepared keys and values [B, L, P] to [B, N, C]."""
        k = keys_values.narrow(2, self.keys_start, self.channels)
        v = keys_values.narrow(2, self.keys_start + self.channels, self.channels)
        out: Tensor = self.to_out[0](attend(self.to_q(tokens), k, v, self.heads))
        return out


class GEGLU(nn.Module):
    """``a * gelu(b)`` with [a, b] = proj(x) (Shazeer 2020): [..., C] -> [..., inner]."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.proj(x)
        out, gate = projected.chunk(2, dim=-1)
        return out * functional.gelu(gate)


class FeedForward(nn.Module):
    """A GEGLU four times as wide, and a linear layer: [..., C] -> [..., C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # the layer in the middle, which does nothing, keeps the numbers that the state dicts have
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, and a feed-forward layer, each behind a norm and with a residual.

    With `only_cross`, the first attention is one to the text, too.
    """

    def __init__(self, channels: int, text_channels: int, heads: int, only_cross: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1: SelfAttention | CrossAttention = (
            CrossAttention(channels, text_channels, heads) if only_cross else SelfAttention(channels, heads)
        )
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, text_channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, keys_values: Tensor, joined: bool = False) -> Tensor:
        """Map tokens [B, N, C] and prepared keys and values [B, L, P] to [B, N, C]."""
        tokens = tokens + self.attn1(self.norm1(tokens), keys_values, joined)
        tokens = tokens + self.attn2(self.norm2(tokens), keys_values, joined)
        out: Tensor = tokens + self.ff(self.norm3(tokens))
        return out


class Transformer(nn.Module):
    """A group norm, a projection, `depth` transformer blocks over all positions, and a projection; with a residual.

    The projections are linear layers or, what comes to the same, convolutions of one pixel.
    """

    def __init__(
        self, groups: int, channels: int, text_channels: int, heads: int, depth: int, only_cross: bool, linear: bool
    ) -> None:
        super().__init__()
        self.norm = GroupNormAct(groups, channels, _NORM_EPS)
        self.proj_in, self.proj_out = _projection(channels, linear), _projection(channels, linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, text_channels, heads, only_cross) for _ in range(depth)
        )

    def forward(self, x: Activation, keys_values: Tensor) -> Activation:
        """Map x [B, C, H, W] and prepared keys and values [B, L, P] to [B, C, H, W]."""
        if isinstance(x, Value):
            return fused.transformer(self, x, keys_values)
        linear = isinstance(self.proj_in, nn.Linear)
        h = self.norm(x)
        h = self.proj_in(_tokens(h)) if linear else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, keys_values)
        h = _pixels(self.proj_out(h), x) if linear else self.proj_out(_pixels(h, x))
        out: Tensor = x + h
        return out


def _projection(channels: int, linear: bool) -> nn.Linear | nn.Conv2d:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, kernel_size=1)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, HW, C]."""
    return x.flatten(2).transpose(1, 2)


def _pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, HW, C] as [B, C, H, W]."""
    return tokens.transpose(1, 2).reshape(like.shape)
