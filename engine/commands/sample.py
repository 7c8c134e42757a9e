"""``stepfusion sample``: make images with a model and write them as a grid, single files or an animation."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.commands.arguments import (
    add_device_argument,
    add_lora_argument,
    add_path_arguments,
    add_sampler_arguments,
    bar,
    open_engine,
    table_request,
)
from stepfusion.commands.labels import chosen_labels
from stepfusion.commands.outputs import check_folder
from stepfusion.commands.pictures import pixels_of, read_mask, read_pictures
from stepfusion.commands.prompts import add_prompt_arguments, add_size_argument, chosen_prompts
from stepfusion.commands.provenance import SampleProvenance, add_metadata_argument
from stepfusion.commands.start_noise import add_noise_argument, add_seed_argument, check_noise, read_noise
from stepfusion.commands.threads import add_threads_argument
from stepfusion.engine import Engine
from stepfusion.files.images import Pixels, grid, grid_size, save_gif, save_png, why_no_picture
from stepfusion.lanes.editing import Edit, make_edit
from stepfusion.lanes.request import Event

_EXAMPLES = """examples:
  stepfusion sample fashion-mnist --labels sneaker,bag --guidance 2
  stepfusion sample fashion-mnist --animate samples.gif
  stepfusion sample fashion-mnist --sampler dpmpp_2m --steps 15
  stepfusion sample fashion-mnist --image shoe.png --strength 0.6 --labels sneaker
  stepfusion sample path/to/model -n 1000 --single --out images
  stepfusion sample path/to/stable-diffusion --prompt "a cat on a dog" --negative blurry --guidance 7.5"""
_FRAMES = 40
_MAX_COUNT = 1 << 20
_MAX_PIXELS = 1 << 30  # of a grid, or of all frames of an animation
_MAX_GIF_SIDE = (1 << 16) - 1


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion sample``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    names = ", ".join(bundled_models()) or "none in this installation"
    parser.add_argument(
        "model",
        help=f"a bundled model ({names}), or the path of a diffusers model directory, or of a .pt file of "
        "guided-diffusion (with a published name, or its flags in a .json file beside it), or of a .safetensors file "
        "of EDM or Stable Diffusion",
    )

    add = parser.add_argument_group("what to make").add_argument
    text = "how many images (default: as many as there are prompts, else 64)"
    add("-n", "--num", type=int, metavar="N", help=text)
    add(
        "--labels",
        metavar="LIST",
        help="names or numbers of classes, separated by commas and repeated as needed; 'none' stands for no label "
        "(default: all classes in turn)",
    )
    add_prompt_arguments(add)
    add("--guidance", type=float, metavar="W", help="classifier-free guidance scale; 1 is none (the default)")
    add_seed_argument(add)
    add(
        "--first-index",
        type=int,
        default=0,
        metavar="I",
        help="make the images I, I+1, ... of the seed (default: %(default)s)",
    )

    add_size_argument(add)
    add_noise_argument(add)
    add(
        "--image",
        type=Path,
        metavar="FILE",
        help="make the images from this picture, of the model's size, with --strength, --mask or both "
        "(default: from noise)",
    )
    add(
        "--strength",
        type=float,
        metavar="S",
        help="how much to change the picture, from 0, nothing, to 1, all: start from it noised, and take "
        "the last S * K steps "
        "(default: 1)",
    )
    add(
        "--mask",
        type=Path,
        metavar="FILE",
        help="keep the picture where this one is dark, and repaint the bright part (default: keep nothing)",
    )

    add_lora_argument(add)

    add_sampler_arguments(parser)

    add = parser.add_argument_group("what to write").add_argument
    add("--out", type=Path, help="the grid (default: samples.png), or with --single a directory (default: samples)")
    add(
        "--single",
        action="store_true",
        help="write no grid, but OUT/SEED-INDEX.png for each image, as soon as it is done",
    )
    add("--animate", type=Path, metavar="GIF", help="also write an animation of the grid, from noise to images")
    add(
        "--columns",
        type=int,
        help="how many images stand side by side in the grid (default: the number of classes, else a square)",
    )
    add(
        "--scale",
        type=int,
        help="enlarge every pixel of the grid so many times (default: 2, or 1 for one image alone)",
    )
    add_metadata_argument(add)
    add("--quiet", action="store_true", help="show no progress bar, and print no report")

    add = parser.add_argument_group("where and how to run").add_argument
    add_device_argument(add)
    add_threads_argument(add)
    add_path_arguments(add)
    add(
        "--batch",
        type=int,
        help="the most images at a time (default: 64 on a CPU, up to 256 on a GPU as its memory allows)",
    )
    add(
        "--invariant",
        action="store_true",
        help="keep one batch size for everything, so that an image's bits depend on neither --num nor "
        "its neighbours; a few images then take as long as a whole batch",
    )


def run_sample(args: argparse.Namespace) -> int:
    """Sample as ``args`` say; returns 0. Everything is checked, the output paths included, before any work."""
    if args.out is None:
        args.out = Path("samples" if args.single else "samples.png")
    if args.noise is not None and args.image is not None:
        raise ValueError("--noise and --image exclude each other, got both")
    noise = None if args.noise is None else read_noise(args.noise)
    if args.num is None:
        args.num = len(noise) if noise is not None else 64 if args.prompt is None else len(args.prompt)
    _check_numbers(args)
    request = table_request(args)
    _check_outputs(args)
    engine = open_engine(args)
    table = request.of(engine)
    labels, prompts = chosen_labels(engine, args.labels, args.num), chosen_prompts(engine, args, args.num)
    if noise is not None:
        check_noise(engine, args.noise, noise, args.num)
    edit = _edit(engine, args, noise)
    walked = table if edit is None else edit.shorten(table)
    steps, origin = len(walked), SampleProvenance(args, engine, request, walked, labels, prompts)
    shown = _shown_steps(steps) if args.animate else []
    _check_picture(engine, args, len(shown))
    frames = _Frames(engine, args, shown) if args.animate else None
    watchers: list[Callable[[Event], None]] = [frames] if frames else []
    if args.single:
        watchers.append(_SingleFiles(engine, args, origin))
    started = time.perf_counter()
    images = engine.sample(
        args.num,
        table,
        seed=args.seed,
        indices=range(args.first_index, args.first_index + args.num),
        labels=labels,
        guidance=args.guidance,
        prompt=prompts,
        negative_prompt=args.negative,
        start=noise,
        **({} if edit is None else asdict(edit)),
        progress=bar(args),
        callback=(lambda event: [watch(event) for watch in watchers]) if watchers else None,
    )
    pixels = pixels_of(engine, images)
    seconds = time.perf_counter() - started
    if not args.single:
        save_png(args.out, _grid(args, engine, pixels), origin.of_grid())
    if frames:
        save_gif(args.animate, frames.grids())
    if not args.quiet:
        written = ", ".join(map(str, [args.out, args.animate] if frames else [args.out]))
        facts = f"{_count(args.num, 'image')}, {table.name}, {_count(steps, 'step')}, seed {args.seed}"
        guided = engine.null_label is not None or engine.runners.takes_prompts
        facts += f", guidance {1 if args.guidance is None else args.guidance:g}" if guided else ""
        print(f"{facts}, {seconds:.1f} s, {args.num / max(seconds, 1e-9):.3g} images/s: {written}")
        print(f"again: {origin.command}")
    return 0


def _edit(engine: Engine, args: argparse.Namespace, noise: torch.Tensor | None) -> Edit | None:
    """The edit that --image, --strength and --mask ask for."""
    image = None if args.image is None else read_pictures(engine, [args.image])
    mask = None if args.mask is None else read_mask(engine, args.mask)
    return make_edit(image, args.strength, mask, noise)


class _Frames:
    """The callback that collects an animation: the pixels of all images after the steps ``shown``."""

    def __init__(self, engine: Engine, args: argparse.Namespace, shown: list[int]) -> None:
        self._engine, self._args, self._shown = engine, args, shown
        channels, height, width = engine.image_shape
        self._pixels = torch.zeros((len(shown), args.num, height, width, channels), dtype=torch.uint8)

    def __call__(self, event: Event) -> None:
        if event.step in self._shown:
            self._pixels[self._shown.index(event.step), list(event.images)] = self._engine.to_uint8(event.x).cpu()

    def grids(self) -> list[Pixels]:
        """One grid a frame."""
        return [_grid(self._args, self._engine, frame.numpy()) for frame in self._pixels]


class _SingleFiles:
    """The callback that writes every image as soon as it is done, so that those are kept when sampling stops."""

    def __init__(self, engine: Engine, args: argparse.Namespace, origin: SampleProvenance) -> None:
        self._engine, self._args, self._origin = engine, args, origin

    def __call__(self, event: Event) -> None:
        if event.step + 1 < event.steps:
            return
        folder, first = self._args.out, self._args.first_index
        folder.mkdir(exist_ok=True)
        try:
            for image, pixels in zip(event.images, self._engine.to_uint8(event.x).cpu(), strict=True):
                name = f"{self._args.seed}-{first + image}.png"
                save_png(folder / name, pixels.numpy(), self._origin.of_image(image))
        except BaseException:
            with suppress(OSError):
                folder.rmdir()  # if it is empty: not even one image could be written
            raise


def _shown_steps(steps: int) -> list[int]:
    """Up to :data:`_FRAMES` steps, evenly chosen, the first and the last among them."""
    return sorted({round(i * (steps - 1) / (_FRAMES - 1)) for i in range(_FRAMES)})


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("num", "scale", "columns"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= _MAX_COUNT:
            raise ValueError(f"--{name} must be in [1, {_MAX_COUNT}], got {value}")
    if not 0 <= args.seed < 1 << 64:
        raise ValueError(f"--seed must be in [0, 2**64 - 1], got {args.seed}")
    if not 0 <= args.first_index <= (1 << 32) - args.num:
        raise ValueError(
            f"--first-index must be in [0, {(1 << 32) - args.num}] for {_count(args.num, 'image')}, "
            f"got {args.first_index}"
        )


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse what could not be written at the end."""
    if not args.single and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a directory: name a PNG file, or use --single")
    if not args.single and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {args.out}")
    if args.single and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, and --single needs a directory")
    check_folder("--out", args.out, args.out if args.out.is_dir() else args.out.parent)
    if args.animate is not None:
        if args.animate.suffix.lower() != ".gif" or args.animate.is_dir():
            raise ValueError(f"--animate must be a file that ends in .gif, got {args.animate}")
        check_folder("--animate", args.animate, args.animate.parent)


