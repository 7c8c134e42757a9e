"""The modulations of all blocks of a DiT at once: everything that depends on timestep and label, and not on x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks.dit.block import DiTBlock, Embedding
from stepfusion.networks.fused import folded


def modulations(
    blocks: Sequence[DiTBlock], embeddings: Sequence[Embedding], last: nn.Linear, time: Tensor, labels: Tensor
) -> Tensor:
    """A product for each block.

    Args:
        blocks: L of them. embeddings: E, one for all blocks or one for each.
        last: the layer that makes shift and scale of the last norm, of the first embedding.
        time: [B, E D] of timesteps. labels: int64 [B].

    Returns:
        [B, L 6 D + 2 D].
    """
    parts = time.chunk(len(embeddings), dim=1)
    sums = [
        functional.silu(part + embedding.class_embedder(labels))
        for part, embedding in zip(parts, embeddings, strict=True)
    ]
    each = sums if len(sums) == len(blocks) else sums * len(blocks)
    made = [block.norm1.linear(silu) for block, silu in zip(blocks, each, strict=True)]
    return torch.cat([*made, last(sums[0])], dim=1)


def fused_modulations(
    owner: nn.Module,
    blocks: Sequence[DiTBlock],
    embeddings: Sequence[Embedding],
    last: nn.Linear,
    time: Tensor,
    labels: Tensor,
) -> Tensor:
    """The same by one gather and one matrix product, or two if each block has an embedding of its own.

    Weights that stand side by side are made when they are first needed and kept with ``owner``: they may not change
    afterwards. They are a copy, (6 L + 2) D D numbers, a third of a DiT.
    """
    layers = [block.norm1.linear for block in blocks]
    table = folded(owner, "table", lambda: _side_by_side(embeddings))
    embedding = functional.silu(time + functional.embedding(labels, table))
    if len(embeddings) == 1:
        weight = folded(owner, "weight", lambda: torch.cat([layer.weight for layer in (*layers, last)]))
        bias = folded(owner, "bias", lambda: torch.cat([layer.bias for layer in (*layers, last)]))
        return functional.linear(embedding, weight, bias)
    batch, count = embedding.shape[0], len(layers)
    weight = folded(owner, "weight", lambda: torch.stack([layer.weight for layer in layers]))  # [L, 6 D, D]
    bias = folded(owner, "bias", lambda: torch.stack([layer.bias for layer in layers])[:, None])  # [L, 1, 6 D]
    each = embedding.view(batch, count, -1)
    made = torch.baddbmm(bias, each.transpose(0, 1), weight.transpose(1, 2))  # [L, B, 6 D]
    return torch.cat((made.transpose(0, 1).reshape(batch, -1), last(each[:, 0])), dim=1)


def _side_by_side(embeddings: Sequence[Embedding]) -> Tensor:
    """The label tables of all embeddings, [labels, E D]; a single one as it is."""
    tables = [embedding.class_embedder.embedding_table.weight for embedding in embeddings]
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)
