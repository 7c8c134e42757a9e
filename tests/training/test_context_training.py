"""The sprite course, end to end: its data, schedule, training, model directory, and contexts mixed while sampling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stepfusion as sf
from stepfusion.commands import train as train_cli
from stepfusion.networks import ContextUNet
from stepfusion.samplers.scheduler_config import read_config
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset, load_dataset, merge_classes, resize
from stepfusion.training.export import ExportRecord, export_model
from stepfusion.training.run import train
from stepfusion.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SLICE = Path(__file__).parents[1] / "data" / "fashion-mnist-slice"
GROUPS = {"top": [0, 2, 4, 6], "trouser": [1], "dress": [3], "shoe": [5, 7, 9], "bag": [8]}
TINY = TrainConfig(
    network="context",
    features=8,
    steps=6,
    batch_size=8,
    microbatch=8,
    schedule="course",
    train_timesteps=501,
    prediction="epsilon",
    precision="float32",
    warmup_steps=2,
    save_every=2,
    log_every=2,
)
CPU = {"device": "cpu", "backend": "reference"}


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    return resize(merge_classes(load_dataset(SLICE), GROUPS), 8)


@pytest.fixture
def model(dataset: ImageDataset, tmp_path: Path) -> Path:
    """The directory of a model that was trained for two steps."""
    trainer = Trainer(TINY, dataset)
    trainer.train_step()
    trainer.train_step()
    export_model(trainer, tmp_path / "model", ExportRecord(tmp_path))
    return tmp_path / "model"


def same(a: Trainer, b: Trainer) -> bool:
    left, right = a.state().tensors, b.state().tensors
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def course_levels() -> np.ndarray:
    """The course's ab_t for t = 0 .. 500: the exponential of a cumulative sum of logarithms; ab_0 is set to 1."""
    betas = (0.02 - 1e-4) * np.linspace(0, 1, 501) + 1e-4
    levels = np.exp(np.cumsum(np.log(1 - betas)))
    levels[0] = 1
    return levels


def test_the_courses_levels_are_ours_from_1_to_500() -> None:
    schedule = TINY.make_schedule()
    np.testing.assert_allclose(schedule.alphas_cumprod[1:], course_levels()[1:], rtol=1e-12)
    assert schedule.alphas_cumprod[0] == 1 - 1e-4  # the course sees t = 0 as the image itself
    assert read_config(TINY.scheduler_config())[0] == schedule
    scaled = replace(TINY, schedule="linear").make_schedule()
    assert abs(scaled.alphas_cumprod[-1] / course_levels()[-1] - 1) > 0.9  # the control: scaled end points


