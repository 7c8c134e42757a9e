"""Training along EDM's path and the straight one: exact resumption, the loss, what is exported, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion.commands import train as train_cli
from stepfusion.diffusion.path_losses import edm_loss, flow_loss
from stepfusion.samplers.path import FlowPath, SigmaPath
from stepfusion.training.batches import make_batch
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset, load_dataset
from stepfusion.training.export import ExportRecord, export_model
from stepfusion.training.metrics import read_metrics
from stepfusion.training.run import train
from stepfusion.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SLICE = Path(__file__).parents[1] / "data" / "fashion-mnist-slice"
SIZES = {
    "steps": 4,
    "batch_size": 8,
    "microbatch": 4,
    "channels": (8, 16),
    "head_dim": 16,
    "norm_groups": 4,
    "warmup_steps": 2,
    "save_every": 2,
    "log_every": 2,
}
CONFIGS = {
    "edm": TrainConfig(schedule="edm", sigma_data=0.7, precision="bfloat16", **SIZES),
    "edm, other levels": TrainConfig(schedule="edm", p_mean=-0.4, p_std=1.0, precision="float32", **SIZES),
    "flow": TrainConfig(schedule="flow", precision="float32", **SIZES),
    "logit-normal": TrainConfig(schedule="flow", times="logit-normal", logit_mean=0.2, precision="float32", **SIZES),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TINY_ARGUMENTS = [
    *("--steps", "3", "--batch-size", "8", "--microbatch", "4", "--channels", "8", "16", "--head-dim", "16"),
    *("--norm-groups", "4", "--save-every", "2", "--log-every", "1", "--precision", "float32", "--workers", "1"),
]


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    """Every second pixel of every second row: steps of a quarter of the work."""
    whole = load_dataset(SLICE)
    return ImageDataset(whole.images[:, :, ::2, ::2].contiguous(), whole.labels)


def same_tensors(a: Trainer, b: Trainer) -> bool:
    left, right = a.state().tensors, b.state().tensors
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@each_config
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    dataset: ImageDataset, tmp_path: Path, config: TrainConfig
) -> None:
    whole = train(config, dataset, tmp_path / "whole")
    half = train(config, dataset, tmp_path / "parts", should_stop=iter([False, False, False, True]).__next__)
    assert half.step == 3
    resumed = train(config, dataset, tmp_path / "parts")
    assert resumed.step == 4
    assert same_tensors(whole, resumed)
    assert same_tensors(whole, train(config, dataset, tmp_path / "pair", workers=2))
    assert not same_tensors(whole, train(replace(config, seed=1), dataset, tmp_path / "other"))


@pytest.mark.parametrize("name", ["edm", "logit-normal"])
def test_the_loss_falls(tmp_path: Path, name: str) -> None:
    config = replace(CONFIGS[name], steps=60, microbatch=8, learning_rate=1e-2, save_every=1000)
    config = replace(config, precision="float32")  # bfloat16 takes four times as long on a CPU
    assert train(config, load_dataset(SLICE), tmp_path).done
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert 0.5 < losses[0] < 6  # about the mean square of what is wanted, for a fresh network returns about 0
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


@each_config
def test_the_loss_is_that_of_the_functions(dataset: ImageDataset, config: TrainConfig) -> None:
    """Which draw by themselves, from the same seed and step, what the trainer draws."""
    config = replace(config, precision="float32", seed=5)
    trainer, batch = Trainer(config, dataset), make_batch(config, dataset, 3)
    common: dict[str, Any] = {"labels": batch.labels, "seed": 5, "step": 3}
    if config.schedule == "edm":
        path = SigmaPath(sigma_data=config.sigma_data)
        drawn = {"p_mean": config.p_mean, "p_std": config.p_std}
        losses = edm_loss(trainer.network, path, batch.x0, **drawn, **common)
    else:
        drawn = {"times": config.times, "logit_mean": config.logit_mean, "logit_std": config.logit_std}
        losses = flow_loss(trainer.network, FlowPath(told_scale=1000.0), batch.x0, **drawn, **common)
    assert torch.equal(losses.mean(), trainer.loss(batch))
    assert config.make_schedule() == (path if config.schedule == "edm" else FlowPath(told_scale=1000.0))
    assert batch.levels.dtype == torch.float64


@each_config
def test_microbatches_sum_to_the_gradient_of_the_batch(dataset: ImageDataset, config: TrainConfig) -> None:
    config = replace(config, precision="float32")
    batch = make_batch(config, dataset, 0)
    whole_loss, whole = Trainer(replace(config, microbatch=8), dataset).gradients(batch)
    parts_loss, parts = Trainer(replace(config, microbatch=3), dataset).gradients(batch)
    torch.testing.assert_close(parts_loss, whole_loss)
    for part, gradient in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-4, atol=1e-6)


@each_config
def test_the_loss_is_zero_for_the_right_answer(dataset: ImageDataset, config: TrainConfig) -> None:
    """What a network is shown and told is enough to find it, given the images."""
    config = replace(config, precision="float32")
    trainer, batch = Trainer(config, dataset), make_batch(config, dataset, 0)

    def oracle(x: Tensor, told: Tensor, labels: Tensor | None) -> Tensor:
        level = (4 * told.double()).exp() if config.schedule == "edm" else told.double() / 1000
        level, x, x0 = level[:, None, None, None], x.double(), batch.x0.double()
        if config.schedule == "flow":
            return (x - x0) / level
        root = (level**2 + config.sigma_data**2).sqrt()
        return (x0 - config.sigma_data**2 / root * x) * root / (level * config.sigma_data)

    trainer.network.forward = oracle  # type: ignore[method-assign]
    assert trainer.loss(batch) < 1e-5


@each_config
def test_unlabelled_images(dataset: ImageDataset, config: TrainConfig) -> None:
    trainer = Trainer(config, ImageDataset(dataset.images))
    assert torch.isfinite(trainer.train_step())
    assert trainer.network.num_classes is None


def test_the_network_heeds_what_it_is_told(dataset: ImageDataset) -> None:
    """Floats between two integers too, in one pass or with the time path computed before."""
    network = Trainer(CONFIGS["flow"], dataset).network.eval()
    x, labels = torch.randn(3, 1, 14, 14), torch.tensor([0, 1, 10])
    told = torch.tensor([0.25, 0.5, 999.75])
    with torch.no_grad():
        whole = network(x, told, labels)
        hoisted = network.predict(x, network.condition(network.embed_time(told), labels))
        assert torch.equal(whole, hoisted)
        assert not torch.equal(whole, network(x, told.floor(), labels))
        assert torch.equal(network(x, told.double(), labels), whole)


# Configurations


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"schedule": "edm", "prediction": "v_prediction"},
            "prediction must be one of 'edm', 'auto' with schedule 'e",
        ),
        ({"schedule": "flow", "prediction": "edm"}, "prediction must be one of 'flow', 'auto' with schedule 'flow'"),
        ({"prediction": "flow"}, "with schedule 'cosine', got 'flow'"),
        ({"schedule": "linear", "p_mean": 0.0}, "p_mean is an option of schedule 'edm', and schedule is 'linear'"),
        (
            {"schedule": "flow", "sigma_data": 1.0},
            "sigma_data is an option of schedule 'edm', and schedule is 'flow'",
        ),
        (
            {"schedule": "edm", "times": "logit-normal"},
            "times is an option of schedule 'flow', and schedule is 'edm'",
        ),
        (
            {"schedule": "flow", "logit_std": 2.0},
            "logit_std is an option of times 'logit-normal', and times is 'unif",
        ),
        ({"schedule": "edm", "train_timesteps": 500}, "train_timesteps must be 1000 with schedule 'edm', got 500"),
        (
            {"schedule": "flow", "network": "context", "precision": "float32"},
            "network must be 'unet2d' with schedule 'flow', got 'context'",
        ),
        ({"schedule": "edm", "sigma_data": 0}, "sigma_data must be a finite number in (0, inf], got 0"),
        ({"schedule": "edm", "p_std": -1.0}, "p_std must be a finite number in [0, 10], got -1.0"),
        ({"schedule": "edm", "p_mean": math.nan}, "p_mean must be a finite number in [-100, 100], got nan"),
        ({"schedule": "flow", "times": "even"}, "times must be one of 'uniform', 'logit-normal', got 'even'"),
        ({"schedule": "ot"}, "schedule must be one of 'linear', 'cosine', 'course', 'edm', 'flow', got 'ot'"),
    ],
)
def test_combinations_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**given)


def test_the_prediction_follows_the_schedule() -> None:
    found = {name: TrainConfig(schedule=name).prediction for name in ("linear", "cosine", "course", "edm", "flow")}
    assert list(found.values()) == ["v_prediction"] * 3 + ["edm", "flow"]
    assert TrainConfig(schedule="edm", prediction="edm") == TrainConfig(schedule="edm")


@each_config
def test_config_survives_json(config: TrainConfig) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_a_state_of_before_these_schedules_is_read() -> None:
    """It lacks their options, and can only be of a schedule that has none."""
    config = TrainConfig()
    options = {"sigma_data", "p_mean", "p_std", "times", "logit_mean", "logit_std"}
    before = {key: value for key, value in asdict(config).items() if key not in options}
    assert TrainConfig.from_dict(before) == config
    with pytest.raises(ValueError, match=r"missing fields \['seed'\]"):
        TrainConfig.from_dict({key: value for key, value in before.items() if key != "seed"})


@pytest.mark.parametrize("field", ["sigma_data", "p_mean", "p_std"])
def test_another_objective_is_not_resumed(dataset: ImageDataset, tmp_path: Path, field: str) -> None:
    train(replace(CONFIGS["edm"], steps=1), dataset, tmp_path)
    with pytest.raises(ValueError, match=f"{field} is 0.9, but the saved run has .*; it cannot change on resume"):
        train(replace(CONFIGS["edm"], **{field: 0.9}), dataset, tmp_path)


# What is exported


def test_diffusers_edm_scheduler_has_the_same_numbers() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS["edm"].scheduler_config()
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    path, sigma = CONFIGS["edm"].make_schedule(), torch.tensor([0.002, 0.3, 1.0, 20.0, 80.0])[:, None]
    x, out = torch.randn(2, 5, 4)
    of_x, of_out = (torch.from_numpy(w).float() for w in path.predict("edm", sigma.numpy()))
    torch.testing.assert_close(scheduler.precondition_outputs(x, out, sigma), of_x * x + of_out * out)
    c_in = torch.from_numpy(path.in_scale("edm", sigma.numpy())).float()
    torch.testing.assert_close(scheduler.precondition_inputs(x, sigma), c_in * x)
    told = torch.from_numpy(path.told(sigma.numpy())).float()
    torch.testing.assert_close(scheduler.precondition_noise(sigma), told)
    assert (scheduler.config.sigma_min, scheduler.config.sigma_max) == (path.sigma_min, path.sigma_max)
    assert set(config) - {"_class_name"} <= set(scheduler.config)


def test_diffusers_flow_scheduler_walks_the_same_line() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS["flow"].scheduler_config()
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    path = CONFIGS["flow"].make_schedule()
    scheduler.set_timesteps(10)
    levels = scheduler.sigmas[:-1].double().numpy()
    np.testing.assert_allclose(path.told(levels), scheduler.timesteps.double(), rtol=1e-6)
    x0, eps = torch.randn(2, 3, 4)
    signal, noise = path.pair(levels)
    x = float(signal[2]) * x0 + float(noise[2]) * eps
    after = scheduler.step(eps - x0, scheduler.timesteps[2], x).prev_sample
    torch.testing.assert_close(after, float(signal[3]) * x0 + float(noise[3]) * eps)
    assert set(config) - {"_class_name"} <= set(scheduler.config)


@pytest.mark.parametrize(
    ("name", "pipeline", "scheduler"),
    [
        ("edm", "ConsistencyModelPipeline", "EDMEulerScheduler"),
        ("flow", "DDPMPipeline", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_diffusers_samples_from_the_export(
    dataset: ImageDataset, tmp_path: Path, name: str, pipeline: str, scheduler: str
) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(CONFIGS[name], steps=1)
    trainer = train(config, ImageDataset(dataset.images), tmp_path)
    export_model(trainer, tmp_path / "model", ExportRecord(tmp_path))
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert (type(loaded).__name__, type(loaded.scheduler).__name__) == (pipeline, scheduler)
    loaded.set_progress_bar_config(disable=True)
    images = loaded(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 14, 14, 1)
    assert np.isfinite(images).all()
    told = torch.tensor([0.25, 700.5])
    x = torch.randn(2, 1, 14, 14)
    with torch.no_grad():
        ours = trainer.ema_network().half().float()(x, told)
        torch.testing.assert_close(ours, loaded.unet(x, told).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["eager", "auto"])
@pytest.mark.parametrize("name", ["edm", "flow"])
def test_an_engine_walks_the_path_that_was_trained(dataset: ImageDataset, name: str, network: str) -> None:
    """Euler's steps by hand, with the network as it was trained: shown and told the same, hoisted or not."""
    config = replace(CONFIGS[name], learning_rate=0.1)
    trainer, labels = Trainer(config, dataset), torch.tensor([3, 8, 10])
    while not trainer.done:
        trainer.train_step()
    trained, path = trainer.ema_network(), config.make_schedule()
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32", "network": network}
    engine = sf.Engine(trained, path, prediction=config.prediction, null_label=10, **given)
    table = engine.table("euler", 5)
    start = 0.8 * torch.randn(3, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    x = start = start * (path.sigma_max if name == "edm" else 1.0)
    for here, there in itertools.pairwise([*table.levels.noise, 0.0]):
        level = torch.full((3,), here)
        with torch.no_grad():
            if name == "edm":
                data = config.sigma_data
                root = math.sqrt(here**2 + data**2)
                out = trained(x / root, level.log() / 4, labels)
                slope = (x - (data**2 / root**2 * x + here * data / root * out)) / here
            else:
                slope = trained(x, 1000 * level, labels)
        x = x + (there - here) * slope
    images = engine.sample(start=start, table=table, labels=labels)
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-4)
    other = engine.sample(start=start, table=table, labels=(labels + 1) % 11)
    assert (other - x).abs().max() > 1e-2  # the labels, and so the weights, are heeded


