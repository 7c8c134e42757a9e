"""A self-attention block of a UNet on a CPU: norm, projections, softmax and residual in one op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library, weight_packing
from stepfusion.kernels.cpu.weight_packing import Packed

_PAIRS = 2 * library.LANES  # channels of a head: a multiple of it
MOST_TOKENS = 4096  # the scores of 64 queries are in memory at once: 1 MiB


@dataclass(frozen=True)
class AttentionWeights:
    """What an attention block of C channels is made of.

    Attributes:
        norm_weight, norm_bias: [C], of the dtype of projections; None without a norm.
        projections: of queries, keys, values and the result, from :func:`pack_projections`: float32 or bfloat16.
        biases: float32 [4, C], in the same order.
        heads: a divisor of C. groups: of the norm. eps: added to its variances.
        output_scale: what the sum is divided by.

    Raises:
        TypeError, ValueError: naming the attribute.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    projections: Tensor
    biases: Tensor
    heads: int
    groups: int
    eps: float
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        device, channels = self.projections.device, self.biases.shape[-1]
        if not fits(channels, self.heads, 1):
            wanted = f"heads of a multiple of {_PAIRS} channels each"
            raise ValueError(f"biases and heads must make {wanted}, got {channels} channels and {self.heads} heads")
        width = weight_packing.width(channels // self.heads, _PAIRS)
        packed = Packed(1, channels, channels // width, width)
        launch.check_dtype("projections", self.projections, tuple(library.DTYPES))
        kind = self.projections.dtype
        launch.check_like("projections", self.projections, (4, *weight_packing.packed_shape(packed, kind)), device)
        launch.check_like("biases", self.biases, (4, channels), device, (torch.float32,))
        if (self.norm_weight is None) != (self.norm_bias is None):
            raise ValueError("norm_weight and norm_bias must be given together, got one of them")
        for name in ("norm_weight", "norm_bias"):
            vector = getattr(self, name)
            if vector is not None:
                launch.check_like(name, vector, (channels,), device, (kind,))
        if self.groups < 1 or channels % self.groups:
            raise ValueError(f"groups must divide {channels}, got {self.groups}")
        library.check_contiguous(
            norm_weight=self.norm_weight, norm_bias=self.norm_bias, projections=self.projections, biases=self.biases
        )


def fits(channels: int, heads: int, tokens: int) -> bool:
    """Whether so many heads over so many channels and pixels can be computed."""
    whole = heads > 0 and channels % heads == 0 and channels // heads % _PAIRS == 0
    return channels > 0 and whole and tokens <= MOST_TOKENS


def pack_projections(weights: list[Tensor], heads: int, dtype: torch.dtype) -> Tensor:
    """Four weights [C, C], as ``nn.Linear`` has them, packed and stacked (:func:`weight_packing.pack`)."""
    width = weight_packing.width(len(weights[0]) // heads, _PAIRS)
    return torch.stack([weight_packing.pack(weight.detach()[None], width, dtype) for weight in weights])


@library.op("attention_block_cpu", fake=library.like)
def _attention_block_cpu(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projections: Tensor,
    biases: Tensor,
    heads: int,
    groups: int,
    eps: float,
    output_scale: float,
) -> Tensor:
    y = library.like(x)
    if y.numel() > 0:
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        places = -(-height * width // library.LANES) * library.LANES
        keys, values = x.new_empty(2, batch, places, channels).unbind()
        sizes = batch, height * width, channels, heads, channels // projections.shape[1], groups
        tensors = x, norm_weight, norm_bias, projections.contiguous(), biases.contiguous(), keys, values, y
        library.call(x.dtype, "attention_block", tensors, sizes, (eps, output_scale))
    return y


def attention_block(x: Tensor, weights: AttentionWeights) -> Tensor:
    """``(x + project(softmax(q k^T / sqrt(D)) v)) / output_scale`` over the pixels of each image, D channels a head.

    q, k and v are projections of ``norm(x)`` (Vaswani et al. 2017; Wang et al. 2018).

    Args:
        x: [B, C, H, W] on the CPU, of the dtype of the projections, read as channels_last; D a multiple of 32, H W at
            most 4096.

    Returns:
        [B, C, H, W] in channels_last. Rounded to its dtype are what enters a product, and the result. An image's bits
        depend on neither its place in the batch nor the number of threads. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    w = weights
    launch.check_dtype("x", x, (w.projections.dtype,))
    channels = w.biases.shape[1]
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] * x.shape[3] > MOST_TOKENS:
        wanted = f"[B, {channels}, H, W], H W at most {MOST_TOKENS}"
        raise ValueError(f"x must be {wanted}, got {list(x.shape)}")
    y: Tensor = _attention_block_cpu(
        x, w.norm_weight, w.norm_bias, w.projections, w.biases, w.heads, w.groups, w.eps, w.output_scale
    )
    return y