def test_resize_takes_the_mean_of_the_area() -> None:
    images = torch.randint(0, 256, (3, 1, 28, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fine = images.double().repeat_interleave(16, 2).repeat_interleave(16, 3)  # 448 x 320: cells of 28 x 20
    exact = fine.unfold(2, 28, 28).unfold(3, 20, 20).mean(dim=(-1, -2))
    assert (resize(ImageDataset(images), 16).images - exact).abs().max() <= 0.5 + 1e-4
    assert torch.equal(resize(ImageDataset(images[..., :20, :]), 20).images, images[..., :20, :])


def test_merged_classes_keep_their_images() -> None:
    whole = load_dataset(SLICE)
    merged = merge_classes(whole, {"bag": [8], "shoe": [9, 5]})
    kept = [i for i, label in enumerate(whole.labels.tolist()) if label in (5, 8, 9)]
    assert torch.equal(merged.images, whole.images[kept])
    assert merged.labels.tolist() == [0 if whole.labels[i] == 8 else 1 for i in kept]
    assert merged.class_names == ("bag", "shoe")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resize(load_dataset(SLICE), 29), r"size must be in \[1, 28\], got 29"),
        (lambda: merge_classes(load_dataset(SLICE), {"a": [1], "b": [1]}), "group 'b' has the label 1; accepted are"),
        (lambda: merge_classes(load_dataset(SLICE), {"a": [10]}), "group 'a' has the label 10; accepted are labels"),
        (lambda: merge_classes(load_dataset(SLICE), {"a": []}), "group 'a' has no labels"),
        (lambda: merge_classes(ImageDataset(torch.zeros(1, 1, 4, 4)), {"a": [0]}), "if the data set has labels"),
        (lambda: Trainer(TINY, load_dataset(SLICE), workers=2), "workers must be 1 for network 'context'"),
        (lambda: Trainer(TINY, ImageDataset(torch.zeros(9, 1, 8, 8))), "needs square images with labels, got 8x8 im"),
        (lambda: Trainer(TINY, ImageDataset(torch.zeros(9, 1, 8, 4), torch.zeros(9))), "got 8x4 images with labels"),
        (lambda: replace(TINY, network="vit"), "network must be one of 'unet2d', 'context', got 'vit'"),
        (lambda: replace(TINY, precision="bfloat16"), "precision must be 'float32' for network 'context'"),
        (lambda: replace(TINY, features=0), r"features must be in \[1, 2147483648\], got 0"),
    ],
)
def test_refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(dataset: ImageDataset, tmp_path: Path) -> None:
    whole = train(TINY, dataset, tmp_path / "whole")
    stopped = Trainer(TINY, dataset)
    for _ in range(4):
        stopped.train_step()
    resumed = Trainer(TINY, dataset)
    resumed.restore(stopped.state())
    while not resumed.done:
        resumed.train_step()
    assert same(whole, resumed)
    assert int(resumed.network.init_conv.conv1[1].num_batches_tracked) == 6


def test_running_statistics_are_averaged_like_weights(dataset: ImageDataset) -> None:
    trainer, name = Trainer(TINY, dataset), "init_conv.conv1.1.running_mean"
    expected = trainer.network.state_dict()[name].clone()
    for step in range(3):
        trainer.train_step()
        expected.lerp_(trainer.network.state_dict()[name], 1 - TINY.ema_decay_at(step))
    assert torch.equal(trainer.ema_network().state_dict()[name], expected)
    assert not torch.equal(expected, trainer.network.state_dict()[name])


def test_a_trained_model_loads_and_samples(model: Path, dataset: ImageDataset) -> None:
    trainer = Trainer(TINY, dataset)
    trainer.train_step()
    trainer.train_step()
    engine = sf.Engine.from_pretrained(model, **CPU)
    assert isinstance(engine.network, ContextUNet)
    assert (engine.network.num_timesteps, engine.schedule.num_timesteps) == (500, 501)
    assert (engine.class_names, engine.null_label, engine.num_classes) == (tuple(GROUPS), 5, 6)
    for key, value in trainer.ema_network().state_dict().items():
        stored = value.half().float() if value.is_floating_point() else value
        assert torch.equal(engine.network.state_dict()[key], stored), key
    assert engine.sample(2, steps=3, labels=[0, 4]).shape == (2, 1, 8, 8)
    assert json.loads((model / "model_index.json").read_text())["unet"] == ["stepfusion", "ContextUNet"]


def test_the_command_trains_on_merged_and_shrunken_images(tmp_path: Path) -> None:
    arguments = [str(SLICE), "--out", str(tmp_path / "run"), "--network", "context", "--features", "8"]
    arguments += [
        "--merge",
        "shoe=5, 7,9; bag=8",
        "--resize",
        "8",
        "--precision",
        "float32",
        "--steps",
        "1",
        "--batch-size",
        "4",
    ]
    assert train_cli.main(arguments) == 0
    engine = sf.Engine.from_pretrained(tmp_path / "run" / "model", **CPU)
    assert (engine.shape, engine.class_names) == ((1, 8, 8), ("shoe", "bag"))


