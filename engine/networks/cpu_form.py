"""A network of ours as CPUs that multiply bfloat16 matrices run it fastest: by C++ kernels.

3x3 convolutions by Winograd's algorithm, and group norms with what surrounds them in one kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from stepfusion.kernels import winograd
from stepfusion.networks.blocks import Upsample
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.time_conditioned import TimeConditioned

# Heights and widths at which F4 is used. Measured on the CIFAR-10 UNet at batch 8, one interleaved run, shortest of
# 15: F4 above 8 takes 85.9 ms (rms error 0.0072), F4 above 16 92.8 (0.0068), F2 alone 95.6 (0.0038). So F4 gains most
# at 16, where channels are many, and costs most accuracy at 32.
_SIZES_OF_F4 = range(9, 17)


class WinogradConv2d(nn.Module):
    """A 3x3 convolution with padding 1: x [B, C, H, W] -> [B, K, H', W'], bfloat16.

    Args:
        weight: from :func:`stepfusion.kernels.winograd.transform_weight`. bias: float32 [K].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return winograd.winograd_conv2d(x, self.weight, self.bias)


class CpuForms:
    """Makes copies of a bfloat16 network that run on the C++ kernels.

    A copy shares every parameter with the network and owns the transformed weights, which copies for other shapes
    share where they use the same scheme: 1.8 times the bytes of a convolution's own weights with F2, 4 times with F4,
    once with an upsampling. Replaced are, in :class:`TimeConditioned` networks only, convolutions of
    stride 1 between numbers of channels that are multiples of 16, and :class:`Upsample`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._made: dict[tuple[str, str], WinogradConv2d] = {}

    def __call__(self, tensors: tuple[Tensor, ...]) -> nn.Module | None:
        """The copy for inputs of these shapes; None for a network that is not ours."""
        if not any(isinstance(network, TimeConditioned) for network in self._module.modules()):
            return None
        sizes = _input_sizes(self._module, tensors)
        shared = {id(t): t for t in chain(self._module.parameters(), self._module.buffers())}
        form = copy.deepcopy(self._module, shared)
        for name, size in sizes.items():
            form.set_submodule(name, self._layer(name, size))
        for norm in form.modules():
            if isinstance(norm, GroupNormAct):
                norm.fused_on_cpu = True
        return form

    def _layer(self, name: str, size: tuple[int, int]) -> WinogradConv2d:
        layer = self._module.get_submodule(name)
        scheme = winograd.F4 if max(size) in _SIZES_OF_F4 else winograd.F2
        if isinstance(layer, Upsample):
            layer, scheme = layer.conv, winograd.UP
        assert isinstance(layer, nn.Conv2d)
        if (name, scheme.name) not in self._made:
            weight = winograd.transform_weight(layer.weight, scheme)
            bias = weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
            self._made[name, scheme.name] = WinogradConv2d(weight, bias.float())
        return self._made[name, scheme.name]


def _input_sizes(module: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, tuple[int, int]]:
    """Height and width of the input of every layer to replace, by its name; found on the meta device."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    memo |= {id(b): b.to("meta") for b in module.buffers()}
    shadow = copy.deepcopy(module, memo)
    sizes: dict[str, tuple[int, int]] = {}
    for name, layer in _replaceable(shadow):

        def record(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            sizes[name] = (inputs[0].shape[2], inputs[0].shape[3])

        layer.register_forward_pre_hook(record)
    shadow(*(tensor.to("meta") for tensor in tensors))
    return sizes


def _replaceable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for root, network in module.named_modules():
        if isinstance(network, TimeConditioned):
            inside: set[str] = set()
            for name, layer in network.named_modules(prefix=root):
                if isinstance(layer, Upsample) and _fits(layer.conv):
                    inside.add(f"{name}.conv")
                    yield name, layer
                elif name not in inside and type(layer) is nn.Conv2d and _fits(layer):
                    yield name, layer


def _fits(conv: nn.Conv2d) -> bool:
    usual = conv.kernel_size == (3, 3) and conv.stride == conv.dilation == (1, 1) and conv.padding == (1, 1)
    plain = conv.groups == 1 and conv.padding_mode == "zeros"
    return usual and plain and winograd.fits(conv.in_channels, conv.out_channels)
