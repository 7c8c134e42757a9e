"""The options of this package, each declared once: how a model is run, and what may be asked of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from stepfusion import _checks

_MOST_LANES = 1 << 20


@dataclass(frozen=True)
class ExecutionOptions:
    """Where and how a model is run; "auto" leaves the choice to what is found on this machine.

    Attributes:
        device: "auto", or a device that PyTorch finds.
        dtype: of the network: "auto", "float32", "bfloat16" or "float16", or PyTorch's own; the state stays float32.
            On a CUDA device "float32" is without TF32, whatever PyTorch's switches say, and "tf32" is with it.
        backend: what runs the sampling step: "auto", "triton", "cpu" (C++) or "reference".
        network: how the network runs: "auto", "eager", "cpp", "compile", "graph", "compile+graph" or "openvino".
        batch: the most images at a time; None for the default of the device.
        invariant: keep one batch size for everything, so that an image's bits do not depend on it.

    Raises:
        TypeError, ValueError: naming ``batch`` or ``invariant``; the others are checked against the machine by
            :func:`stepfusion.execution.plan.make_plan`.
    """

    device: str | torch.device = "auto"
    dtype: str | torch.dtype = "auto"
    backend: str = "auto"
    network: str = "auto"
    batch: int | None = None
    invariant: bool = False

    def __post_init__(self) -> None:
        _checks.boolean("invariant", self.invariant)
        if self.batch is not None:
            _checks.integer("batch", self.batch, 1, _MOST_LANES)


class SamplingOptions(TypedDict, total=False):
    """What may be asked of a sample. ``n`` and ``table`` stand before these in every call.

    Attributes:
        sampler, steps, eta: of the table that is made if none is given (:meth:`stepfusion.Engine.table`).
        reuse: run the whole network at every so-manieth row of that table, and at the others only the outermost level
            of its UNet, with what the inner ones made before (Ma et al. 2024): faster, and not the same images. 1 is
            off, the default.
        seed: in [0, 2**64), one for all images or one each; 0 by default.
        indices: the images' numbers under their seeds, in [0, 2**32); 0 to n - 1 by default. An image is a function
            of model, table, seed, index, label and guidance, and of nothing else (to the bit with
            ``invariant=True``).
        labels: numbers or class names, one for all images or one each; the null label by default. A context UNet
            (:class:`stepfusion.networks.ContextUNet`) also takes contexts: float [K] for all or [n, K], zeros for
            none.
        prompt: a text for all images or one each, for models with a text encoder; no prompt by default.
        negative_prompt: what guidance leads away from, likewise, instead of no prompt.
        conditions: tensors by the names of the model's conditions (:attr:`stepfusion.ModelSpec.conditions`), each of
            one image's shape, for all, or with one for each image [n, ...]. They go before what the prompt gives.
        null_conditions: what guidance leads away from, likewise; what is not named is the image's own.
        guidance: classifier-free guidance scale (Ho & Salimans 2022), one for all images or one each; 1 is none.
        start: float [n, C, H, W], states to start from instead of noise.
        image: float [n, C, H, W] in [-1, 1], or [1, C, H, W] for all: images are made from this one, with
            ``strength``, ``mask`` or both (:mod:`stepfusion.lanes.editing`).
        strength: in (0, 1]: start from the image noised with its own counter-based noise, and walk the last
            ceil(strength * steps) rows of the table. At 1, the default with a mask, start from noise alone.
        mask: [n or 1, C or 1, H, W], 1 where to repaint and 0 where to keep, as in diffusers: every step noises the
            kept region again, and it ends exactly equal to the image.
        noise: float [steps, n, C, H, W], the z of every step instead of the counter-based one, of a kept region too;
            with a strength, as many steps as are walked.
    """

    sampler: str | None
    steps: int | None
    eta: float | None
    reuse: int | None
    seed: int | Sequence[int]
    indices: Sequence[int] | None
    labels: int | str | Sequence[int | str] | torch.Tensor | None
    prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    conditions: Mapping[str, torch.Tensor] | None
    null_conditions: Mapping[str, torch.Tensor] | None
    guidance: float | Sequence[float] | None
    start: torch.Tensor | None
    image: torch.Tensor | None
    strength: float | None
    mask: torch.Tensor | None
    noise: torch.Tensor | None
