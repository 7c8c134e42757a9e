"""A residual block of a UNet on a CPU: norms, activations, convolutions, shortcut and residual in one op.

The norms' moments are two passes over what they read; everything else of them is done on the way into the
convolutions (:mod:`winograd`), as the residual is on their way out. What was normalised is never stored, and neither
is the concatenation of x and skip.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library, weight_packing
from stepfusion.kernels.cpu.group_norm import rows_of
from stepfusion.kernels.cpu.winograd import check_transformed


@dataclass(frozen=True)
class ResnetWeights:
    """What a residual block from C to K channels is made of.

    Attributes:
        norm1_weight, norm1_bias: [C]. norm2_weight, norm2_bias: [K]. They have the dtype of conv1.
        conv1, conv2: from :func:`stepfusion.kernels.cpu.winograd.transform_weight`, of one scheme and dtype.
        conv1_bias, conv2_bias: float32 [K].
        shortcut: from :func:`pack_shortcut`, and shortcut_bias float32 [K]; None if C is K and the residual is x.
        groups: of both norms. eps: added to their variances.
        output_scale: what the sum is divided by.

    Raises:
        TypeError, ValueError: naming the attribute.
    """

    norm1_weight: Tensor
    norm1_bias: Tensor
    conv1: Tensor
    conv1_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    conv2: Tensor
    conv2_bias: Tensor
    shortcut: Tensor | None
    shortcut_bias: Tensor | None
    groups: int
    eps: float
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        packed = check_transformed("conv1", self.conv1)
        check_transformed("conv2", self.conv2)
        device, dtype = self.conv1.device, self.conv1.dtype
        inputs, outputs = packed.inputs, packed.outputs
        second = weight_packing.packed_shape(packed._replace(inputs=outputs), dtype)
        if self.groups < 1 or inputs % self.groups or outputs % self.groups:
            raise ValueError(f"groups must divide {inputs} and {outputs}, got {self.groups}")
        launch.check_like("conv2", self.conv2, second, device, (dtype,))
        for norm, channels in (("norm1", inputs), ("norm2", outputs)):
            for name in (f"{norm}_weight", f"{norm}_bias"):
                launch.check_like(name, getattr(self, name), (channels,), device, (dtype,))
        for name in ("conv1_bias", "conv2_bias"):
            launch.check_like(name, getattr(self, name), (outputs,), device, (torch.float32,))
        if self.shortcut is not None and self.shortcut_bias is not None:
            one = weight_packing.packed_shape(packed._replace(matrices=1), dtype)
            launch.check_like("shortcut", self.shortcut, one, device, (dtype,))
            launch.check_like("shortcut_bias", self.shortcut_bias, (outputs,), device, (torch.float32,))
        elif inputs != outputs or (self.shortcut is None) != (self.shortcut_bias is None):
            raise ValueError(f"shortcut and shortcut_bias must be given from {inputs} to {outputs} channels")

        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        library.check_contiguous(**{n: t for n, t in tensors.items() if isinstance(t, Tensor)})

    @property
    def inputs(self) -> int:
        """C."""
        return len(self.norm1_weight)

    @property
    def outputs(self) -> int:
        """K."""
        return len(self.norm2_weight)


def pack_shortcut(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [K, C, 1, 1] of a shortcut as :func:`resnet_block` reads it: one matrix (`weight_packing.pack`)."""
    return weight_packing.pack(weight.detach().flatten(1)[None], weight_packing.width(len(weight)), dtype)


def _empty(x: Tensor, bias: Tensor) -> Tensor:
    shape = (x.shape[0], len(bias), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@library.op("resnet_block_cpu", fake=lambda x, *others: _empty(x, others[11]))  # conv2_bias
def _resnet_block_cpu(
    x: Tensor,
    skip: Tensor | None,
    time: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    conv1: Tensor,
    conv1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    conv2: Tensor,
    conv2_bias: Tensor,
    shortcut: Tensor | None,
    shortcut_bias: Tensor | None,
    groups: int,
    eps: float,
    output_scale: float,
) -> Tensor:
    y = _empty(x, conv2_bias)
    if y.numel() > 0:
        x = x.contiguous(memory_format=torch.channels_last)
        skip = None if skip is None else skip.contiguous(memory_format=torch.channels_last)
        rows, strides = rows_of(time, scale, shift)
        first = norm1_weight, norm1_bias, conv1, conv1_bias
        second = norm2_weight, norm2_bias, conv2, conv2_bias
        batch, channels, height, width = x.shape
        skip_channels = 0 if skip is None else skip.shape[1]
        out, panels, products = y.shape[1], *conv1.shape[:2]
        sizes = batch, height, width, channels, skip_channels, out, products, out // panels, groups
        tensors = (x, skip, *rows, *first, *second, shortcut, shortcut_bias, torch.empty_like(y), y)
        library.call(x.dtype, "resnet_block", tensors, (*sizes, *strides), (eps, output_scale))
    return y


def resnet_block(
    x: Tensor,
    weights: ResnetWeights,
    *,
    skip: Tensor | None = None,
    time: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``(conv2(silu(norm2(h + time) * (1 + scale) + shift)) + shortcut([x, skip])) / output_scale``.

    h is ``conv1(silu(norm1([x, skip])))`` (Ho et al. 2020; scale and shift: Dhariwal & Nichol 2021, section 3.1).

    Args:
        x: [B, C1, H, W] on the CPU, read as channels_last; C1 a multiple of 16. All tensors have the weights' dtype.
        weights: of a block from C = C1 + C2 to K channels.
        skip: [B, C2, H, W] or None, C2 a multiple of 16.
        time, scale, shift: [B, K] or None, scale and shift together; rows may lie apart.

    Returns:
        [B, K, H, W] in channels_last. Rounded to its dtype are what enters a product, what leaves conv1 and the
        shortcut, and the result. An image's bits depend on neither its place in the batch nor the number of
        threads. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    dtype = weights.conv1.dtype
    for name, images in (("x", x), ("skip", skip)):
        if images is not None:
            launch.check_dtype(name, images, (dtype,))
            if images.ndim != 4 or images.shape[1] % library.LANES or images.shape[1] == 0:
                raise ValueError(f"{name} must be [B, C, H, W], C a multiple of 16, got {list(images.shape)}")
    inputs = x.shape[1]
    if skip is not None:
        inputs += skip.shape[1]
        launch.check_like("skip", skip, (x.shape[0], skip.shape[1], *x.shape[2:]), x.device)
    if inputs != weights.inputs:
        raise ValueError(f"x and skip must have {weights.inputs} channels together, as conv1 has, got {inputs}")
    for name, row in (("time", time), ("scale", scale), ("shift", shift)):
        if row is not None:
            launch.check_like(name, row, (x.shape[0], weights.outputs), x.device, (dtype,))
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got one of them")
    w = weights
    if skip is not None and w.shortcut is None:  # the residual is both
        x, skip = torch.cat((x, skip), dim=1), None
    y: Tensor = _resnet_block_cpu(
        x,
        skip,
        time,
        scale,
        shift,
        w.norm1_weight,
        w.norm1_bias,
        w.conv1,
        w.conv1_bias,
        w.norm2_weight,
        w.norm2_bias,
        w.conv2,
        w.conv2_bias,
        w.shortcut,
        w.shortcut_bias,
        w.groups,
        w.eps,
        w.output_scale,
    )
    return y
