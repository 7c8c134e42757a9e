"""A network of ours as CPUs run it fastest, in float32 and bfloat16: by the C++ kernels.

Residual and attention blocks become one operator each, other 3x3 convolutions Winograd's, and the rest a matrix
product for the pixels under each output.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepfusion.kernels.cpu import attention, convolution, group_norm, resnet, winograd
from stepfusion.kernels.cpu.library import LANES
from stepfusion.kernels.cpu.winograd_matrices import F2, F4, UP, Scheme
from stepfusion.networks.blocks import Attention, Conditioned, Downsample, ResnetBlock, Upsample
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.time_conditioned import TimeConditioned

# Heights and widths at which F4 is used in bfloat16. Measured on the CIFAR-10 UNet at batch 8, one interleaved run,
# shortest of 25: F4 above 8 takes 64.8 ms (rms error 0.0071), F4 above 16 70.3 (0.0067), F4 from 9 to 16 73.9
# (0.0044), F2 alone 77.8 (0.0037; PyTorch's bfloat16 operators 0.0035). So F4 costs least accuracy at 16, where
# channels are many; over a loop of ten steps the errors of F4 at 32 exceed what the benchmarks accept.
_SIZES_OF_F4 = range(9, 17)

_TILES_A_MATRIX = 24  # 4 bytes of a weight at 10 GB/s take as long as its 24 products at 115 GFLOP/s

_BLOCKS = ResnetBlock, Attention, Upsample, Downsample
_PARTS = {*_BLOCKS, GroupNormAct, nn.Conv2d, nn.Linear, nn.SiLU, nn.Identity, nn.Dropout, nn.ModuleList}
_PREDICTING = "predict", "predict_keeping", "predict_outer"
_Shapes = tuple[torch.Size, ...]


class CpuResnetBlock(Conditioned):
    """A :class:`ResnetBlock` by :func:`stepfusion.kernels.cpu.resnet.resnet_block`, with the same arguments."""

    def __init__(self, block: ResnetBlock, scheme: Scheme) -> None:
        super().__init__()
        shortcut, norm, dtype = block.conv_shortcut, block.norm1, block.conv1.weight.dtype
        self.weights = resnet.ResnetWeights(
            norm1_weight=norm.weight.detach().contiguous(),
            norm1_bias=norm.bias.detach().contiguous(),
            conv1=winograd.transform_weight(block.conv1.weight, scheme, dtype),
            conv1_bias=_bias(block.conv1),
            norm2_weight=block.norm2.weight.detach().contiguous(),
            norm2_bias=block.norm2.bias.detach().contiguous(),
            conv2=winograd.transform_weight(block.conv2.weight, scheme, dtype),
            conv2_bias=_bias(block.conv2),
            shortcut=None if shortcut is None else resnet.pack_shortcut(shortcut.weight, dtype),
            shortcut_bias=None if shortcut is None else _bias(shortcut),
            groups=norm.num_groups,
            eps=norm.eps,
            output_scale=float(block.output_scale),
        )
        self._scale_shift = block.scale_shift
        self._columns = block.time_start, block.time_emb_proj.out_features

    def forward(self, x: Tensor, projections: Tensor, skip: Tensor | None = None) -> Tensor:
        time = projections.narrow(1, *self._columns)
        if self._scale_shift:
            scale, shift = time.chunk(2, dim=1)
            return resnet.resnet_block(x, self.weights, skip=skip, scale=scale, shift=shift)
        return resnet.resnet_block(x, self.weights, skip=skip, time=time)


class CpuAttention(nn.Module):
    """An :class:`Attention` by :func:`stepfusion.kernels.cpu.attention.attention_block`."""

    def __init__(self, block: Attention) -> None:
        super().__init__()
        result = block.to_out[0]
        assert isinstance(result, nn.Linear)
        layers = block.to_q, block.to_k, block.to_v, result
        weights = [layer.weight for layer in layers]
        norm = block.group_norm
        self.weights = attention.AttentionWeights(
            norm_weight=None if norm is None else norm.weight.detach().contiguous(),
            norm_bias=None if norm is None else norm.bias.detach().contiguous(),
            projections=attention.pack_projections(weights, block.heads, weights[0].dtype),
            biases=torch.stack([_bias(layer) for layer in layers]),
            heads=block.heads,
            groups=1 if norm is None else norm.num_groups,
            eps=0.0 if norm is None else norm.eps,
            output_scale=float(block.output_scale),
        )

    def forward(self, x: Tensor) -> Tensor:
        return attention.attention_block(x, self.weights)


class WinogradConv2d(nn.Module):
    """A 3x3 convolution with padding 1, of an image whose pixels are repeated in squares with the scheme `UP`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, scheme: Scheme) -> None:
        super().__init__()
        self.register_buffer("weight", winograd.transform_weight(conv.weight, scheme, conv.weight.dtype))
        self.register_buffer("bias", _bias(conv))

    def forward(self, x: Tensor) -> Tensor:
        return winograd.winograd_conv2d(x, self.weight, self.bias)


