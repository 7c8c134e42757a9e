"""The names of the authors' checkpoints (facebookresearch/DiT, and SiT after it) as those of :class:`DiT`.

The authors have one embedding of timestep and label, diffusers one for each block. A converted state dict has the
authors' once for each block, as diffusers' has it, but all of these are the same tensors, and nothing is copied: a
network whose config has `shared_embeddings` (as :func:`author_config` says) holds them once, too.

The authors differ from diffusers in two numbers, which no state dict has and :func:`author_config` sets: the
frequencies of the timestep's sinusoid, and the eps of the norm before an MLP.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stepfusion.errors import CheckpointError
from stepfusion.networks.dit.block import NORM_EPS
from stepfusion.networks.dit.config import DiTConfig
from stepfusion.networks.dit.positions import position_embedding

#: Heads by width, of the models S, B, L and XL (Peebles & Xie 2023, table 1): no state dict tells them.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_LAYERS = {  # of the authors -> ours, both without a block's own prefix
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK_LAYERS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDING_LAYERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
_TABLE = "y_embedder.embedding_table.weight"
_OUR_TABLE = "norm1.emb.class_embedder.embedding_table.weight"
_QKV = "attn.qkv"
_POSITIONS = "pos_embed"
_PARTS = ("weight", "bias")


def is_authors(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the authors' names."""
    return "x_embedder.proj.weight" in state and _TABLE in state


def author_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> DiTConfig:
    """The config of a network whose state dict has the authors' names, from the shapes of its tensors.

    Args:
        num_heads: of the attention; None for that of the paper's model of this width.

    Raises:
        CheckpointError: a tensor is missing or of a shape that no DiT has, or the width is none of the paper's.
    """
    depth = _depth(state)
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight", 4)
    outputs = _shape(state, "final_layer.linear.weight", 2)[0]
    tokens = _shape(state, _POSITIONS, 3)[1]
    grid = math.isqrt(tokens)
    if grid * grid != tokens:
        raise CheckpointError(f"pos_embed has {tokens} tokens; accepted is a square of an integer")
    if outputs % patch**2:
        raise CheckpointError(f"final_layer.linear.weight has {outputs} rows; accepted is a multiple of {patch**2}")
    heads = _HEADS.get(width) if num_heads is None else num_heads
    if heads is None:
        raise CheckpointError(f"the width of the network is {width}; without num_heads, accepted are {list(_HEADS)}")
    if heads < 1 or width % heads:
        raise CheckpointError(f"num_heads is {heads}; accepted is a divisor of {width}, the width")
    return DiTConfig(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=outputs // patch**2,
        num_layers=depth,
        sample_size=grid * patch,
        patch_size=patch,
        num_embeds_ada_norm=_shape(state, _TABLE, 2)[0] - 1,
        norm_eps=NORM_EPS,
        freq_shift=0,
        shared_embeddings=True,
    )


def from_author_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the authors' names as one with the names of :class:`stepfusion.networks.DiT`.

    Args:
        state: what a ``.pt`` file of the authors holds (of a training checkpoint, its "ema" or "model"), any dtype.

    Returns:
        The same tensors, or views of them, under the names of diffusers. The position embedding is left out: it is
        fixed.

    Raises:
        CheckpointError: a name is missing or unknown, or the position embedding is not the fixed one.
    """
    depth = _depth(state)
    converted = dict(_pairs(state, depth))
    used = set(_expected(depth))
    if unknown := sorted(state.keys() - used):
        raise CheckpointError(f"the DiT state dict has the unknown name {reprlib.repr(unknown[0])}")
    _check_positions(state)
    return converted


def shares_embeddings(state: Mapping[str, Tensor]) -> bool:
    """Whether all blocks of a state dict with diffusers' names have equal embeddings of timestep and label.

    Those of published checkpoints do, for they were converted from the authors'. Then a config with
    `shared_embeddings` describes the same network, in less memory.
    """
    first: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (match := re.fullmatch(r"transformer_blocks\.\d+\.norm1\.emb\.(.+)", name)) is None:
            continue
        other = first.setdefault(match[1], tensor)
        if other is not tensor and (other.shape != tensor.shape or not torch.equal(other, tensor)):
            return False
    return bool(first)


def _pairs(state: Mapping[str, Tensor], depth: int) -> Iterator[tuple[str, Tensor]]:
    """Our names, and the tensors that they have."""
    for theirs, ours in _LAYERS.items():
        for part in _PARTS:
            yield f"{ours}.{part}", _tensor(state, f"{theirs}.{part}")
    for index in range(depth):
        block, our_block = f"blocks.{index}", f"transformer_blocks.{index}"
        for theirs, ours in _BLOCK_LAYERS.items():
            for part in _PARTS:
                yield f"{our_block}.{ours}.{part}", _tensor(state, f"{block}.{theirs}.{part}")
        for part in _PARTS:
            for ours, tensor in zip("qkv", _thirds(state, f"{block}.{_QKV}.{part}"), strict=True):
                yield f"{our_block}.attn1.to_{ours}.{part}", tensor
        for theirs, ours in _EMBEDDING_LAYERS.items():
            for part in _PARTS:
                yield f"{our_block}.{ours}.{part}", _tensor(state, f"{theirs}.{part}")
        yield f"{our_block}.{_OUR_TABLE}", _tensor(state, _TABLE)


def _expected(depth: int) -> Iterator[str]:
    """The names that the authors' state dict of so many blocks has."""
    layers = [*_LAYERS, *_EMBEDDING_LAYERS]
    layers += [f"blocks.{index}.{layer}" for index in range(depth) for layer in (*_BLOCK_LAYERS, _QKV)]
    yield from (f"{layer}.{part}" for layer in layers for part in _PARTS)
    yield from (_TABLE, _POSITIONS)


def _depth(state: Mapping[str, Tensor]) -> int:
    """The number of blocks."""
    places = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    if not places:
        raise CheckpointError("the DiT state dict has no blocks; accepted are the names of facebookresearch/DiT")
    return max(places) + 1


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"the DiT state dict lacks {name}")
    return state[name]


def _thirds(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """What queries, keys and values have of a layer of all of them."""
    tensor = _tensor(state, name)
    if tensor.ndim == 0 or tensor.shape[0] % 3:
        raise CheckpointError(f"{name} is of shape {list(tensor.shape)}; accepted is a multiple of 3 rows")
    return tensor.chunk(3)


def _shape(state: Mapping[str, Tensor], name: str, ndim: int) -> torch.Size:
    shape = _tensor(state, name).shape
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"{name} is of shape {list(shape)}; accepted are {ndim} dimensions, none of them 0")
    return shape


def _check_positions(state: Mapping[str, Tensor]) -> None:
    """The authors save their position embedding, which training leaves as it was."""
    given = _tensor(state, _POSITIONS)
    _, tokens, width = _shape(state, _POSITIONS, 3)
    if given.is_meta:
        return
    grid = math.isqrt(tokens)
    fixed = position_embedding(grid, width) if width % 4 == 0 else given.new_empty(0)
    near = 2e-2 if given.dtype == torch.bfloat16 else 2e-3
    if fixed.shape != given.shape or not torch.allclose(given.float().cpu(), fixed, rtol=0, atol=near):
        raise CheckpointError("pos_embed is not the sine-cosine embedding of a square grid, which a DiT has")
