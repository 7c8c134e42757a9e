"""The prompts that a command line gives, and the size of images that it asks for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from stepfusion.checkpoints.load import load_model
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.checkpoints.lora_files import Lora
from stepfusion.engine import Engine
from stepfusion.execution.decoder import decoded_shape
from stepfusion.lanes.editing import CONCATENATED

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def add_prompt_arguments(add: Callable[..., object]) -> None:
    """Declare ``--prompt`` and ``--negative``."""
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to show, of models with a text encoder; if repeated, taken in turn (default: none)",
    )
    add("--negative", metavar="TEXT", help="what guidance leads away from (default: no prompt)")


def add_size_argument(add: Callable[..., object]) -> None:
    """Declare ``--size``."""
    add(
        "--size",
        metavar="HxW",
        help="height and width in pixels, as in 512x768, of models of latents (default: the model's own)",
    )


def add_prompt_of_pictures(add: Callable[..., object], of: str) -> None:
    """Declare ``--prompt`` where each prompt is ``of`` one thing."""
    text = f"a prompt {of}, of models with a text encoder; may be repeated, and is then taken in turn (default: none)"
    add("--prompt", action="append", metavar="TEXT", help=text)


def chosen_prompts(engine: Engine, args: argparse.Namespace, count: int) -> list[str] | None:
    """The prompts of the command line, repeated to ``count``; None without.

    Raises:
        ValueError: the model takes none.
    """
    missing = getattr(engine.runners.prompts, "missing", None)
    for option, given in (("--prompt", args.prompt), ("--negative", getattr(args, "negative", None))):
        if given is not None and not engine.runners.takes_prompts:
            why = "" if missing is None else f": {missing}"
            raise ValueError(f"{option} was given, and this model has no text encoder{why}")
    return None if args.prompt is None else [args.prompt[i % len(args.prompt)] for i in range(count)]


def model_of_size(source: str, size: str, lora: Lora | None = None) -> tuple[LoadedModel, tuple[int, ...]]:
    """A model of latents, perhaps with LoRA weights, and the shape of its latents for images of this size, ``HxW``.

    Raises:
        ValueError: the size is none, or not one that the model can have.
    """
    found = _SIZE.fullmatch(size)
    if found is None:
        raise ValueError(f"--size must be height and width in pixels, as in 512x768, got {size!r}")
    height, width = int(found[1]), int(found[2])
    model = load_model(source, lora)
    spec = model.spec
    decode = model.around(spec).get("decode")
    if decode is None:
        raise ValueError(f"--size is for models of latents, and the images of this one are {_sides(spec.shape)}")
    if CONCATENATED in (one.name for one in spec.conditions) or spec.num_classes is not None:
        raise ValueError("--size was given, and this model has images of one size alone")
    factor = decoded_shape(decode, spec.shape)[1] // spec.shape[1]
    levels = getattr(getattr(model.network, "config", None), "num_levels", 1)
    least = factor << (levels - 1)  # a pixel of the UNet's lowest level
    if height % least or width % least:
        raise ValueError(f"--size must be multiples of {least} for this model, got {size}")
    return model, (spec.shape[0], height // factor, width // factor)


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))
