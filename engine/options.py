"""The options of this package, each declared once: how a model is run, and what may be asked of a sample."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints

import torch
from numpy.typing import NDArray
from PIL import Image

from stepfusion import _checks

_MOST_LANES = 1 << 20

# What a type checker and an editor know of names; tests/test_types.py compares them with what is registered.

Sampler = Literal[
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler_ancestral",
    "euler",
    "heun",
    "dpmpp_1s",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3s",
    "dpmpp_3m",
    "unipc",
    "deis",
    "ipndm",
    "plms",
    "consistency",
    "lcm",
    "tcd",
    "flow_sde",
    "ddim_inversion",
]
Spacing = Literal["leading", "trailing", "linspace", "karras", "exponential", "lambda", "beta", "linear", "uniform"]
Prediction = Literal["epsilon", "sample", "v_prediction", "edm", "consistency", "flow"]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
SolverType = Literal["midpoint", "heun"]
Variant = Literal["bh1", "bh2"]
Compat = Literal["diffusers", "guided-diffusion"]
Backend = Literal["auto", "triton", "cpu", "reference"]
NetworkMode = Literal["auto", "eager", "cpp", "compile", "graph", "compile+graph", "openvino"]
DType = Literal["auto", "float32", "bfloat16", "float16", "tf32"]

#: A picture, or several of them: as images and masks are given.
Picture = str | os.PathLike[str] | Image.Image
Pictures = torch.Tensor | Picture | Sequence[Picture]


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


@dataclass(frozen=True)
class Option:
    """What people are told of an option of a sampler's table.

    Attributes:
        text: what it does, as a help text says it.
        value: what stands for its value there.
    """

    text: str
    value: str


class _Steps(TypedDict, total=False):
    sampler: Annotated[Sampler | None, Option("which sampler", "NAME")]
    steps: Annotated[int | None, Option("how many steps", "K")]


class StepOptions(TypedDict, total=False):
    """The options of samplers that a request may give; None is the sampler's or the model's own.

    Each is declared here once. The command line (``--s-churn``) and HTTP (``"s_churn"``) make theirs of these, and
    which sampler takes which its function says (:func:`stepfusion.samplers.registry.options_of`).
    """

    eta: Annotated[float | None, Option("how much noise steps add: from 0, none, to 1, as much as ddpm's", "E")]
    spacing: Annotated[Spacing | None, Option("how the steps are spread over the levels of noise", "NAME")]
    timesteps: Annotated[
        Sequence[int] | NDArray[Any] | str | None, Option("the timesteps to visit, in place of steps", "SECTIONS")
    ]
    levels: Annotated[
        Sequence[float] | NDArray[Any] | None,
        Option(
            "the levels to visit (sigma of EDM, t of flow matching), decreasing, in place of steps, on paths without "
            "timesteps",
            "LIST",
        ),
    ]
    rho: Annotated[float | None, Option("how strongly the spacing karras crowds low levels of noise", "R")]
    lambda_min_clipped: Annotated[float | None, Option("the noisiest level, as log(signal / noise)", "L")]
    final_level: Annotated[
        float | None, Option("the level where the last step ends, on paths without timesteps", "LEVEL")
    ]
    guidance_interval: Annotated[
        Sequence[float] | None, Option("guide only between these two levels or timesteps", "LOW,HIGH")
    ]
    guidance_rescale: Annotated[
        float | None,
        Option("rescale guided predictions so much, from 0 to 1, against images that are too bright", "P"),
    ]
    order: Annotated[int | None, Option("the solver's order", "P")]
    lower_order_final: Annotated[bool | None, Option("whether the last steps are of lower order", "YES")]
    solver_type: Annotated[SolverType | None, Option("the form of the second-order term", "TYPE")]
    variant: Annotated[Variant | None, Option("the form of UniPC's B", "NAME")]
    predict_x0: Annotated[bool | None, Option("whether UniPC works with x0, or else with the noise", "YES")]
    variance: Annotated[Variance | None, Option("which variance the steps have", "NAME")]
    v_posterior: Annotated[float | None, Option("the part of beta in the variance fixed_small, from 0 to 1", "V")]
    s_churn: Annotated[float | None, Option("how much noise EDM's stochastic sampler adds before its steps", "S")]
    s_min: Annotated[float | None, Option("the lowest sigma at which noise is added before a step", "SIGMA")]
    s_max: Annotated[float | None, Option("the highest sigma at which noise is added before a step", "SIGMA")]
    s_noise: Annotated[float | None, Option("the standard deviation of the noise that is added", "S")]
    original_steps: Annotated[int | None, Option("how many steps a latent consistency model was distilled from", "N")]
    compat: Annotated[
        Compat | None,
        Option("take the timesteps, and round, as this library does, to the bit where it can", "LIBRARY"),
    ]


class SamplerOptions(StepOptions, total=False):
    """What :meth:`stepfusion.Engine.table` takes: beside a request's options those that follow from the model.

    Here None is a value of its own: no clip, or no threshold, whatever the model says.
    """

    prediction: Prediction | None
    clip: float | None
    threshold: float | None
    sample_max_value: float
    steps_offset: int
    final_alpha_cumprod: float | None
    rederive_eps: bool | None
    train_levels: int
    timestep_scaling: float
    evaluate_at: Literal["source", "target"]


class TableOptions(_Steps, StepOptions, total=False):
    """The sampler's table that a request asks for.

    Attributes:
        reuse: run the whole network at every so-manieth row of that table, and at the others only the outermost level
            of its UNet, with what the inner ones made before (Ma et al. 2024): faster, and not the same images. 1 is
            off, the default.
    """

    reuse: Annotated[
        int | None,
        Option(
            "run the whole UNet at every N-th step, and its outermost level at the others: faster, other images", "N"
        ),
    ]


class SamplingOptions(TableOptions, total=False):
    """What may be asked of a sample. ``n`` and ``table`` stand before these in every call.

    Attributes:
        sampler, steps, eta, spacing and so on, reuse: of the table that is made if none is given: the options of
            :class:`TableOptions`.
        seed: in [0, 2**64), one for all images or one each; 0 by default. None draws one for all, which the
            progress bar and :attr:`stepfusion.Request.seeds` tell.
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
        image: float [n, C, H, W] in [-1, 1], or [1, C, H, W] for all; or a picture of the model's size, a
            ``PIL.Image`` or the path of a file, for all, or a list of one each: images are made from this one, with
            ``strength``, ``mask`` or both (:mod:`stepfusion.lanes.editing`).
        strength: in (0, 1]: start from the image noised with its own counter-based noise, and walk the last
            ceil(strength * steps) rows of the table, but not Heun's corrector without its predictor. At 1, the
            default with a mask, start from noise alone.
        mask: [n or 1, C or 1, H, W], 1 where to repaint and 0 where to keep, as in diffusers: every step noises the
            kept region again, and it ends exactly equal to the image. Or pictures, as for ``image``: bright where to
            repaint, and dark where to keep.
        noise: float [steps, n, C, H, W], the z of every step instead of the counter-based one, of a kept region too;
            with a strength, as many steps as are walked.
    """

    seed: int | Sequence[int] | None
    indices: Sequence[int] | None
    labels: int | str | Sequence[int | str] | torch.Tensor | None
    prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    conditions: Mapping[str, torch.Tensor] | None
    null_conditions: Mapping[str, torch.Tensor] | None
    guidance: float | Sequence[float] | None
    start: torch.Tensor | None
    image: Pictures | None
    strength: float | None
    mask: Pictures | None
    noise: torch.Tensor | None


def random_seed() -> int:
    """A seed that nobody chose, in [0, 2**53): a number that JSON and spreadsheets keep exactly."""
    return secrets.randbelow(1 << 53)


#: The names of :class:`TableOptions`, and of :class:`StepOptions`.
TABLE_OPTIONS = tuple(TableOptions.__annotations__)
STEP_OPTIONS = tuple(StepOptions.__annotations__)


@dataclass(frozen=True)
class DeclaredOption:
    """An option of :class:`TableOptions` as it is declared: its name, what it takes, what people are told.

    ``kind`` is int, float, bool, str (a text or a list of timesteps) or list (of numbers); ``choices`` are the names
    that it takes, if it takes names.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    option: Option


@cache
def table_option(name: str) -> DeclaredOption:
    """The declaration of an option of a table; KeyError if there is none of this name."""
    hint, option = get_args(get_type_hints(TableOptions, include_extras=True)[name])
    kinds = [one for one in get_args(hint) if one is not NoneType]
    choices = next((get_args(one) for one in kinds if get_origin(one) is Literal), ())
    kind = str if choices or str in kinds else kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) else list
    return DeclaredOption(name, kind, choices, option)