@pytest.mark.parametrize("text", ["shoe", "shoe=", "=1", "shoe=a", "shoe=1;shoe=2", "shoe=1;", "shoe=-1"])
def test_the_command_refuses_groups(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cli.main([str(SLICE), "--out", str(tmp_path / "run"), "--merge", text]) == 2
    assert '--merge must be like "shoe=5,7,9; bag=8", every name once' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "unet" / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return edit


def edit_weights(key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "unet" / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        state[key] = change(state[key])
        save_file({name: value for name, value in state.items() if value is not None}, path)

    return edit


COUNTER = "init_conv.conv1.1.num_batches_tracked"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_config(features=None), "the ContextUNet config lacks 'features'; it has in_channels, features"),
        (edit_config(depth=3), "the ContextUNet config has the unknown key 'depth'"),
        (edit_config(features=12), "features must be a multiple of 8, got 12"),
        (edit_config(features="8"), "features must be an integer, got '8'"),
        (edit_config(features=16), "does not fit its config: .* misshapen"),
        (edit_config(_class_name="Transformer2DModel"), "'Transformer2DModel'"),
        (edit_weights(COUNTER, lambda _: None), r"1 missing \(init_conv.conv1.1.num_batches_tracked\)"),
        (edit_weights(COUNTER, torch.Tensor.float), r"1 not int64 \(init_conv.conv1.1.num_batches_tracked F32\)"),
        (edit_weights("out.0.bias", torch.Tensor.long), r"1 not floating point \(out.0.bias I64\)"),
        (edit_weights("out.0.bias", lambda t: t * math.nan), "out.0.bias has values that are not finite"),
    ],
)
def test_a_directory_is_read_strictly(edit: Callable[[Path], None], message: str, model: Path) -> None:
    edit(model)
    with pytest.raises(sf.CheckpointError, match=message):
        sf.Engine.from_pretrained(model, **CPU)


@pytest.fixture
def engine(model: Path) -> sf.Engine:
    """An engine whose network heeds its context."""
    engine = sf.Engine.from_pretrained(model, **CPU)
    torch.manual_seed(0)
    for name, parameter in engine.network.named_parameters():
        if name.startswith("contextembed") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter)
    return engine


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_context_of_one_class_is_its_label(engine: sf.Engine, guidance: float | None, invariant: bool) -> None:
    engine = sf.Engine(engine.network, engine.schedule, null_label=5, invariant=invariant, batch=4, **CPU)
    contexts = torch.cat((torch.eye(5), torch.zeros(1, 5)))
    by_label = engine.sample(6, steps=3, labels=list(range(6)), guidance=guidance)
    assert torch.equal(engine.sample(6, steps=3, labels=contexts, guidance=guidance), by_label)
    assert not torch.equal(by_label[0], engine.sample(1, steps=3, labels=1, guidance=guidance)[0])  # it is heeded


def test_a_mixture_is_what_the_network_makes_of_it(engine: sf.Engine) -> None:
    mixture, start = torch.tensor([0.3, 0.6, 0, 0, 0.1]), torch.randn(2, 1, 8, 8)
    table = engine.table("ddim", timesteps=[400, 100], clip=None)
    x = start
    for t, s in ((400, 100), (100, None)):
        with torch.no_grad():
            eps = engine.network(x, torch.full((2,), t), mixture.expand(2, 5))
        abar = engine.schedule.alphas_cumprod[t]
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        after = 1.0 if s is None else engine.schedule.alphas_cumprod[s]
        x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    torch.testing.assert_close(engine.sample(start=start, table=table, labels=mixture), x, atol=1e-4, rtol=1e-4)
    assert engine.sample(steps=2, labels=mixture).shape == (1, 1, 8, 8)  # one context is for one image, not for five


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(2, 4), ValueError, r"must have shape \[5\] or \[2, 5\], got \[2, 4\]"),
        (torch.zeros(3, 5), ValueError, r"must have shape \[5\] or \[2, 5\], got \[3, 5\]"),
        (torch.full((5,), math.nan), ValueError, "labels that are contexts must be finite"),
        ([[0.3, 0.7, 0, 0, 0], [1, 0, 0, 0, 0]], TypeError, "labels must be an integer"),
    ],
)
def test_contexts_that_do_not_fit(engine: sf.Engine, labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine.sample(2, steps=2, labels=labels)


def test_a_model_without_contexts_takes_no_float_labels() -> None:
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        sf.Engine.from_pretrained("fashion-mnist", **CPU).sample(2, steps=2, labels=torch.zeros(2, 10))
