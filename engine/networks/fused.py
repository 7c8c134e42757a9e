"""The blocks of the UNets as a GPU runs them with fewest launches: nothing is added in a pass of its own.

A :class:`Value` between two layers is what a convolution returned and what is still to be added to it. Whoever reads
it next adds that: a norm (:func:`stepfusion.kernels.add_group_norm_silu`), or what resamples it
(:func:`stepfusion.kernels.add_bias_doubled`). Products with the weights of a shortcut and of an attention block's
output are added in place, by the matrix product itself. The bias of the convolution between the two norms of a block
is part of the time projections.

Sums of biases and weights that stand side by side are made when they are first needed, and kept with their block: the
weights may not change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import kernels
from stepfusion.networks.attention import attend

if TYPE_CHECKING:
    from stepfusion.networks.blocks import Attention, Downsample, ResnetBlock, Upsample
    from stepfusion.networks.norm import GroupNormAct
    from stepfusion.networks.unet2d_condition.transformer import SelfAttention, Transformer


@final
class Value:
    """``x + residual + bias``: x and residual [B, C, H, W] in channels_last, bias [C].

    Several may refer to one value, as a skip connection does: once somebody has added it up, all have the sum.
    """

    def __init__(self, x: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> None:
        self.x, self.residual, self.bias = x, residual, bias

    def settle(self, total: Tensor | None = None) -> Tensor:
        """The sum, which is ``total`` if it was made elsewhere."""
        if total is None:
            total = self.x
            if self.residual is not None or self.bias is not None:
                total = kernels.add_bias(self.x, self.bias, self.residual)
        self.x, self.residual, self.bias = total, None, None
        return total


#: What goes from layer to layer: tensors, or values in a network that is fused.
Activation = TypeVar("Activation", Tensor, Value)


def convolve(conv: nn.Conv2d, x: Tensor) -> Value:
    """A convolution whose bias is still to be added."""
    out = functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return Value(out.contiguous(memory_format=torch.channels_last), bias=conv.bias)


def residual_block(block: ResnetBlock, x: Value, projections: Tensor, skip: Value | None) -> Value:
    """:meth:`ResnetBlock.forward` without dropout and with an output scale of 1."""
    h, x = _first_norm(block, x, skip)
    if block.resample is not None:
        x, h = Value(block.resampled(x.settle())), block.resampled(h)
    h = convolve(block.conv1, h).x
    time = projections.narrow(1, block.time_start, block.time_emb_proj.out_features)
    if block.scale_shift:
        scale, shift = time.chunk(2, dim=1)
        h = block.norm2(h, time=_for_all(block.conv1.bias, h), scale=scale, shift=shift)
    else:  # the projections contain the bias
        h = block.norm2(h, time=time)
    out = convolve(block.conv2, h)
    if block.conv_shortcut is None:
        return Value(out.x, x.x, _total(block, "out", out.bias, x.bias))
    weight = block.conv_shortcut.weight.flatten(1)  # [out_channels, in_channels]
    _matrix(out.x).addmm_(_matrix(x.settle()), weight.t())
    return Value(out.x, None, _total(block, "out", out.bias, block.conv_shortcut.bias))


def _first_norm(block: ResnetBlock, x: Value, skip: Value | None) -> tuple[Tensor, Value]:
    """The activated norm of a block's input, and the input: with that of a skip connection, if there is one."""
    if skip is None:
        whole = block.conv_shortcut is not None or block.resample is not None  # what reads x takes no bias
        return normalised(block.norm1, x, adds=whole and x.bias is not None), x
    if skip.residual is not None:
        skip.settle()
    bias = None
    if x.bias is not None or skip.bias is not None:
        bias = folded(block, "in", lambda: torch.cat([_bias(x), _bias(skip)]))
    h, joined = block.norm1.with_input(x.x, residual=x.residual, skip=skip.x, time=_for_all(bias, x.x))
    return h, Value(joined)


def normalised(norm: GroupNormAct, x: Value, *, adds: bool = False) -> Tensor:
    """The activated norm of a value; the value is added up if it has a residual, or if ``adds``."""
    time = _for_all(x.bias, x.x)
    if x.residual is None and not adds:
        plain: Tensor = norm(x.x, time=time)
        return plain
    out, total = norm.with_input(x.x, residual=x.residual, time=time)
    x.settle(total)
    return out


