"""Training depends on its arguments alone: PyTorch's ambient settings change no bit, and come back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepfusion.training.batches import make_batch
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset, load_dataset, merge_classes, resize
from stepfusion.training.export import ExportRecord, export_model
from stepfusion.training.run import train
from stepfusion.training.trainer import Trainer
from stepfusion_testing.ambient import AMBIENT, default_device, default_dtype

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = TrainConfig(
    steps=3, batch_size=4, microbatch=2, channels=(8,), norm_groups=4, head_dim=8, precision="float32", save_every=2
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.fromarray(random.integers(0, 256, (10, 10), dtype=np.uint8))
            picture.save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def prepare(data: Path) -> ImageDataset:
    return resize(merge_classes(load_dataset(data), {"second": [1], "first": [0]}), 8)


def everything(config: TrainConfig, data: Path, out: Path, workers: int = 1) -> dict[str, torch.Tensor]:
    """All that a run computes: data, batches, states, and the exported model."""
    dataset = prepare(data)
    batch = make_batch(config, dataset, 1)
    half = train(config, dataset, out, should_stop=iter([False, False, True]).__next__, workers=workers)
    assert half.step == 2
    trainer = train(config, dataset, out, workers=workers)  # resumed
    export_model(trainer, out / "model", ExportRecord(out))
    weights = (out / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    found = {name: getattr(batch, name) for name in ("x0", "noise", "levels", "labels")}
    return {**found, **trainer.state().tensors, "file": torch.frombuffer(bytearray(weights), dtype=torch.uint8)}


@pytest.mark.parametrize("setting", AMBIENT)
@pytest.mark.parametrize("workers", [1, 2])
def test_ambient_settings_change_nothing(setting: str, workers: int, data: Path, tmp_path: Path) -> None:
    plain = everything(TINY, data, tmp_path / "plain", workers)
    with AMBIENT[setting]():
        given = everything(TINY, data, tmp_path / "given", workers)
    assert given.keys() == plain.keys()
    for name, value in plain.items():
        assert given[name].dtype == value.dtype, name
        assert given[name].device == value.device, name
        assert torch.equal(given[name].clone(), value), name


def test_the_callers_settings_come_back(data: Path) -> None:
    dataset = prepare(data)
    with default_dtype(torch.float64), default_device("meta"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        trainer = Trainer(TINY, dataset)
        trainer.train_step()
        with pytest.raises(ValueError, match="size must be in"):
            resize(dataset, 99)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device() == torch.device("meta")
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()


def test_low_precision_is_the_configurations(data: Path, tmp_path: Path) -> None:
    """Negative control: the network does run in bfloat16 if it is asked to."""
    config = TrainConfig(**{**TINY.__dict__, "precision": "bfloat16"})
    given = everything(config, data, tmp_path / "a")["weights.conv_in.weight"]
    assert not torch.equal(given, everything(TINY, data, tmp_path / "b")["weights.conv_in.weight"])
