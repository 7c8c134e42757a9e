"""``stepfusion encode``, ``reconstruct`` and ``interpolate``: DDIM as an invertible map between images and noises."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from stepfusion import _checks
from stepfusion.commands.arguments import (
    add_model_argument,
    add_run_arguments,
    bar,
    integers,
    open_figure_engine,
)
from stepfusion.commands.figures import figure
from stepfusion.commands.labels import chosen_labels
from stepfusion.commands.outputs import check_figure, check_folder
from stepfusion.commands.pictures import pixels_of, read_pictures
from stepfusion.commands.prompts import add_prompt_of_pictures, chosen_prompts
from stepfusion.commands.provenance import figure_texts
from stepfusion.engine import Engine
from stepfusion.files.atomic import atomic_write
from stepfusion.files.images import Pixels, save_png

_LABELS = "classes by name or number, one for each picture, separated by commas, repeated as needed (default: none)"


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion encode``."""
    _add_pictures(parser)
    parser.add_argument(
        "--steps", type=int, default=200, metavar="K", help="how many steps lead to the noise (default: %(default)s)"
    )
    text = 'also write the noises, float32 [n, C, H, W], as "noise" (default: do not)'
    parser.add_argument("--noise", type=Path, metavar="SAFETENSORS", help=text)
    add_run_arguments(parser, "encoded.png")


def run_encode(args: argparse.Namespace) -> int:
    """Pictures above the noise that DDIM turns back into them (Song et al. 2021, section 4.3); returns 0."""
    check_figure("--out", args.out)
    if args.noise is not None:
        if args.noise.suffix != ".safetensors" or args.noise.is_dir():
            raise ValueError(f"--noise must be a file that ends in .safetensors, got {args.noise}")
        check_folder("--noise", args.noise, args.noise.parent)
    engine, x, labels, prompts = _pictures(args)
    noise = engine.encode(x, steps=args.steps, labels=labels, prompt=prompts, progress=bar(args))
    cells = [*pixels_of(engine, x), *pixels_of(engine, noise / 3)]  # three standard deviations are black and white
    save_png(args.out, figure(cells, ["picture", "noise / 3"], scale=args.scale), figure_texts(args))
    if args.noise is not None:
        atomic_write(args.noise, save({"noise": noise.cpu().contiguous()}))
    _report(args, f"mean {float(noise.mean()):.3f}, std {float(noise.std()):.3f}, {args.steps} steps: {args.out}")
    return 0


def add_reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion reconstruct``."""
    _add_pictures(parser)
    text = "how many steps each half has, a row of the figure for each number (default: %(default)s)"
    parser.add_argument("--steps", default="50,100,200", metavar="LIST", help=text)
    add_run_arguments(parser, "reconstructed.png")


def run_reconstruct(args: argparse.Namespace) -> int:
    """Pictures, and what comes back of them after more and more steps (Song et al. 2021, section 5.4); returns 0."""
    check_figure("--out", args.out)
    engine, x, labels, prompts = _pictures(args)
    rows, cells = ["picture"], list(pixels_of(engine, x))
    for steps in integers("--steps", args.steps, 1, engine.schedule.max_steps):
        back = engine.reconstruct(x, steps=steps, labels=labels, prompt=prompts, progress=bar(args))
        mean, least = float(psnr(back, x).mean()), float(psnr(back, x).min())
        error = float((back - x).square().mean())
        rows.append(f"{steps} steps, {mean:.1f} dB")
        cells += list(pixels_of(engine, back))
        _report(args, f"{steps} steps: mean squared error {error:.2e}, PSNR mean {mean:.2f} dB, least {least:.2f} dB")
    save_png(args.out, figure(cells, rows, scale=args.scale), figure_texts(args))
    _report(args, str(args.out))
    return 0


def add_interpolate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion interpolate``."""
    add_model_argument(parser)
    ends = parser.add_mutually_exclusive_group(required=True)
    text = "between the noises of a pair of seeds, or of several pairs, a row each: 1,2 or 1,2,3,4 (default: none)"
    ends.add_argument("--seeds", metavar="A,B", help=text)
    ends.add_argument("--images", type=Path, nargs=2, metavar="IMAGE", help="mix two pictures (default: none)")
    parser.add_argument("--weights", type=int, default=7, metavar="K", help="how many points (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, metavar="K", help="how many steps of DDIM (default: 50; 200 with --images)"
    )
    parser.add_argument("--labels", metavar="LIST", help="a class for each row, or for both pictures (default: none)")
    add_prompt_of_pictures(parser.add_argument, "for each row, or for both pictures")
    parser.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance (default: 1, none)")
    add_run_arguments(parser, "interpolated.png")


