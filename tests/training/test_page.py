"""docs/training.md: its loop runs as it stands, and its defaults are the code's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import load_dataset
from stepfusion.training.objectives import SCHEDULES
from stepfusion_testing.networks import tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_loop_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    network = tiny_unet(classes=None)
    size = network.sample_size
    batches = list(torch.rand(2, 3, network.in_channels, size, size) * 2 - 1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    names: dict[str, Any] = {"network": network, "batches": batches}
    exec(code, names)
    assert names["loss"].shape == (3,)
    changed = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert all(changed)


def test_the_page_names_all_schedules_and_their_schedulers() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name: row for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named.keys() == SCHEDULES.keys()
    for name, row in named.items():
        assert f"`{TrainConfig(schedule=name).scheduler_config()['_class_name']}`" in row


def test_the_deviation_of_the_images_is_about_what_the_page_says() -> None:
    images = load_dataset(ROOT / "tests" / "data" / "fashion-mnist-slice").images.double() / 127.5 - 1
    (stated,) = re.findall(r"Fashion-MNIST\s+has (0\.\d+)\.", PAGE)
    assert float(stated) == pytest.approx(images.std().item(), abs=0.03)