def attention_block(block: Attention, x: Value) -> Value:
    """:meth:`Attention.forward` with an output scale of 1."""
    normed = x.settle() if block.group_norm is None else normalised(block.group_norm, x)
    batch, channels, height, width = normed.shape
    tokens = _matrix(normed).view(batch, height * width, channels)
    layers = block.to_q, block.to_k, block.to_v
    weight = folded(block, "weight", lambda: torch.cat([layer.weight for layer in layers]))
    bias = folded(block, "bias", lambda: torch.cat([layer.bias for layer in layers]))
    q, k, v = functional.linear(tokens, weight, bias).chunk(3, dim=2)
    attended = attend(q, k, v, block.heads)
    result = block.to_out[0]
    assert isinstance(result, nn.Linear)
    # in place: nobody else reads what a residual block made for this one
    _matrix(x.x).addmm_(attended.reshape(-1, attended.shape[2]), result.weight.t())
    return Value(x.x, None, _total(block, "out", result.bias, x.bias))


def transformer(layer: Transformer, x: Value, keys_values: Tensor) -> Value:
    """:meth:`Transformer.forward`."""
    normed = normalised(layer.norm, x)
    batch, channels, height, width = normed.shape
    tokens = _matrix(normed).view(batch, height * width, channels)
    tokens = functional.linear(tokens, layer.proj_in.weight.flatten(1), layer.proj_in.bias)
    for block in layer.transformer_blocks:
        tokens = block(tokens, keys_values, joined=True)
    # in place, as in an attention block
    _matrix(x.x).addmm_(tokens.reshape(-1, channels), layer.proj_out.weight.flatten(1).t())
    return Value(x.x, None, _total(layer, "out", layer.proj_out.bias, x.bias))


def joined_queries(layer: SelfAttention, tokens: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, N, C] of tokens [B, N, C], by one matrix product."""
    layers = layer.to_q, layer.to_k, layer.to_v
    weight = folded(layer, "weight", lambda: torch.cat([each.weight for each in layers]))
    return functional.linear(tokens, weight).chunk(3, dim=2)


def downsampled(layer: Downsample, x: Value) -> Value:
    """:meth:`Downsample.forward`."""
    if not layer.pads_one_side:
        return convolve(layer.conv, x.settle())
    total, padded = kernels.add_bias_padded(x.x, x.bias, x.residual)
    x.settle(total)
    return convolve(layer.conv, padded)


def upsampled(layer: Upsample, x: Value) -> Value:
    """:meth:`Upsample.forward`."""
    return convolve(layer.conv, kernels.add_bias_doubled(x.x, x.bias, x.residual))


def projected(network: nn.Module, blocks: list[ResnetBlock], embedding: Tensor) -> Tensor:
    """The time projections [B, P] of all blocks, by one matrix product: with the bias of each block's first
    convolution, unless the block scales what that returns.
    """
    weight = folded(network, "weight", lambda: torch.cat([block.time_emb_proj.weight for block in blocks]))
    bias = folded(network, "bias", lambda: torch.cat([_time_bias(block) for block in blocks]))
    return functional.linear(embedding, weight, bias)


def _time_bias(block: ResnetBlock) -> Tensor:
    bias = block.time_emb_proj.bias
    if block.scale_shift or block.conv1.bias is None:
        return bias
    return (_wide(bias) + _wide(block.conv1.bias)).to(bias.dtype)


def folded(module: nn.Module, name: str, make: Callable[[], Tensor]) -> Tensor:
    """What was made of a module's weights under this name, or is made now; always now, if gradients may follow."""
    if torch.is_grad_enabled():
        return make()
    kept: dict[str, Tensor] = module.__dict__.setdefault("folded", {})
    if name not in kept:
        made = make().detach()
        if made.device.type not in ("cpu", "meta"):
            # kept once it is done: other threads read it on streams of their own
            torch.accelerator.current_stream(made.device).synchronize()
        kept[name] = made
    return kept[name]


def _total(module: nn.Module, name: str, *biases: Tensor | None) -> Tensor | None:
    """The sum of those biases that are there, in float32 at least, kept under a name; None if there is none."""
    given = [bias for bias in biases if bias is not None]
    if len(given) < 2:
        return given[0] if given else None
    return folded(module, name, lambda: torch.stack([_wide(bias) for bias in given]).sum(0))


def _bias(value: Value) -> Tensor:
    """In float32 at least, [C]; zeros if there is none."""
    return _wide(value.x.new_zeros(value.x.shape[1]) if value.bias is None else value.bias)


def _wide(bias: Tensor) -> Tensor:
    return bias.to(torch.promote_types(bias.dtype, torch.float32))


def _for_all(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """A bias [C] for every image of a batch, [B, C], without a copy."""
    return None if bias is None else bias.expand(len(x), len(bias))


def _matrix(x: Tensor) -> Tensor:
    """The memory of [B, C, H, W] in channels_last as [B H W, C]."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