class GatheredConv2d(nn.Module):
    """A convolution with a square kernel; `before` and `after` zeros around the image."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, before: int, after: int) -> None:
        super().__init__()
        self.register_buffer("weight", convolution.pack_weight(conv.weight, conv.weight.dtype))
        self.register_buffer("bias", _bias(conv))
        self._window = {"kernel": conv.kernel_size[0], "stride": conv.stride[0], "before": before, "after": after}

    def forward(self, x: Tensor) -> Tensor:
        return convolution.gathered_conv2d(x, self.weight, self.bias, **self._window)


class CpuForm(NamedTuple):
    """A copy of a network, and whether kernels run every layer of `predict`: a compiler finds nothing to fuse."""

    network: nn.Module
    whole: bool


class CpuForms:
    """Makes copies of a float32 or bfloat16 network that run on the C++ kernels.

    A copy shares every parameter with the network and owns the weights of what it replaces, as the kernels read
    them; copies for other shapes share those if they use the same scheme: 1.8 times the bytes of a convolution's
    own weights with F2, 4 times with F4, and as many as the weights have elsewhere. Replaced are layers of
    :class:`TimeConditioned` networks only, where a kernel takes them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._made: dict[tuple[str, Scheme | None], nn.Module] = {}

    def __call__(self, tensors: tuple[Tensor, ...]) -> CpuForm | None:
        """The copy for inputs of these shapes; None for a network that is not ours."""
        if not is_ours(self._module):
            return None
        shared = {id(t): t for t in (*self._module.parameters(), *self._module.buffers())}
        form = copy.deepcopy(self._module, shared)
        shapes, foreign = _trace(self._module, tensors)
        whole = bool(shapes) and not foreign
        done: list[str] = []  # layers that kernels of ours run, with what is inside of them
        for name, given in shapes.items():
            if any(_is_inside(name, other) for other in done):
                continue
            layer, kept = self._layer(name, given), form.get_submodule(name)
            if layer is not None:
                form.set_submodule(name, layer)
            elif isinstance(kept, GroupNormAct) and given and group_norm.fits(given[0][1]):
                kept.fused_on_cpu = True
            else:
                whole = False
                continue  # with what is inside of it
            done.append(name)
        return CpuForm(form, whole)

    def _layer(self, name: str, shapes: _Shapes) -> nn.Module | None:
        """What replaces a layer whose inputs have these shapes, made once; None if nothing does."""
        found = _replacement(self._module.get_submodule(name), shapes)
        if found is None:
            return None
        scheme, make = found
        if (name, scheme) not in self._made:
            self._made[name, scheme] = make()
        return self._made[name, scheme]


def _replacement(layer: nn.Module, shapes: _Shapes) -> tuple[Scheme | None, Callable[[], nn.Module]] | None:
    """The scheme, if any, and the maker of what replaces a layer for inputs of these shapes; None if nothing does."""
    if not shapes or len(shapes[0]) != 4 or not _is_unchanged(layer):
        return None
    height, width = shapes[0][2:]
    if isinstance(layer, ResnetBlock) and _is_usual(layer, shapes):
        scheme = _scheme(layer.conv1.weight.dtype, shapes[0])
        return scheme, lambda: CpuResnetBlock(layer, scheme)
    if isinstance(layer, Attention) and layer.heads * layer.head_dim == shapes[0][1]:
        fits = attention.fits(shapes[0][1], layer.heads, height * width)
        return (None, lambda: CpuAttention(layer)) if fits else None
    if isinstance(layer, Upsample) and _fits_winograd(layer.conv):
        return UP, lambda: WinogradConv2d(layer.conv, UP)
    if isinstance(layer, Downsample):
        before, after = (0, 1) if layer.pads_one_side else 2 * (int(layer.conv.padding[0]),)
        return None, lambda: GatheredConv2d(layer.conv, before, after)
    if type(layer) is nn.Conv2d and _fits_winograd(layer):
        scheme = _scheme(layer.weight.dtype, shapes[0])
        return scheme, lambda: WinogradConv2d(layer, scheme)
    if type(layer) is nn.Conv2d and _is_square(layer):
        padding = int(layer.padding[0])
        return None, lambda: GatheredConv2d(layer, padding, padding)
    return None