@each_config
def test_an_export_says_its_path(dataset: ImageDataset, tmp_path: Path, config: TrainConfig) -> None:
    trainer = train(replace(config, steps=1), dataset, tmp_path)
    export_model(trainer, tmp_path / "model", ExportRecord(tmp_path))
    engine = sf.Engine.from_pretrained(tmp_path / "model", device="cpu", dtype="float32", network="eager")
    assert (engine.schedule, engine.prediction) == (config.make_schedule(), config.schedule)
    assert (engine.num_classes, engine.null_label) == (11, 10)
    images = engine.sample(2, steps=3, labels=[1, 2], guidance=1.5, seed=4)
    network = trainer.ema_network().half().float()  # as it is stored
    given: dict[str, Any] = {"device": "cpu", "dtype": "float32", "network": "eager", "null_label": 10}
    told = sf.Engine(network, config.make_schedule(), prediction=config.schedule, **given)
    assert torch.equal(told.sample(2, engine.table(steps=3), labels=[1, 2], guidance=1.5, seed=4), images)


@pytest.mark.parametrize("schedule", ["edm", "flow"])
def test_the_command_trains_resumes_and_exports(
    schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--sigma-data", "0.7"] if schedule == "edm" else ["--times", "logit-normal"]
    arguments = [str(SLICE), "--out", str(tmp_path), "--schedule", schedule, *extra, *TINY_ARGUMENTS]
    arguments[arguments.index("--steps") + 1] = "2"
    assert train_cli.main(arguments) == 0
    arguments[arguments.index("--steps") + 1] = "3"
    assert train_cli.main(arguments) == 0
    assert "exported step 3" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    written = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    config = TrainConfig(schedule=schedule, **({"sigma_data": 0.7} if schedule == "edm" else {}))
    assert written == config.scheduler_config()
    assert train_cli.main([*arguments, "--export-only"]) == 0
    assert train_cli.main([*arguments[:-1], "2", "--p-mean", "0.5"]) == 2  # another run, or an option unread
    assert "p_mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--schedule", "edm", "--prediction", "epsilon"], "prediction must be one of 'edm', 'auto' with schedule"),
        (["--schedule", "flow", "--network", "context", "--precision", "float32"], "network must be 'unet2d' with"),
        (
            ["--schedule", "flow", "--train-timesteps", "100"],
            "train_timesteps must be 1000 with schedule 'flow', got",
        ),
        (["--sigma-data", "0.7"], "sigma_data is an option of schedule 'edm', and schedule is 'cosine'"),
        (["--times", "logit-normal"], "times is an option of schedule 'flow', and schedule is 'cosine'"),
    ],
)
def test_the_command_refuses_before_any_work(
    changes: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    missing = tmp_path / "no data there"
    assert train_cli.main([str(missing), "--out", str(out), *TINY_ARGUMENTS, *changes]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not out.exists()
