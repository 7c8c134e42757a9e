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
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.bench.folder_distance import LIBRARIES, folder_distance
from stepfusion.engine import Engine
from stepfusion.files.atomic import atomic_write
from stepfusion.samplers.registry import SAMPLERS
from stepfusion.samplers.table import StepTable
from stepfusion.training.datasets import ImageDataset, load_dataset

CLASSIFIER_DIRECTORY = Path(__file__).parent / "classifier"

ACCURACY_GATE = 0.85
FRECHET_RATIO_GATE = 5.0

Draw = Callable[[Tensor, int, float | None], Tensor]
"""Labels int64 [N], seed, guidance -> samples float32 [N, C, H, W] in [-1, 1]."""


class Classifier(nn.Module):
    """Six convolutions, a mean over positions, a linear layer. Its features are what goes into that layer.

    Args:
        in_channels: of the images.
        num_classes: of the labels.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        widths, strides = (in_channels, 32, 32, 64, 64, 128, 128), (1, 1, 2, 1, 2, 1)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images float32 [N, C, H, W] in [-1, 1] to features float32 [N, 128]."""
        out: Tensor = self.body(x).mean(dim=(2, 3))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map images float32 [N, C, H, W] in [-1, 1] to logits float32 [N, num_classes]."""
        out: Tensor = self.head(self.features(x))
        return out


def train_classifier(dataset: ImageDataset, epochs: int = 10, batch_size: int = 128, seed: int = 0) -> Classifier:
    """Train a classifier: AdamW, one-cycle learning rate, mirrored and shifted (by up to 2 pixels) copies, bfloat16.

    Raises:
        ValueError: `dataset` has no labels or fewer images than a batch.
    """
    if dataset.labels is None or len(dataset) < batch_size:
        raise ValueError(f"a classifier needs labels and at least {batch_size} images, got {len(dataset)} images")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(dataset.images.shape[1], dataset.num_classes)
        classifier.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
        total = epochs * (len(dataset) // batch_size)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=total)
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(dataset)), batch_size)[: len(dataset) // batch_size]:
                x = _augment(to_unit_range(dataset.images[chosen])).to(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = classifier(x)
                loss = functional.cross_entropy(logits.float(), dataset.labels[chosen])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
    return classifier.eval()


def save_classifier(classifier: Classifier, directory: Path, facts: dict[str, Any]) -> None:
    """Write ``classifier.safetensors`` (float16) and ``classifier.json`` (`facts`) in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to(torch.float16).contiguous() if value.is_floating_point() else value
        for name, value in classifier.state_dict().items()
    }
    atomic_write(directory / "classifier.safetensors", save(state))
    atomic_write(directory / "classifier.json", (json.dumps(facts, indent=2) + "\n").encode())


def load_classifier(directory: Path = CLASSIFIER_DIRECTORY) -> Classifier:
    """Read the classifier in `directory`, by default the one for Fashion-MNIST that ships with stepfusion.

    Raises:
        ValueError: what is there is not such a classifier.
        OSError: it cannot be read.
    """
    path = directory / "classifier.safetensors"
    try:
        state = load_file(path)
        classifier = Classifier(state["body.0.weight"].shape[1], state["head.weight"].shape[0])
        classifier.load_state_dict(state)
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is not a classifier that train-classifier wrote: {error}") from None
    return classifier.eval()


@torch.no_grad()
def read_images(classifier: Classifier, x: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features float32 [N, 128] and predicted labels int64 [N] of images float32 [N, C, H, W] in [-1, 1]."""
    features = torch.cat([classifier.features(part) for part in torch.split(x, batch_size)])
    return features, classifier.head(features).argmax(dim=1)


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


def to_unit_range(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def as_stored(x: Tensor) -> Tensor:
    """Round images in [-1, 1] to the 256 values that a file, and the data set, hold."""
    return to_unit_range(((x.clamp(-1, 1) + 1) * 127.5).round())


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


def asked_for_accuracy(classifier: Classifier, samples: Tensor, labels: Tensor) -> float:
    """Share of `samples` [N, C, H, W] that the classifier recognises as `labels` [N]."""
    return float((read_images(classifier, samples)[1] == labels).float().mean())


def test_accuracy(classifier: Classifier, dataset: ImageDataset) -> float:
    """Share of the images of `dataset` that the classifier recognises."""
    assert dataset.labels is not None
    return asked_for_accuracy(classifier, to_unit_range(dataset.images), dataset.labels)


def _augment(x: Tensor) -> Tensor:
    """Mirror half of the images and shift the batch by up to 2 pixels."""
    mirrored = torch.rand(len(x)) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = (int(value) for value in torch.randint(-2, 3, (2,)))
    padded = functional.pad(x, (2, 2, 2, 2), value=-1.0)
    return padded[:, :, 2 + down : 2 + down + x.shape[2], 2 + right : 2 + right + x.shape[3]]


def _engine_draw(engine: Engine, table: StepTable, workers: int) -> Draw:
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
    facts = {
        "epochs": args.epochs,
        "seed": args.seed,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "training_s": round(seconds, 1),
    }
    save_classifier(classifier, args.out, facts)
    test = load_dataset(args.data, "test")
    facts["test_accuracy"] = test_accuracy(load_classifier(args.out), test)
    save_classifier(classifier, args.out, facts)
    print(json.dumps(facts))
    return 0


def _run_evaluate(args: argparse.Namespace) -> int:
    started = time.monotonic()
    torch.set_num_threads(1)
    classifier = load_classifier(args.classifier)
    train, test = load_dataset(args.data), load_dataset(args.data, "test")
    engine = Engine.from_pretrained(args.model, dtype=args.dtype, batch=64)
    table = engine.table(args.sampler, args.steps)
    row = {
        "sampler": f"{table.name}, {len(table)} steps",
        "network_dtype": args.dtype,
        "classifier_test_accuracy": test_accuracy(classifier, test),
        **evaluate(
            _engine_draw(engine, table, args.workers),
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
    command.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="(default: %(default)s)")
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--dtype", default="float32", help="of the network's arithmetic (default: %(default)s)")
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