def _check_picture(engine: Engine, args: argparse.Namespace, frames: int) -> None:
    """Refuse images that have no picture, and pictures or animations that are too large."""
    channels, *sizes = engine.image_shape
    if (reason := why_no_picture(channels)) is not None:
        raise ValueError(f"{reason}; stepfusion generate --format npz writes arrays")
    if args.single and not frames:
        return
    height, width = grid_size(args.num, *sizes, columns=_columns(args, engine), scale=_scale(args), gap=_gap(args))
    if frames and max(height, width) > _MAX_GIF_SIDE:
        raise ValueError(f"a GIF is at most {_MAX_GIF_SIDE} pixels wide and high, got a grid of {width} x {height}")
    if height * width * max(1, frames) > _MAX_PIXELS:
        given = f"{width} x {height}" + (f" in {_count(frames, 'frame')}" if frames else "")
        raise ValueError(f"the grid must have at most {_MAX_PIXELS} pixels, got {given}: lower --scale or --num")


def _columns(args: argparse.Namespace, engine: Engine) -> int | None:
    """The columns of the grid: as asked for, or one for each class if the labels are all classes in turn."""
    if args.columns is not None or args.labels is not None or engine.num_classes is None:
        columns: int | None = args.columns
        return columns
    classes = engine.num_classes - (engine.null_label is not None)
    return classes if args.num > classes else None


def _grid(args: argparse.Namespace, engine: Engine, pixels: Pixels) -> Pixels:
    return grid(pixels, columns=_columns(args, engine), scale=_scale(args), gap=_gap(args))


def _scale(args: argparse.Namespace) -> int:
    """How many times the pixels of a grid are enlarged; not at all if it is one image."""
    default = 1 if args.num == 1 else 2
    return default if args.scale is None else int(args.scale)


def _gap(args: argparse.Namespace) -> int:
    return 0 if args.num == 1 else 2


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
