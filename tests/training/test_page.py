"""docs/training.md: its defaults are the code's. Its loop runs in tests/docs/test_snippets.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import load_dataset
from stepfusion.training.objectives import SCHEDULES

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


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
