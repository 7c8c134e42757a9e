"""What commands have in common: which model, which sampler, where and how it runs, and what figures need."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

from stepfusion import _checks
from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.commands.prompts import model_of_size
from stepfusion.commands.provenance import add_metadata_argument
from stepfusion.commands.threads import add_threads_argument, use_threads
from stepfusion.engine import Engine
from stepfusion.execution.plan import BACKENDS, DTYPES, NETWORK_MODES, TF32
from stepfusion.files.images import CHANNELS
from stepfusion.options import TABLE_OPTIONS, ExecutionOptions, TableOptions, table_option
from stepfusion.samplers.registry import OFFERED, options_of
from stepfusion.samplers.table_request import TableRequest, takers_of

_Number = TypeVar("_Number", int, float)
_MOST = 1 << 16
_FIRST = ("sampler", "steps", "spacing", "eta", "timesteps", "reuse", "compat")  # what most people look for
_FEW = 8  # samplers that a help text names
_MANY = 30  # choices that it does not
#: What a help text says of defaults that follow from the model.
_DEFAULTS = {
    "sampler": ", of those that the path of the model has (default: what the model says, or heun for EDM, euler for "
    "flow matching, else ddim)",
    "steps": " (default: 50; 18 for heun, 2 or 4 for samplers of distilled models, and for ddpm all timesteps of the "
    "model)",
    "spacing": " (default: the model's own)",
    "timesteps": ": guided-diffusion's respacing, in which 10,10,5 takes so many of each third of the timesteps, "
    "from the data on, and ddim25 strides through them (default: evenly spaced steps)",
    "reuse": " (default: the whole UNet at every step)",
}


def add_model_argument(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    """Declare the model."""
    names = ", ".join(bundled_models()) or "none in this installation"
    text = f"a bundled model ({names}), or the path of a diffusers model directory"
    parser.add_argument("model", nargs=nargs, help=text)


def add_sampler_arguments(parser: argparse.ArgumentParser, title: str = "how to sample") -> None:
    """Declare the sampler and its options, which :func:`table_request` reads, in two groups of the help."""
    add = parser.add_argument_group(title).add_argument
    for name in _FIRST:
        _add_table_option(add, name)
    add = parser.add_argument_group("options of single samplers and paths").add_argument
    for name in TABLE_OPTIONS:
        if name not in _FIRST:
            _add_table_option(add, name)


def _add_table_option(add: Callable[..., object], name: str) -> None:
    """Declare one option of a table as :class:`stepfusion.options.TableOptions` has it."""
    declared = table_option(name)
    option, choices = "--" + name.replace("_", "-"), OFFERED if name == "sampler" else declared.choices
    text = declared.option.text + _DEFAULTS.get(name, _defaults_of(name)).replace("%", "%%")
    if choices:
        add(option, choices=choices, metavar=None if len(choices) < _MANY else declared.option.value, help=text)
        return
    kind = {bool: _yes_or_no, list: partial(_levels, option)}.get(declared.kind, declared.kind)
    metavar = "{yes,no}" if declared.kind is bool else declared.option.value
    add(option, type=kind, metavar=metavar, help=text)


def _defaults_of(name: str) -> str:
    """Which samplers take an option, if few do, and what it is by default."""
    takers = takers_of(name)
    usual = {sampler: options_of(sampler)[name] for sampler in takers}
    if len(takers) > _FEW:
        return " (default: the model's or the sampler's own)"
    if len(set(usual.values())) == 1:
        one = next(iter(usual.values()))
        return f"; of {', '.join(takers)}" + (" (default: none)" if one is None else f" (default: {_text(one)})")
    return "; of " + ", ".join(f"{sampler} (default: {_text(value)})" for sampler, value in usual.items())


def _text(value: object) -> str:
    """A default as one would type it."""
    if value is None:
        return "as its steps ask"
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"must be yes or no, got {text!r}")
    return text == "yes"


def _levels(option: str, text: str) -> list[float]:
    try:
        return numbers(option, text, float, "numbers")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def table_request(args: argparse.Namespace) -> TableRequest:
    """The table that ``args`` ask for; ValueError if an option is not one of its sampler's."""
    asked: TableOptions = {name: getattr(args, name) for name in TABLE_OPTIONS}  # type: ignore[assignment]
    request = TableRequest(**asked)
    request.check("--")
    return request


