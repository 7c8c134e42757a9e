"""The blocks of the UNets as a GPU runs them with fewest launches: nothing is added in a pass of its own.

A :class:`Value` between two layers is what a convolution returned and what is still to be added to it. Whoever reads
it next adds that: a norm (:func:`stepfusion.kernels.add_group_norm_silu`), or what resamples it
(:func:`stepfusion.kernels.add_bias_doubled`). Products with the weights of a shortcut and of an attention block's
output are added in place, by the matrix product itself, or on the way to a resampled image
(:func:`stepfusion.kernels.add_projection_doubled`); a bias that a shortcut has still to read goes into its own. The
bias of the convolution between the two norms of a block is part of the time projections.

Sums of biases and weights that stand side by side are made when they are first needed, and kept with their block: the
weights may not change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import kernels
from stepfusion.kernels.add_projection import projects
from stepfusion.networks.attention import attend

if TYPE_CHECKING:
    from stepfusion.networks.blocks import Attention, Downsample, ResnetBlock, Upsample
    from stepfusion.networks.norm import GroupNormAct
    from stepfusion.networks.unet2d_condition.transformer import SelfAttention, Transformer


class Projection(NamedTuple):
    """The 1x1 convolution of concat(x, skip) with ``weight`` [N, K]: x and skip as those of :class:`Value`."""

    weight: Tensor
    x: Tensor
    skip: Tensor | None = None


@final
class Value:
    """``x + projection + residual + bias``: x and residual [B, C, H, W] in channels_last, bias [C].

    Several may refer to one value, as a skip connection does: once somebody has added it up, all have the sum.
    """

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
        projection: Projection | None = None,
    ) -> None:
        self._x, self.residual, self.bias, self._projection = x, residual, bias, projection

    @property
    def x(self) -> Tensor:
        """What a layer returned, with its projection, which is added in place."""
        if self._projection is not None:
            weight, x, skip = self._projection
            if skip is None:
                _matrix(self._x).addmm_(_matrix(x), weight.t())
            else:
                kernels.add_projection_(self._x, x, weight, skip=skip)
            self._projection = None
        return self._x

    def settle(self, total: Tensor | None = None) -> Tensor:
        """The sum, which is ``total`` if it was made elsewhere."""
        if total is None:
            total = self.x
            if self.residual is not None or self.bias is not None:
                total = kernels.add_bias(self.x, self.bias, self.residual)
        self._x, self.residual, self.bias, self._projection = total, None, None, None
        return total

    def doubled(self) -> Tensor:
        """The sum with every pixel in a square of 2 x 2."""
        if self._projection is not None and self.residual is None and projects(self._x.dtype, self._x.shape[1]):
            weight, x, skip = self._projection
            return kernels.add_projection_doubled(self._x, x, weight, skip=skip, bias=self.bias)
        return kernels.add_bias_doubled(self.x, self.bias, self.residual)


#: What goes from layer to layer: tensors, or values in a network that is fused.
Activation = TypeVar("Activation", Tensor, Value)


def convolve(conv: nn.Conv2d, x: Tensor) -> Value:
    """A convolution whose bias is still to be added."""
    out = functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return Value(out.contiguous(memory_format=torch.channels_last), bias=conv.bias)


def residual_block(block: ResnetBlock, x: Value, projections: Tensor, skip: Value | None) -> Value:
    """:meth:`ResnetBlock.forward` without dropout and with an output scale of 1."""
    h, x, joined = _first_norm(block, x, skip)
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
        assert joined is None  # without a shortcut a block adds its input, which is one tensor then
        return Value(out.x, x.x, _total(block, "out", out.bias, x.bias))
    weight = block.conv_shortcut.weight.flatten(1)  # [out_channels, in_channels]
    bias = _total(block, "out", out.bias, block.conv_shortcut.bias, _projected_bias(block, weight, x.bias))
    return Value(out.x, None, bias, Projection(weight, x.x, joined))


def _first_norm(block: ResnetBlock, x: Value, skip: Value | None) -> tuple[Tensor, Value, Tensor | None]:
    """The activated norm of a block's input, the input, and what is still to be joined to it.

    The input's bias is that of all its channels.
    """
    if skip is None:
        # what resamples x takes no bias
        return normalised(block.norm1, x, adds=block.resample is not None and x.bias is not None), x, None
    if skip.residual is not None:
        skip.settle()
    bias = None
    if x.bias is not None or skip.bias is not None:
        bias = folded(block, "in", lambda: torch.cat([_bias(x), _bias(skip)]))
    time = _for_all(bias, x.x)
    if x.residual is None and block.resample is None and _joins(block, x):
        h = block.norm1(x.x, skip=skip.x, time=time)
        return h, Value(x.x, bias=bias), skip.x
    h, joined = block.norm1.with_input(x.x, residual=x.residual, skip=skip.x, time=time)
    return h, Value(joined), None


def _joins(block: ResnetBlock, x: Value) -> bool:
    """Whether the product of a block's shortcut reads its two inputs where they are."""
    return block.conv_shortcut is not None and projects(x.x.dtype, block.conv_shortcut.out_channels)


def _projected_bias(block: ResnetBlock, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """What a bias [K] that is still to be added to the input of a shortcut adds to its output [N]."""
    return None if bias is None else folded(block, "through", lambda: _wide(weight) @ _wide(bias))


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
    # to x itself, in place: nobody else reads what a residual block made for this one
    return Value(x.x, None, _total(block, "out", result.bias, x.bias), Projection(result.weight, _image(attended, x)))


def transformer(layer: Transformer, x: Value, keys_values: Tensor) -> Value:
    """:meth:`Transformer.forward`."""
    normed = normalised(layer.norm, x)
    batch, channels, height, width = normed.shape
    tokens = _matrix(normed).view(batch, height * width, channels)
    tokens = functional.linear(tokens, layer.proj_in.weight.flatten(1), layer.proj_in.bias)
    for block in layer.transformer_blocks:
        tokens = block(tokens, keys_values, joined=True)
    # in place, as in an attention block
    projection = Projection(layer.proj_out.weight.flatten(1), _image(tokens, x))
    return Value(x.x, None, _total(layer, "out", layer.proj_out.bias, x.bias), projection)


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
    return convolve(layer.conv, x.doubled())


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


def _image(tokens: Tensor, like: Value) -> Tensor:
    """Tokens [B, H W, C] as an image [B, C, H, W] in channels_last, whose height and width are those of a value."""
    batch, _, height, width = like.x.shape
    return tokens.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _matrix(x: Tensor) -> Tensor:
    """The memory of [B, C, H, W] in channels_last as [B H W, C]."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
