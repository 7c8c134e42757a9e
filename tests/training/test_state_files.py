"""The files of a run are read strictly: what is wrong in them is one sentence, and nothing is changed by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset
from stepfusion.training.run import train
from stepfusion.training.state import load_state
from stepfusion.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = TrainConfig(
    steps=2, batch_size=4, microbatch=4, channels=(8,), norm_groups=4, head_dim=8, precision="float32", save_every=2
)


@pytest.fixture
def dataset() -> ImageDataset:
    return ImageDataset(torch.arange(4 * 64, dtype=torch.uint8).reshape(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))


@pytest.fixture
def run(dataset: ImageDataset, tmp_path: Path) -> Path:
    train(TINY, dataset, tmp_path)
    return tmp_path


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = run / "state-00000002/state.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def refusal(
    run: Path, dataset: ImageDataset, kind: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> str:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(kind) as caught:
        train(replace(TINY, steps=4), dataset, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.pop("step"), "state.json: step: Field required"),
        (lambda m: m.pop("config"), "state.json: config: Field required"),
        (lambda m: m.update(step="2"), "state.json: step: Input should be a valid integer, got '2'"),
        (lambda m: m.update(step=2.5), "state.json: step: Input should be a valid integer, got 2.5"),
        (lambda m: m.update(step=True), "state.json: step: Input should be a valid integer, got True"),
        (lambda m: m.update(step=-1), "state.json: step: Input should be greater than or equal to 0, got -1"),
        (lambda m: m.update(step=1 << 40), "state.json: step: Input should be less than 2147483648"),
        (lambda m: m.update(step=1), "it is that of step 1"),
        (lambda m: m.update(elapsed_s=float("nan")), "state.json: elapsed_s: Input should be a finite number"),
        (lambda m: m.update(elapsed_s=None), "state.json: elapsed_s: Input should be a valid number, got None"),
        (lambda m: m.update(config=[]), "state.json: config: Input should be an object"),
        (lambda m: m.update(config=None), "state.json: config: Input should be"),
        (lambda m: m.update(data=[1]), "state.json: data: Input should be an object, got [1]"),
        (lambda m: m["data"].update(shape="4"), "state.json: data.shape: Input should be a valid array, got '4'"),
        (lambda m: m["data"].update(pixel_sum=0.5), "state.json: data.pixel_sum: Input should be a valid integer"),
        (lambda m: m.update(extra=1), "state.json: extra: Extra inputs are not permitted"),
    ],
)
def test_metadata_of_another_kind(
    change: Callable[[dict[str, Any]], object], sentence: str, run: Path, dataset: ImageDataset
) -> None:
    edit(run, change)
    given = refusal(run, dataset)
    assert given.startswith(f"{run / 'state-00000002'} is not a sound training state: ")
    assert sentence in given


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(channels=8), "channels must be a sequence of integers, got 8"),
        (lambda c: c.update(channels="88"), "channels must be a sequence of integers, got '88'"),
        (lambda c: c.update(channels=[8, [8]]), r"channels[1] must be an integer, got [8]"),
        (lambda c: c.update(channels=[8.0]), "channels[0] must be an integer, got 8.0"),
        (
            lambda c: c.update(attention_levels={"0": 1}),
            "attention_levels must be a sequence of integers, got {'0': 1}",
        ),
        (lambda c: c.update(attention_levels=[None]), "attention_levels must be an integer, got None"),
        (lambda c: c.update(steps="2"), "steps must be an integer, got '2'"),
        (lambda c: c.update(learning_rate=[1]), "learning_rate must be a number, got [1]"),
        (lambda c: c.update(flip=0), "flip must be True or False, got 0"),
        (lambda c: c.update(network=["unet2d"]), "network must be one of"),
        (lambda c: c.update(seed=-1), "seed must be in"),
        (lambda c: c.pop("seed"), "the training configuration has missing fields ['seed']"),
        (lambda c: c.update(sead=1), "the training configuration has unknown fields ['sead']"),
        (lambda c: c.clear(), "the training configuration has missing fields ['attention_levels', "),
    ],
)
def test_a_configuration_of_another_kind(
    change: Callable[[dict[str, Any]], object], sentence: str, run: Path, dataset: ImageDataset
) -> None:
    edit(run, lambda metadata: change(metadata["config"]))
    assert sentence in refusal(run, dataset, (TypeError, ValueError))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "it is nested more than 64 deep"),
        ('{"a":' * 100_000, "it is nested more than 64 deep"),
        ("{}" + " " * (1 << 20), "is larger than 1048576 bytes"),
        ("{}", "step: Field required"),
        ("[]", "Input should be an object"),
        ("", "Invalid JSON"),
        ('{"step": 2, "step": ', "Invalid JSON"),
    ],
)
def test_metadata_that_is_no_object(text: str, sentence: str, run: Path, dataset: ImageDataset) -> None:
    (run / "state-00000002/state.json").write_text(text)
    assert sentence in refusal(run, dataset)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("exp_avg.conv_in.weight"), "has no exp_avg.conv_in.weight of shape [8, 1, 3, 3]"),
        (lambda t: t.update({"ema.conv_in.bias": torch.zeros(9)}), "has no ema.conv_in.bias of shape [8]"),
        (lambda t: t.update({"weights.conv_in.bias": torch.zeros(8).half()}), "has no weights.conv_in.bias"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(
    change: Callable[[dict[str, torch.Tensor]], object], sentence: str, run: Path, dataset: ImageDataset
) -> None:
    path = run / "state-00000002/state.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert sentence in refusal(run, dataset)
    trainer = Trainer(TINY, dataset)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    with pytest.raises(ValueError, match="the saved state has no"):
        trainer.restore(load_state(run / "state-00000002"))
    assert all(torch.equal(before[name], value) for name, value in trainer.network.state_dict().items())
    assert (trainer.step, len(trainer.optimizer.state)) == (0, 0)


def test_a_missing_file_is_named(run: Path, dataset: ImageDataset) -> None:
    for name in ("state.safetensors", "state.json"):
        (run / "state-00000002" / name).rename(run / "kept")
        assert name in refusal(run, dataset)
        (run / "kept").rename(run / "state-00000002" / name)
    (run / "state-00000002/state.safetensors").write_bytes(b"")
    assert "is not a sound training state" in refusal(run, dataset)


def test_what_is_sound_is_read(run: Path, dataset: ImageDataset) -> None:
    assert train(replace(TINY, steps=4), dataset, run).step == 4
