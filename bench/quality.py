"""How good are a model's samples? Two numbers, both read from a small classifier of the same images.

- *asked-for accuracy*: the share of class-conditional samples that the classifier recognises as the class asked for;
- *Frechet distance* between features of samples and of test images, next to the same distance between training and
  test images, which is what a perfect model would reach (Heusel et al. 2017, eq. 6, with this classifier's features).

Commands::

    python -m stepfusion.bench.quality train-classifier DATA
    python -m stepfusion.bench.quality evaluate MODEL_DIR --data DATA --json FILE
    python -m stepfusion.bench.quality folders SAMPLES IMAGES    # Inception distances, by torch-fidelity or clean-fid
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfusion.bench.folder_distance import LIBRARIES, folder_distance
from stepfusion.bench.image_classifier import (
    CLASSIFIER_DIRECTORY,
    Classifier,
    asked_for_accuracy,
    load_classifier,
    read_images,
    save_classifier,
    test_accuracy,
    to_unit_range,
    train_classifier,
)
from stepfusion.engine import Engine
from stepfusion.execution.plan import NETWORK_MODES
from stepfusion.files.atomic import atomic_write
from stepfusion.samplers.registry import OFFERED
from stepfusion.samplers.table import StepTable
from stepfusion.training.datasets import ImageDataset, load_dataset

ACCURACY_GATE = 0.85
FRECHET_RATIO_GATE = 5.0

Draw = Callable[[Tensor, int, float | None], Tensor]
"""Labels int64 [N], seed, guidance -> samples float32 [N, C, H, W] in [-1, 1]."""


def evaluate(
    draw: Draw,
    train: ImageDataset,
    test: ImageDataset,
    classifier: Classifier,
    *,
    guidance: float | None,
    other_guidance: float | None,
    accuracy_samples: int = 1000,
    frechet_samples: int = 5000,
) -> dict[str, Any]:
    """Measure samples of a class-conditional model, rounded to the 256 values that the data set holds.

    Args:
        draw: the sampler.
        train: as many of its first images as there are samples give the Frechet distance to beat.
        test: what samples and training images are compared with.
        classifier: of these classes.
        guidance: the setting that is judged: accuracy and Frechet distance are both of it.
        other_guidance: another setting, whose accuracy is reported beside.
        accuracy_samples: samples for the accuracy; in the judged setting the first ones of the others.
        frechet_samples: samples for the Frechet distance, of seed 0, labels balanced.

    Returns:
        The numbers, the settings, and whether each gate is passed.
    """
    classes = test.num_classes
    labels = balanced_labels(frechet_samples, classes)
    samples = as_stored(draw(labels, 0, guidance))
    labels = labels[:accuracy_samples]
    accuracy = {
        str(guidance): asked_for_accuracy(classifier, samples[:accuracy_samples], labels),
        str(other_guidance): asked_for_accuracy(classifier, as_stored(draw(labels, 0, other_guidance)), labels),
    }
    test_features, _ = read_images(classifier, to_unit_range(test.images))
    train_features, _ = read_images(classifier, to_unit_range(train.images[:frechet_samples]))
    sample_features, _ = read_images(classifier, samples)
    of_train = frechet_distance(train_features, test_features)
    of_samples = frechet_distance(sample_features, test_features)
    judged = accuracy[str(guidance)]
    return {
        "guidance": guidance,
        "accuracy_samples": accuracy_samples,
        "asked_for_accuracy": judged,
        "asked_for_accuracy_by_guidance": accuracy,
        "frechet_samples": len(samples),
        "test_images": len(test),
        "frechet_samples_to_test": of_samples,
        "frechet_train_to_test": of_train,
        "frechet_ratio": of_samples / of_train,
        "accuracy_gate": {"at_least": ACCURACY_GATE, "passed": judged >= ACCURACY_GATE},
        "frechet_gate": {"at_most": FRECHET_RATIO_GATE, "passed": of_samples <= FRECHET_RATIO_GATE * of_train},
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Dowson & Landau 1982).

    ``|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a^1/2 cov_b cov_a^1/2)^1/2)``, in float64.

    Args:
        a: [N, D], N >= 2.
        b: [M, D], M >= 2.

    Raises:
        ValueError: shapes do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be [N, D] and [M, D] with N, M >= 2, got {list(a.shape)} and {list(b.shape)}"
        )
    a, b = a.to(torch.float64), b.to(torch.float64)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    cov_a, cov_b = cov_a.reshape(a.shape[1], -1), cov_b.reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels 0, 1, .., num_classes - 1, 0, 1, ..: int64 [count]."""
    return torch.arange(count) % num_classes


def as_stored(x: Tensor) -> Tensor:
    """Round images in [-1, 1] to the 256 values that a file, and the data set, hold."""
    return to_unit_range(((x.clamp(-1, 1) + 1) * 127.5).round())


