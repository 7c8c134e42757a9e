"""``stepfusion sample``: make images with a model and write them as a grid, single files or an animation."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from stepfusion.checkpoint import bundled_models
from stepfusion.engine import SAMPLERS, Engine
from stepfusion.images import Pixels, grid, save_gif, save_png
from stepfusion.plan import BACKENDS, DTYPES, NETWORK_MODES
from stepfusion.walk import Event

_FRAMES = 40


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion sample``."""
    names = ", ".join(bundled_models()) or "none"
    parser.add_argument("model", help=f"a bundled model ({names}) or a diffusers directory")
    parser.add_argument("-n", "--num", type=int, default=64, help="how many images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the grid, or with --single a directory")
    parser.add_argument("--single", action="store_true", help="one PNG an image, OUT/SEED-INDEX.png, instead of a grid")
    parser.add_argument("--animate", type=Path, metavar="GIF", help="also write how the grid is denoised")
    parser.add_argument("--sampler", choices=[name for name in SAMPLERS if name != "ddim_inversion"], default="ddim")
    parser.add_argument("--steps", type=int, help="default: 50, and all timesteps for ddpm")
    parser.add_argument("--eta", type=float, help="0 is deterministic DDIM (the default), 1 has DDPM's noise")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--first-index", type=int, default=0, help="number of the first image under its seed (default: 0)")
    parser.add_argument(
        "--labels", help="numbers or names, separated by commas and repeated as needed; 'none' for no label (default: all classes in turn)"
    )
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none (the default)")
    parser.add_argument("--batch", type=int, help="most images at a time")
    parser.add_argument("--columns", type=int, help="of the grid (default: the number of classes, else a square)")
    parser.add_argument("--scale", type=int, default=2, help="enlarge every pixel in the grid (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the network (default: auto)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the step (default: auto)")
    parser.add_argument("--network", choices=NETWORK_MODES, default="auto", help="how the network runs (default: auto)")
    parser.add_argument("--invariant", action="store_true", help="bits independent of batch size and neighbours")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report")


def run_sample(args: argparse.Namespace) -> int:
    """Sample as ``args`` say; returns 0. Everything is checked, the output path included, before any work is done."""
    _check_outputs(args)
    engine = Engine.from_pretrained(
        args.model,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        network=args.network,
        batch=args.batch,
        invariant=args.invariant,
    )
    table = engine.table(args.sampler, args.steps, **({} if args.eta is None else {"eta": args.eta}))
    frames = _Frames(engine, args, len(table)) if args.animate else None
    started = time.perf_counter()
    images = engine.sample(
        args.num,
        table,
        seed=args.seed,
        indices=range(args.first_index, args.first_index + args.num),
        labels=_labels(engine, args.labels, args.num),
        guidance=args.guidance,
        progress=False if args.quiet else None,
        callback=frames,
    )
    pixels: Pixels = engine.to_uint8(images).cpu().numpy()
    seconds = time.perf_counter() - started
    written = _write(args, engine, pixels, frames)
    if not args.quiet:
        print(f"{args.num} images, {table.name}, {len(table)} steps, {seconds:.1f} s: {', '.join(map(str, written))}")
    return 0


class _Frames:
    """The callback that collects an animation: the grid of all images at evenly chosen steps."""

    def __init__(self, engine: Engine, args: argparse.Namespace, steps: int) -> None:
        self._engine, self._args = engine, args
        self._kept = sorted({round(i * (steps - 1) / (_FRAMES - 1)) for i in range(_FRAMES)})
        self._states = torch.zeros((len(self._kept), args.num, *engine.shape), dtype=torch.float16)

    def __call__(self, event: Event) -> None:
        if event.step in self._kept:
            self._states[self._kept.index(event.step), list(event.images)] = event.x.cpu().to(torch.float16)

    def grids(self) -> list[Pixels]:
        """One grid a frame."""
        frames = self._states.to(torch.float32).to(self._engine.plan.device)
        return [_grid(self._args, self._engine, self._engine.to_uint8(frame).cpu().numpy()) for frame in frames]


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse what could not be written at the end."""
    for name, low in (("num", 1), ("scale", 1), ("columns", 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= 1 << 20:
            raise ValueError(f"--{name} must be in [{low}, {1 << 20}], got {value}")
    if args.seed < 0 or args.seed >= 1 << 64:
        raise ValueError(f"--seed must be in [0, 2**64), got {args.seed}")
    if args.eta is not None and args.sampler != "ddim":
        raise ValueError(f"--eta is an option of the sampler ddim, got --sampler {args.sampler}")
    for path in [args.out] + ([args.animate] if args.animate else []):
        folder = path.parent
        if not folder.is_dir():
            raise ValueError(f"cannot write {path}: {folder} is not a directory")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"cannot write {path}: {folder} is not writable")
    if args.single and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, and --single needs a directory")
    if not args.single and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a directory: name a PNG file, or use --single")
    if not args.single and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {args.out}")


def _labels(engine: Engine, text: str | None, count: int) -> list[int] | None:
    """The labels that the command line names, repeated to ``count``."""
    if engine.num_classes is None:
        if text is not None:
            raise ValueError("--labels was given, and this model takes none")
        return None
    if text == "none":
        return None
    if text is None:
        classes = [label for label in range(engine.num_classes) if label != engine.null_label]
    else:
        classes = [_label(engine, part.strip()) for part in text.split(",")]
    return [classes[i % len(classes)] for i in range(count)]


def _label(engine: Engine, text: str) -> int:
    if text.isdecimal():
        return int(text)
    names = [name.lower() for name in engine.class_names or ()]
    if text.lower() not in names:
        known = ", ".join(engine.class_names or ()) or "this model names none"
        raise ValueError(f"--labels: {text!r} is neither a number nor the name of a class ({known})")
    return names.index(text.lower())


def _grid(args: argparse.Namespace, engine: Engine, pixels: Pixels) -> Pixels:
    columns = args.columns
    if columns is None and args.labels is None and engine.num_classes is not None and args.num > engine.num_classes:
        columns = engine.num_classes - (engine.null_label is not None)
    return grid(pixels, columns=columns, scale=args.scale)


def _write(args: argparse.Namespace, engine: Engine, pixels: Pixels, frames: _Frames | None) -> list[Path]:
    if args.single:
        args.out.mkdir(exist_ok=True)
        for i, image in enumerate(pixels):
            save_png(args.out / f"{args.seed}-{args.first_index + i}.png", image)
    else:
        save_png(args.out, _grid(args, engine, pixels))
    if frames is not None:
        save_gif(args.animate, frames.grids())
    return [args.out] + ([args.animate] if frames is not None else [])
