"""A network as an engine wants it: on its device, in its dtype, laid out and fused for speed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stepfusion.networks.adm.unet import ADMUNet
from stepfusion.networks.blocks import Attention, ResnetBlock
from stepfusion.networks.dit.network import DiT
from stepfusion.networks.layer_norm import LayerNormModulate
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion.networks.unet2d.unet import UNet2D
from stepfusion.networks.unet2d_condition.unet import UNet2DCondition


def prepare_network(
    network: nn.Module, device: torch.device, dtype: torch.dtype, *, fused: bool, copied: bool = False
) -> nn.Module:
    """The network in eval mode on a device; a copy, unless it is already as it should be and ``copied`` is False.

    Our own networks get channels_last weights, which makes every activation NHWC, and with ``fused`` the fused
    kernels: biases and weights that stand side by side are then joined, and the weights may not change afterwards.

    Raises:
        TypeError: the network cannot be copied.
    """
    ours = isinstance(network, TimeConditioned)
    at_home = not network.training and all(
        _at_home(tensor, device, dtype, ours) for tensor in (*network.parameters(), *network.buffers())
    )
    if not copied and at_home and all(norm.fused == fused for norm in _norms(network)):
        return network
    try:
        network = copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:  # PyTorch copies no tensor that a graph made, Python no lock or file
        raise TypeError(f"model cannot be copied ({' '.join(str(error).split())}); copy=False may do") from error
    network = network.to(device, dtype).eval()
    if ours:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse(network, fused)
    return network


def fuse(network: nn.Module, fused: bool) -> None:
    """Let the networks of ours in a module run by the fused kernels, or by PyTorch's operators."""
    for norm in _norms(network):
        norm.fused = fused
    for part in network.modules():
        part.__dict__.pop("folded", None)
        if isinstance(part, UNet2D | ADMUNet | UNet2DCondition | DiT):
            part.fused = fused and all(map(_is_plain, part.modules()))
            for block in part.modules():
                if isinstance(block, ResnetBlock):
                    block.time_has_bias = part.fused and not block.scale_shift


def _is_plain(part: nn.Module) -> bool:
    """Whether a part of a network does what its class says, as :mod:`stepfusion.networks.fused` does it."""
    if "forward" in vars(part):
        return False
    if isinstance(part, ResnetBlock | Attention):
        return type(part) in (ResnetBlock, Attention) and part.output_scale == 1
    return type(part).__module__.startswith(("stepfusion.networks.", "torch.nn.modules."))


def _norms(network: nn.Module) -> list[GroupNormAct | LayerNormModulate]:
    return [module for module in network.modules() if isinstance(module, GroupNormAct | LayerNormModulate)]


def _at_home(tensor: Tensor, device: torch.device, dtype: torch.dtype, nhwc: bool) -> bool:
    if tensor.device != device or (tensor.is_floating_point() and tensor.dtype != dtype):
        return False
    return not nhwc or tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
