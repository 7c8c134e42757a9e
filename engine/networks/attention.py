"""Attention by the fastest route that the head size allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST_FUSED_HEAD = {"cpu": 128}  # PyTorch's CPU kernel is several times slower than matrix products at 256
_LARGEST_FUSED_HEAD_GPU = 256  # flash and cuDNN attention stop here


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` for every head of D = C / heads channels (Vaswani et al. 2017).

    Args:
        q: [B, N, C], N positions.
        k, v: [B, M, C], M positions that it attends to; any strides whose last is 1.

    Returns:
        [B, N, C].
    """
    head_dim = q.shape[2] // heads
    fused = head_dim <= _LARGEST_FUSED_HEAD.get(q.device.type, _LARGEST_FUSED_HEAD_GPU)
    if heads == 1 and not fused:
        return _matmul_attention(q, k, v)
    q, k, v = _split(q, heads), _split(k, heads), _split(v, heads)
    if fused:
        attended = functional.scaled_dot_product_attention(q, k, v)
    else:
        attended = _matmul_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(q.shape)
    return attended.transpose(1, 2).flatten(2)


def _split(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, C] as [B, heads, N, D]."""
    batch, positions, channels = tokens.shape
    return tokens.view(batch, positions, heads, channels // heads).transpose(1, 2)


def _matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head, [B, N, D]: two matrix products and a softmax."""
    nothing = q.new_empty(1, 1, 1)  # with beta = 0 nobody reads it, whatever it holds
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0.0, alpha=q.shape[2] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), v)