def add_device_argument(add: Callable[..., object]) -> None:
    """Declare the device, by the ``add_argument`` of a parser or of a group."""
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")


def add_path_arguments(add: Callable[..., object]) -> None:
    """Declare the network's dtype, and which path runs the step and the network."""
    add(
        "--dtype",
        choices=("auto", *DTYPES, TF32),
        default="auto",
        help="the number format of the network's arithmetic (default: %(default)s)",
    )
    add("--backend", choices=BACKENDS, default="auto", help="what runs the sampling step (default: %(default)s)")
    add("--network", choices=NETWORK_MODES, default="auto", help="how the network runs (default: %(default)s)")


def add_lora_argument(add: Callable[..., object]) -> None:
    """Declare ``--lora``, which :func:`chosen_lora` reads."""
    text = "LoRA weights to add to the model's, and how strongly (default: 1)"
    add("--lora", metavar="FILE[:SCALE][,FILE...]", help=text)


def chosen_lora(args: argparse.Namespace) -> list[tuple[str, float]] | None:
    """The LoRA files of a command line with their scales; None without. ValueError if a scale is no number."""
    if getattr(args, "lora", None) is None:
        return None
    chosen = []
    for one in args.lora.split(","):
        path, found, scale = one.rpartition(":")
        named = (path, scale) if found and not scale.endswith(".safetensors") else (one, "1")
        chosen.append((named[0], numbers("--lora", named[1], float, "files, each with a number after a colon")[0]))
    return chosen


def execution_options(args: argparse.Namespace) -> ExecutionOptions:
    """Where and how ``args`` say that the model runs; what a command does not declare keeps its default.

    Raises:
        TypeError, ValueError: naming the option that is out of range.
    """
    names = ("device", "dtype", "backend", "network", "batch", "invariant")
    return ExecutionOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def open_engine(args: argparse.Namespace) -> Engine:
    """The engine that ``args`` describe, with as many threads."""
    use_threads(args)
    execution, lora = asdict(execution_options(args)), chosen_lora(args)
    if getattr(args, "size", None) is None:
        return Engine.from_pretrained(args.model, lora=lora, **execution)
    model, shape = model_of_size(args.model, args.size, lora)
    return Engine.from_pretrained(model, shape=shape, copy=False, **execution)


def add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Declare the figure's file, ``out`` by default, its scale, and where and how the model runs."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), metavar="PNG", help="the figure (default: %(default)s)")
    add("--scale", type=int, default=2, help="enlarge every pixel so many times (default: %(default)s)")
    add_lora_argument(add)
    add_device_argument(add)
    add_threads_argument(add)
    add_path_arguments(add)
    add("--quiet", action="store_true", help="show no progress bar, and print no report")
    add_metadata_argument(add)


def open_figure_engine(args: argparse.Namespace) -> Engine:
    """The engine that ``args`` describe; ValueError if its images are no pictures."""
    _checks.integer("--scale", args.scale, 1, 64)
    engine = open_engine(args)
    shape = engine.image_shape
    if shape[0] not in CHANNELS[:2] or len(shape) != 3:
        raise ValueError(f"a figure is of images with 1 or 3 channels, and this model's have shape {shape}")
    return engine


def bar(args: argparse.Namespace) -> bool | None:
    """Whether to show progress: not when quiet, else if stderr is a terminal."""
    return False if args.quiet else None


def numbers(name: str, text: str, kind: Callable[[str], _Number], accepted: str) -> list[_Number]:
    """The numbers of a list separated by commas; ValueError naming the option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be {accepted}, separated by commas, got {text!r}") from None


def integers(name: str, text: str, low: int, high: int = _MOST) -> list[int]:
    """Integers in [low, high], separated by commas; ValueError naming the option."""
    values = numbers(name, text, int, f"integers in [{low}, {high}]")
    return [_checks.integer(name, value, low, high) for value in values]
