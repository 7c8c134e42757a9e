"""A small classifier of images, which judges a model's samples: its network, its training, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.files.atomic import atomic_write
from stepfusion.training.datasets import ImageDataset

CLASSIFIER_DIRECTORY = Path(__file__).parent / "classifier"


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


def save_classifier(classifier: Classifier, directory: Path, metadata: dict[str, Any]) -> None:
    """Write ``classifier.safetensors`` (float16) and ``classifier.json`` (`metadata`) in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to(torch.float16).contiguous() if value.is_floating_point() else value
        for name, value in classifier.state_dict().items()
    }
    atomic_write(directory / "classifier.safetensors", save(state))
    atomic_write(directory / "classifier.json", (json.dumps(metadata, indent=2) + "\n").encode())


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


def asked_for_accuracy(classifier: Classifier, samples: Tensor, labels: Tensor) -> float:
    """Share of `samples` [N, C, H, W] that the classifier recognises as `labels` [N]."""
    return float((read_images(classifier, samples)[1] == labels).float().mean())


def test_accuracy(classifier: Classifier, dataset: ImageDataset) -> float:
    """Share of the images of `dataset` that the classifier recognises."""
    assert dataset.labels is not None
    return asked_for_accuracy(classifier, to_unit_range(dataset.images), dataset.labels)


def to_unit_range(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def _augment(x: Tensor) -> Tensor:
    """Mirror half of the images and shift the batch by up to 2 pixels."""
    mirrored = torch.rand(len(x)) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = (int(value) for value in torch.randint(-2, 3, (2,)))
    padded = functional.pad(x, (2, 2, 2, 2), value=-1.0)
    return padded[:, :, 2 + down : 2 + down + x.shape[2], 2 + right : 2 + right + x.shape[3]]