def engine_draw(engine: Engine, table: StepTable, workers: int) -> Draw:
    """Sample an engine, a batch at a time, in `workers` threads; their number changes no image."""
    batch_size = engine.batch

    def draw(labels: Tensor, seed: int, guidance: float | None) -> Tensor:
        def part(start: int) -> Tensor:
            indices = range(start, min(start + batch_size, len(labels)))
            chosen = labels[start : start + batch_size]
            x = engine.sample(
                indices=indices, labels=chosen, table=table, seed=seed, guidance=guidance, progress=False
            )
            return x.cpu()

        with ThreadPoolExecutor(workers) as threads:
            return torch.cat(list(threads.map(part, range(0, len(labels), batch_size))))

    return draw


def _run_train_classifier(args: argparse.Namespace) -> int:
    started = time.monotonic()
    classifier = train_classifier(load_dataset(args.data), epochs=args.epochs, seed=args.seed)
    seconds = time.monotonic() - started
    metadata = {
        "epochs": args.epochs,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "training_s": round(seconds, 1),
    }
    save_classifier(classifier, args.out, metadata)
    test = load_dataset(args.data, "test")
    metadata["test_accuracy"] = test_accuracy(load_classifier(args.out), test)
    save_classifier(classifier, args.out, metadata)
    print(json.dumps(metadata))
    return 0


def _run_evaluate(args: argparse.Namespace) -> int:
    started = time.monotonic()
    torch.set_num_threads(1)
    engine = Engine.from_pretrained(args.model, dtype=args.dtype, network=args.network, batch=64)
    table = engine.table(args.sampler, args.steps)
    classifier = load_classifier(args.classifier)
    train, test = load_dataset(args.data), load_dataset(args.data, "test")
    row = {
        "sampler": table.name,
        "evaluations": len(table),
        "network": engine.plan.network.value,
        "network_dtype": args.dtype,
        "classifier_test_accuracy": test_accuracy(classifier, test),
        **evaluate(
            engine_draw(engine, table, args.workers),
            train,
            test,
            classifier,
            guidance=args.guidance,
            other_guidance=args.other_guidance,
            frechet_samples=args.frechet_samples,
        ),
        "evaluation_s": round(time.monotonic() - started, 1),
    }
    text = json.dumps(row, indent=2) + "\n"
    print(text, end="")
    if args.json is not None:
        atomic_write(args.json, text.encode())
    return 0 if row["accuracy_gate"]["passed"] and row["frechet_gate"]["passed"] else 1


def _run_folders(args: argparse.Namespace) -> int:
    print(json.dumps(folder_distance(args.a, args.b, args.library, args.device), indent=2))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands; evaluate returns 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m stepfusion.bench.quality", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train-classifier", help="train the classifier that judges")
    command.add_argument("data", type=Path, help="directory of idx files")
    command.add_argument("--out", type=Path, default=CLASSIFIER_DIRECTORY, help="(default: the package's own folder)")
    command.add_argument("--epochs", type=int, default=10)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=_run_train_classifier)
    command = commands.add_parser("evaluate", help="judge a model directory")
    command.add_argument("model", help="diffusers directory, or the name of a bundled model")
    command.add_argument("--data", type=Path, required=True, help="directory of idx files")
    command.add_argument("--classifier", type=Path, default=CLASSIFIER_DIRECTORY)
    command.add_argument("--json", type=Path, help="where the numbers go")
    command.add_argument("--sampler", choices=OFFERED, help="(default: that of the model's path, ddim or another)")
    command.add_argument("--steps", type=int, help="(default: the sampler's, 50 for ddim)")
    command.add_argument("--dtype", default="float32", help="of the network's arithmetic (default: %(default)s)")
    command.add_argument("--network", choices=NETWORK_MODES, default="auto", help="(default: %(default)s)")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one a core)")
    command.add_argument("--guidance", type=_guidance, default=1.5, help="judged setting (default: %(default)s)")
    command.add_argument("--other-guidance", type=_guidance, default=None, help="reported beside: a number, or none")
    command.add_argument("--frechet-samples", type=int, default=5000)
    command.set_defaults(run=_run_evaluate)
    command = commands.add_parser("folders", help="Frechet and kernel Inception distances of two folders of images")
    command.add_argument("a", type=Path, help="folder of PNG or JPEG images")
    command.add_argument("b", type=Path, help="another")
    text = "installed apart; downloads its Inception weights when it is first used (default: the first one installed)"
    command.add_argument("--library", choices=("auto", *LIBRARIES), default="auto", help=text)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    command.set_defaults(run=_run_folders)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return status


def _guidance(text: str) -> float | None:
    return None if text == "none" else float(text)


if __name__ == "__main__":
    raise SystemExit(main())
