"""``stepfusion train``: train a small diffusion model on the CPU or a GPU, resumable at any step."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.checkpoints.load import load_model
from stepfusion.commands.streams import standard_streams, tell
from stepfusion.diffusion.path_losses import TIMES
from stepfusion.execution.plan import choose_device
from stepfusion.training.config import AUTO, NETWORKS, PRECISIONS, TrainConfig
from stepfusion.training.datasets import ImageDataset, load_dataset, merge_classes, resize
from stepfusion.training.export import ExportRecord, export_model
from stepfusion.training.metrics import plot_loss
from stepfusion.training.objectives import SCHEDULES
from stepfusion.training.run import train
from stepfusion.training.state import latest_state, load_state
from stepfusion.training.trainer import Trainer

_SHOWN = 3  # of the files that are left out
_PREDICTIONS = (AUTO, *dict.fromkeys(name for names in SCHEDULES.values() for name in names))
_DEFAULTS = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion train``."""
    parser.add_argument(
        "data",
        type=Path,
        help="idx files, a folder of pictures or of class folders, an .npz, or what stepfusion generate wrote",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the run; a run in it is resumed")
    parser.add_argument(
        "--from",
        dest="start_from",
        metavar="MODEL",
        help="a model with the same network, whatever it predicts, to start from (default: random weights)",
    )
    parser.add_argument("--export", type=Path, help="write the diffusers directory here (default: OUT/model)")
    parser.add_argument("--export-only", action="store_true", help="export the newest state, train no step")
    parser.add_argument("--class-names", help="names of the classes, separated by commas")
    parser.add_argument(
        "--merge",
        metavar="GROUPS",
        help='join classes, by number, into named ones, leaving out others: "shoe=5,7; bag=8" (default: do not)',
    )
    parser.add_argument(
        "--resize", type=int, metavar="N", help="shrink the images to N x N pixels, by area (default: do not)"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="CPU threads, one microbatch each (default: one for each core)")
    numbers = {
        "steps": "optimiser steps in all",
        "batch_size": "images a step",
        "microbatch": "images that go through the network together",
        "features": "channels of the context UNet at full size",
        "layers_per_block": "residual blocks a level",
        "head_dim": "channels of an attention head",
        "norm_groups": "groups of every GroupNorm",
        "train_timesteps": "timesteps of the noise schedule",
        "sigma_data": "standard deviation of the images, for schedule edm",
        "p_mean": "mean of the logarithm of sigma, for schedule edm",
        "p_std": "standard deviation of the same",
        "logit_mean": "mean of log(t / (1 - t)), for logit-normal times",
        "logit_std": "standard deviation of the same",
        "learning_rate": "highest learning rate",
        "warmup_steps": "steps of linear warm-up",
        "weight_decay": "the weight decay of AdamW",
        "grad_clip": "largest norm of the gradient",
        "ema_decay": "decay of the moving average that is exported",
        "label_dropout": "probability of training without the label",
        "seed": "the seed of everything random",
        "save_every": "steps between saved states",
        "log_every": "steps between lines of metrics",
    }
    for name, text in numbers.items():
        default = _DEFAULTS[name]
        parser.add_argument(_flag(name), type=type(default), default=default, help=f"{text} (default: %(default)s)")
    chosen = {
        "network": (NETWORKS, "what to train"),
        "prediction": (_PREDICTIONS, "what the network learns to return; auto is v_prediction, edm or flow"),
        "schedule": (SCHEDULES, "noise schedule, or another path from images to noise"),
        "times": (TIMES, "how times are drawn, for schedule flow"),
        "precision": (PRECISIONS, "the number format of the network's arithmetic"),
    }
    for name, (choices, text) in chosen.items():
        default = _DEFAULTS[name]
        parser.add_argument(_flag(name), choices=tuple(choices), default=default, help=f"{text} (default: {default})")
    channels = _DEFAULTS["channels"]
    text = f"channels of each level of the network (default: {' '.join(map(str, channels))})"
    parser.add_argument("--channels", type=int, nargs="+", default=channels, help=text)
    text = "levels with attention, counted from 0 (default: none)"
    parser.add_argument("--attention-levels", type=int, nargs="*", default=(), help=text)
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")


def run_train(args: argparse.Namespace) -> int:
    """Train as `args` say, then export; returns the exit status: 0, or 130 when a signal stopped it (state saved).

    Raises:
        ValueError: what `args` name cannot be used.
    """
    config = TrainConfig(**{name: getattr(args, name) for name in _DEFAULTS})
    _check_arguments(args)
    dataset = load_dataset(args.data)
    _say_left_out(args.data, dataset.left_out)
    if args.merge is not None:
        dataset = merge_classes(dataset, _groups(args.merge))
    if args.resize is not None:
        dataset = resize(dataset, args.resize)
    dataset = _named(dataset, args.class_names)
    if args.export_only:
        _export(_newest(config, dataset, args), args)
        return 0
    workers = args.workers
    if args.device == "cpu":
        workers = workers or (1 if config.network == "context" else os.cpu_count())
        torch.set_num_threads(1)
    with _stop_signals() as stopped:
        trainer = train(
            config,
            dataset,
            args.out,
            device=args.device,
            workers=workers or 1,
            start_from=None if args.start_from is None else load_model(args.start_from).network,
            should_stop=lambda: bool(stopped),
            begin=_describe,
            report=partial(_print_row, config),
        )
    plot_loss(args.out)
    if stopped:
        print(f"stopped at step {trainer.step} of {config.steps}; the state is saved, the same command goes on")
        return 130
    _export(trainer, args)
    return 0


def _export(trainer: Trainer, args: argparse.Namespace) -> None:
    export_model(trainer, _model_directory(args), ExportRecord(args.out))
    print(f"exported step {trainer.step} to {_model_directory(args)}")


def _model_directory(args: argparse.Namespace) -> Path:
    directory: Path = args.out / "model" if args.export is None else args.export
    return directory


def main(argv: list[str] | None = None) -> int:
    """Run the command by itself: ``python -m stepfusion.commands.train DATA --out DIR``."""
    parser = argparse.ArgumentParser(prog="stepfusion train", description=__doc__)
    add_train_arguments(parser)
    with standard_streams():
        args = parser.parse_args(argv)
        try:
            return run_train(args)
        except (OSError, TypeError, ValueError, FloatingPointError) as error:
            tell(f"stepfusion train: {error}")
            return 2


def _newest(config: TrainConfig, dataset: ImageDataset, args: argparse.Namespace) -> Trainer:
    """Restore the newest state of a run, which may be going on elsewhere: nothing in its directory is touched."""
    newest = latest_state(args.out)
    if newest is None:
        raise ValueError(f"{args.out} has no saved state to export")
    trainer = Trainer(config, dataset, args.device)
    trainer.restore(load_state(newest))
    return trainer


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse before the training what would fail after it."""
    args.device = str(choose_device(args.device)[0])
    if args.workers is not None:
        _checks.integer("--workers", args.workers, 1, 1024)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; it must be a directory")
    refusal = ExportRecord(args.out).refusal(_model_directory(args))
    if refusal is not None:
        raise ValueError(f"--export {refusal}")


def _say_left_out(data: Path, files: Sequence[Path]) -> None:
    if not files:
        return
    names = sorted(str(file.relative_to(data)) for file in files)
    shown, more = ", ".join(names[:_SHOWN]), len(names) - _SHOWN
    some = f"{len(names)} files are no pictures, and" if len(names) > 1 else "1 file is no picture, and is"
    tell(f"stepfusion: {some} left out: {shown}{f' and {more} more' if more > 0 else ''}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _groups(text: str) -> dict[str, list[int]]:
    """The groups of classes that ``--merge`` describes: "shoe=5,7,9; bag=8"."""
    groups: dict[str, list[int]] = {}
    for part in text.split(";"):
        name, _, numbers = (piece.strip() for piece in part.partition("="))
        classes = [number.strip() for number in numbers.split(",")]
        if not name or name in groups or not all(number.isascii() and number.isdecimal() for number in classes):
            raise ValueError(f'--merge must be like "shoe=5,7,9; bag=8", every name once, got {text!r}')
        groups[name] = [int(number) for number in classes]
    return groups


def _named(dataset: ImageDataset, names: str | None) -> ImageDataset:
    """Give the classes of `dataset` the names in a comma-separated list."""
    if names is None:
        return dataset
    split = tuple(name.strip() for name in names.split(","))
    if dataset.labels is None:
        raise ValueError("--class-names is given, but the data has no labels")
    if len(split) != dataset.num_classes or not all(split):
        raise ValueError(f"--class-names must give {dataset.num_classes} names, got {len(split)}: {names!r}")
    return ImageDataset(dataset.images, dataset.labels, split)


def _describe(trainer: Trainer) -> None:
    """Say what is trained, where, and how far it is."""
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    device = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else str(trainer.device)
    images, shape = len(trainer.dataset), "x".join(map(str, trainer.dataset.images.shape[1:]))
    network, steps = type(trainer.network).__name__, f"steps {trainer.step} to {trainer.config.steps}"
    tell(f"stepfusion: {network} of {parameters:,} parameters on {device}, {images:,} images of {shape}, {steps}")


def _print_row(config: TrainConfig, row: dict[str, Any]) -> None:
    """Print a row of metrics, with the seconds that the steps left take at its pace."""
    left = (config.steps - row["step"]) * config.batch_size / max(row["images_per_s"], 0.1)
    print(json.dumps({**row, "left_s": round(left)}), flush=True)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python runs signal handlers in the main thread only
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