def is_ours(module: nn.Module) -> bool:
    """Whether a network is ours, or has one inside."""
    return any(isinstance(network, TimeConditioned) for network in module.modules())


def _scheme(dtype: torch.dtype, shape: torch.Size) -> Scheme:
    """How the 3x3 convolutions of images of this shape are computed.

    F2 and F4 round little in float32, and it is the one that takes less time: a product's time grows with the number
    of its tiles, and reading its weights takes as long as some tiles do.
    """
    batch, _, height, width = shape
    if dtype == torch.bfloat16:
        return F4 if max(height, width) in _SIZES_OF_F4 else F2

    def cost(scheme: Scheme) -> int:
        tiles = batch * -(-height // scheme.step) * -(-width // scheme.step)
        return scheme.products * (tiles + _TILES_A_MATRIX)

    return min(F2, F4, key=cost)


def _is_unchanged(layer: nn.Module) -> bool:
    """Whether a layer does what its class says: nothing in it is of a subclass, hooked, or given another forward."""
    return all(
        type(part) in _PARTS
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        and not (isinstance(part, nn.Dropout) and part.training and part.p > 0)
        for part in layer.modules()
    )


def _is_usual(block: ResnetBlock, shapes: _Shapes) -> bool:
    """Whether a residual block is one that the kernel knows; it takes x, the projections, and perhaps a skip."""
    smooth = isinstance(block.norm1.act, nn.SiLU) and isinstance(block.norm2.act, nn.SiLU)
    channels = shapes[0][1], *(shape[1] for shape in shapes[2:])
    whole = (
        all(count % LANES == 0 for count in channels) and _fits_winograd(block.conv1) and _fits_winograd(block.conv2)
    )
    first, second = ((norm.num_groups, norm.eps) for norm in (block.norm1, block.norm2))
    return block.resample is None and smooth and whole and first == second


def _fits_winograd(conv: nn.Conv2d) -> bool:
    usual = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)
    return usual and _is_plain(conv) and winograd.fits(conv.in_channels, conv.out_channels)


def _is_square(conv: nn.Conv2d) -> bool:
    same = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
    return same and _is_plain(conv) and not isinstance(conv.padding, str)


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """float32 [K]; zeros if a layer has none."""
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
    return bias.float().contiguous()


def _trace(module: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[dict[str, _Shapes], bool]:
    """What `predict` of our networks runs: the shapes that each of its blocks, norms and layers takes, by its name.

    In the order of their calls: blocks before what is inside of them. Also, whether layers outside of our networks
    ran. Found with the first image of the batch. (The meta device would do without one, but PyTorch imports its
    compiler for it, which takes longer.)
    """
    batch = len(tensors[0])
    shadow = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    for layer in shadow.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    roots = {name: network for name, network in shadow.named_modules() if isinstance(network, TimeConditioned)}
    predicting, shapes, foreign = False, dict[str, _Shapes](), False

    for network, name in itertools.product(roots.values(), _PREDICTING):
        if not hasattr(network, name):
            continue

        method: Callable[..., Tensor] = getattr(network, name)

        def predict(*inputs: Tensor, original: Callable[..., Tensor] = method) -> Tensor:
            nonlocal predicting
            before, predicting = predicting, True
            try:
                return original(*inputs)
            finally:
                predicting = before

        setattr(network, name, predict)
    for name, layer in shadow.named_modules():
        if not isinstance(layer, (*_BLOCKS, GroupNormAct)) and next(layer.children(), None) is not None:
            continue

        def record(_: nn.Module, inputs: tuple[object, ...], name: str = name) -> None:
            nonlocal foreign
            if predicting:
                given = [tensor.shape for tensor in inputs if isinstance(tensor, Tensor)]
                shapes[name] = tuple(torch.Size((batch * shape[0], *shape[1:])) for shape in given)
            foreign = foreign or not any(_is_inside(name, root) for root in roots)

        layer.register_forward_pre_hook(record)
    shadow(*(tensor[:1] for tensor in tensors))
    return shapes, foreign


def _is_inside(name: str, of: str) -> bool:
    return not of or name == of or name.startswith(f"{of}.")