def run_interpolate(args: argparse.Namespace) -> int:
    """Images along the great arc between two noises (Song et al. 2021, appendix D.5); returns 0."""
    check_figure("--out", args.out)
    weights = _checks.integer("--weights", args.weights, 2, 256)
    engine = open_figure_engine(args)
    columns = [f"{i / (weights - 1):.2f}" for i in range(weights)]
    draw = _between_pictures if args.images else _between_seeds
    rows, cells = draw(engine, args, weights)
    save_png(args.out, figure(cells, rows, columns, scale=args.scale), figure_texts(args))
    _report(args, str(args.out))
    return 0


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images [n, C, H, W] in [-1, 1]: 10 log10(4 / mean square), [n], in dB."""
    return 10 * (4 / (x - y).square().mean(dim=(1, 2, 3))).log10()


def _between_seeds(engine: Engine, args: argparse.Namespace, weights: int) -> tuple[list[str], list[Pixels]]:
    seeds = integers("--seeds", args.seeds, 0, (1 << 64) - 1)
    if len(seeds) % 2:
        raise ValueError(f"--seeds must be pairs, got {args.seeds!r}")
    pairs = list(zip(seeds[::2], seeds[1::2], strict=True))
    labels = chosen_labels(engine, args.labels, len(pairs)) if args.labels else [None] * len(pairs)
    given = chosen_prompts(engine, args, len(pairs))
    prompts: Sequence[str | None] = [None] * len(pairs) if given is None else given
    cells: list[Pixels] = []
    for (a, b), label, prompt in zip(pairs, labels or [], prompts, strict=True):
        options: Any = {"labels": label, "prompt": prompt, "guidance": args.guidance}
        x = engine.interpolate(a, b, weights, steps=args.steps, progress=bar(args), **options)
        cells += list(pixels_of(engine, x))
    return [f"seeds {a}, {b}" for a, b in pairs], cells


def _between_pictures(engine: Engine, args: argparse.Namespace, weights: int) -> tuple[list[str], list[Pixels]]:
    """Both ends come back as they were, up to the steps' error: the tables have no clip."""
    steps = 200 if args.steps is None else args.steps
    label = chosen_labels(engine, args.labels, 1)[0] if args.labels else None  # type: ignore[index]
    prompts = chosen_prompts(engine, args, 1)
    options: Any = {"labels": label, "prompt": prompts[0] if prompts else None, "progress": bar(args)}
    x = engine.runners.latents_of(read_pictures(engine, args.images).to(engine.plan.device))
    a, b = engine.encode(x, steps=steps, **options)
    table = engine.table("ddim", steps, eta=0.0, clip=None)
    mixed = engine.interpolate(a, b, weights, table, guidance=args.guidance, **options)
    return [""], list(pixels_of(engine, mixed))


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "images", type=Path, nargs="+", help="pictures (PNG, JPEG, WebP, BMP, TIFF) of the model's size"
    )
    parser.add_argument("--labels", metavar="LIST", help=_LABELS)
    add_prompt_of_pictures(parser.add_argument, "for each picture")


def _pictures(args: argparse.Namespace) -> tuple[Engine, Tensor, list[int] | None, list[str] | None]:
    """The engine, the pictures or their latents, and their labels and prompts: by default none."""
    engine = open_figure_engine(args)
    x = engine.runners.latents_of(read_pictures(engine, args.images).to(engine.plan.device))
    labels = chosen_labels(engine, args.labels, len(x)) if args.labels else None
    return engine, x, labels, chosen_prompts(engine, args, len(x))


def _report(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text)
