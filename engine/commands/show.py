"""``stepfusion show``: the figures of the literature's texts, from any model or photograph."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from stepfusion import _checks
from stepfusion.commands.arguments import (
    add_model_argument,
    add_run_arguments,
    bar,
    integers,
    numbers,
    open_figure_engine,
)
from stepfusion.commands.figures import figure, strip
from stepfusion.commands.labels import chosen_labels
from stepfusion.commands.outputs import check_figure
from stepfusion.commands.pictures import pixels_of
from stepfusion.commands.provenance import add_metadata_argument, figure_texts, print_metadata
from stepfusion.commands.show_model import print_model
from stepfusion.diffusion.gaussian_diffusion import GaussianDiffusion
from stepfusion.engine import Engine
from stepfusion.files.images import Pixels, save_png
from stepfusion.files.picture_reader import read_any_picture
from stepfusion.kernels import reference
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

_MAX_SIDE = 1024
_MODEL = "print what is known of a model: images, classes, conditions, autoencoder, text encoder"
_METADATA = "print what a PNG file says of where it comes from, and the command that makes it again"


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``stepfusion show`` and its figures."""
    figures = parser.add_subparsers(required=True, metavar="FIGURE")
    for name, text, declare, draw in (
        ("schedule", "a photograph under the noise of two schedules", _add_schedule, _show_schedule),
        ("steps", "how few steps, and how much noise on the way (eta), still make images", _add_steps, _show_steps),
        ("noise", "what becomes of DDPM without the noise it adds on its way", _add_noise, _show_noise),
        ("context", "images without a context, with each, and with mixtures", _add_context, _show_context),
    ):
        command = figures.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        declare(command)
        command.set_defaults(draw=draw, tell=None)
    command = figures.add_parser("metadata", help=_METADATA, description=_METADATA[0].upper() + _METADATA[1:] + ".")
    command.add_argument("file", type=Path, help="a PNG file of stepfusion's")
    command.set_defaults(tell=lambda args: print_metadata(args.file))
    command = figures.add_parser("model", help=_MODEL, description=_MODEL[0].upper() + _MODEL[1:] + ".")
    add_model_argument(command)
    command.set_defaults(tell=lambda args: print_model(args.model))


def run_show(args: argparse.Namespace) -> int:
    """Draw one figure, or print a file's metadata or what is known of a model; returns 0.

    Raises:
        ValueError: before any work, if the figure cannot be drawn or written, or the file has no metadata.
    """
    if args.tell is not None:
        args.tell(args)
        return 0
    check_figure("--out", args.out)
    pixels: Pixels = args.draw(args)
    save_png(args.out, pixels, figure_texts(args))
    if not args.quiet:
        print(args.out)
    return 0


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", type=Path, required=True, help="a picture (PNG, JPEG, WebP, BMP or TIFF)")
    add(
        "--timesteps",
        type=int,
        default=500,
        metavar="T",
        help="how many timesteps the schedules have (default: %(default)s)",
    )
    add("--at", default="0,50,100,200,499", metavar="LIST", help="timesteps to show (default: %(default)s)")
    add("--seed", type=int, default=0, help="the seed of the noise (default: %(default)s)")
    add("--out", type=Path, default=Path("schedule.png"), metavar="PNG", help="the figure (default: %(default)s)")
    add("--scale", type=int, default=1, help="enlarge every pixel so many times (default: %(default)s)")
    add("--quiet", action="store_true", help="print no report")
    add_metadata_argument(add)


def _show_schedule(args: argparse.Namespace) -> Pixels:
    """q(x_t | x_0) of the linear schedule (Ho et al. 2020) above the cosine one (Nichol & Dhariwal 2021).

    The same noise everywhere, and under each timestep the share of the signal that is left, sqrt(abar).
    """
    total = _checks.integer("--timesteps", args.timesteps, 2, 1 << 16)
    _checks.integer("--scale", args.scale, 1, 64)
    seed = _checks.integer("--seed", args.seed, 0, (1 << 63) - 1)
    times = torch.tensor(integers("--at", args.at, 0, total - 1))
    image = torch.from_numpy(read_any_picture(args.image)).permute(2, 0, 1)
    if max(image.shape) > _MAX_SIDE:
        raise ValueError(f"--image must be at most {_MAX_SIDE} pixels wide and high, got {list(image.shape)[1:]}")
    x = (image.to(torch.float32) / 127.5 - 1).expand(len(times), *image.shape).contiguous()
    zero = torch.tensor([0])
    noise = reference.normal(torch.tensor([seed]), zero, zero, tuple(image.shape)).expand_as(x)
    schedules = {"linear": NoiseSchedule.linear(total), "cosine": NoiseSchedule.cosine(total)}
    cells: list[Pixels] = []
    for schedule in schedules.values():
        noisy = GaussianDiffusion(schedule, backend="reference").q_sample(x, times, noise.contiguous())
        cells += list(reference.to_uint8(noisy).numpy())
    columns = [f"t = {t}" for t in times.tolist()]
    return figure(cells, list(schedules), columns, scale=args.scale)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add = parser.add_argument
    add(
        "--steps",
        default="10,50,100,1000",
        metavar="LIST",
        help="how many steps of DDIM, a row of the figure for each number (default: %(default)s)",
    )
    add("--eta", default="0,0.4,0.8", metavar="LIST", help="noise of DDIM, a column each (default: %(default)s)")
    _add_images(parser, 3)
    add_run_arguments(parser, "steps.png")


def _show_steps(args: argparse.Namespace) -> Pixels:
    """DDIM with few and many steps, and with more and more noise, from one x_T (Song et al. 2021, section 5.1)."""
    engine, count = open_figure_engine(args), _checks.integer("--num", args.num, 1, 64)
    steps = integers("--steps", args.steps, 1, engine.schedule.max_steps)
    etas = numbers("--eta", args.eta, float, "numbers in [0, 1]")
    rows = [[engine.table("ddim", n, eta=eta) for eta in etas] for n in steps]
    cells: list[Pixels] = []
    for row in rows:  # a batch each: its lanes are done together
        pixels = pixels_of(engine, _sample(engine, args, [table for table in row for _ in range(count)], count))
        cells += [strip(part) for part in pixels.reshape(len(row), count, *pixels.shape[1:])]
    return figure(cells, [f"{n} steps" for n in steps], [f"eta = {eta:g}" for eta in etas], scale=args.scale)


def _add_noise(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--steps", type=int, metavar="K", help="how many steps of DDPM (default: all timesteps of the model)"
    )
    _add_images(parser, 8)
    add_run_arguments(parser, "noise.png")


def _show_noise(args: argparse.Namespace) -> Pixels:
    """DDPM (Ho et al. 2020, algorithm 2) as it is, and with z = 0: without noise the images are the mean's blur."""
    engine, count = open_figure_engine(args), _checks.integer("--num", args.num, 1, 64)
    table = engine.table("ddpm", args.steps)
    nothing = torch.zeros(()).expand(len(table), count, *engine.shape)
    rows = {
        "with noise": _sample(engine, args, table, count),
        "without": _sample(engine, args, table, count, noise=nothing),
    }
    cells = [cell for x in rows.values() for cell in pixels_of(engine, x)]
    return figure(cells, list(rows), scale=args.scale)


def _add_context(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    text = "a context, a number for each class; may be repeated (default: .3,.6,0,0,.1 if there are five)"
    parser.add_argument("--mix", action="append", metavar="LIST", help=text)
    parser.add_argument(
        "--steps", type=int, metavar="K", help="how many steps of DDPM (default: all timesteps of the model)"
    )
    _add_images(parser, 8, labels=False)
    add_run_arguments(parser, "context.png")


def _show_context(args: argparse.Namespace) -> Pixels:
    """A context UNet without a context, with each of them, and with mixtures, every row from the same noise."""
    engine, count = open_figure_engine(args), _checks.integer("--num", args.num, 1, 64)
    size = getattr(engine.network, "context_size", None)
    if size is None:
        raise ValueError(f"show context needs a model whose network is a ContextUNet, and {args.model} has another")
    mixtures = [_mixture(text, size) for text in args.mix or ([".3,.6,0,0,.1"] if size == 5 else [])]
    names = engine.class_names or tuple(map(str, range(size)))
    contexts = torch.cat((torch.zeros(1, size), torch.eye(size), torch.tensor(mixtures).reshape(-1, size)))
    rows = ["no context", *names[:size], *(_described(mixture, names) for mixture in mixtures)]
    x = engine.sample(
        table=engine.table("ddpm", args.steps),
        indices=list(range(count)) * len(rows),
        labels=contexts.repeat_interleave(count, dim=0),
        seed=args.seed,
        progress=bar(args),
    )
    return figure(list(pixels_of(engine, x)), rows, scale=args.scale)


def _add_images(parser: argparse.ArgumentParser, count: int, *, labels: bool = True) -> None:
    parser.add_argument("-n", "--num", type=int, default=count, help="images of a setting (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="take the noise of this seed, from 0 to 2**64 - 1 (default: %(default)s)"
    )
    if labels:
        text = "classes by name or number, separated by commas and repeated as needed (default: all in turn)"
        parser.add_argument("--labels", metavar="LIST", help=text)
        parser.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance (default: 1, none)")


def _sample(
    engine: Engine,
    args: argparse.Namespace,
    table: StepTable | list[StepTable],
    count: int,
    noise: Tensor | None = None,
) -> Tensor:
    """``count`` images, again for every ``count`` tables: the same seed, indices and labels each time."""
    total = len(table) if isinstance(table, list) else count
    return engine.sample(
        total,
        table,
        indices=[i % count for i in range(total)],
        labels=(chosen_labels(engine, args.labels, count) or []) * (total // count) or None,
        guidance=args.guidance,
        seed=args.seed,
        noise=noise,
        progress=bar(args),
    )


def _mixture(text: str, size: int) -> list[float]:
    mixture = numbers("--mix", text, float, "numbers")
    if len(mixture) != size:
        raise ValueError(f"--mix must have {size} numbers, one for each class, got {text!r}")
    return [_checks.number("--mix", value, -10.0, 10.0) for value in mixture]


def _described(mixture: list[float], names: tuple[str, ...]) -> str:
    return " + ".join(f"{value:g} {name}" for value, name in zip(mixture, names, strict=False) if value) or "zeros"
