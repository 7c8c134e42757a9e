"""Training: exact resumption, the arithmetic of rate, average and dropout, and states that are whole or absent."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stepfusion.commands import train as train_cli
from stepfusion.kernels.coefficients import PREDICTIONS
from stepfusion.training import state as train_state
from stepfusion.training.batches import make_batch
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset, load_dataset
from stepfusion.training.export import ExportRecord, export_model
from stepfusion.training.metrics import plot_loss, read_metrics
from stepfusion.training.run import train
from stepfusion.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SLICE = Path(__file__).parents[1] / "data" / "fashion-mnist-slice"
TINY = TrainConfig(
    steps=6,
    batch_size=8,
    microbatch=4,
    channels=(8, 16),
    head_dim=16,
    norm_groups=4,
    warmup_steps=2,
    save_every=2,
    log_every=2,
    precision="float32",  # bfloat16 takes four times as long on a CPU
)
TINY_ARGUMENTS = [
    *("--steps", "4", "--batch-size", "8", "--microbatch", "4", "--channels", "8", "16", "--head-dim", "16"),
    *("--norm-groups", "4", "--save-every", "2", "--log-every", "2", "--precision", "float32"),
]


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    """Every second pixel of every second row: steps of a quarter of the work."""
    whole = load_dataset(SLICE)
    return ImageDataset(whole.images[:, :, ::2, ::2].contiguous(), whole.labels)


def same_tensors(a: Trainer, b: Trainer) -> bool:
    left, right = a.state().tensors, b.state().tensors
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_loss_falls(tmp_path: Path) -> None:
    config = replace(TINY, steps=80, batch_size=16, microbatch=16, learning_rate=4e-3, save_every=1000)
    assert train(config, load_dataset(SLICE), tmp_path).done
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] > 0.7  # a fresh network returns about 0, and the mean square of v is about 0.8 for these images
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


def test_the_loss_falls_in_bfloat16(dataset: ImageDataset, tmp_path: Path) -> None:
    """To learn one image takes fewer steps, each of which takes long in bfloat16 on a CPU."""
    one = ImageDataset(
        dataset.images[:1].expand(8, -1, -1, -1).contiguous(), dataset.labels[:1].expand(8).contiguous()
    )
    config = replace(TINY, steps=60, learning_rate=1e-2, save_every=1000, microbatch=8, precision="bfloat16")
    assert train(config, one, tmp_path).done
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    dataset: ImageDataset, tmp_path: Path, precision: str
) -> None:
    config = replace(TINY, precision=precision)
    whole = train(config, dataset, tmp_path / "whole")
    stops = iter([False, False, False, True])
    half = train(config, dataset, tmp_path / "parts", should_stop=lambda: next(stops))
    assert (half.step, half.done) == (3, False)
    resumed = train(config, dataset, tmp_path / "parts")
    assert resumed.step == 6
    assert same_tensors(whole, resumed)
    other_seed = train(replace(config, seed=1), dataset, tmp_path / "other")
    assert not same_tensors(whole, other_seed)


def test_resuming_needs_the_optimisers_moments(dataset: ImageDataset, tmp_path: Path) -> None:
    """Negative control: the comparison above does notice what a resumption forgets."""
    whole = train(TINY, dataset, tmp_path / "whole")
    train(TINY, dataset, tmp_path / "parts", should_stop=iter([False] * 3 + [True]).__next__)
    forgetful = Trainer(TINY, dataset)
    forgetful.restore(train_state.load_state(tmp_path / "parts" / "state-00000003"))
    for moments in forgetful.optimizer.state.values():
        moments["exp_avg"].zero_()
    while not forgetful.done:
        forgetful.train_step()
    assert not same_tensors(whole, forgetful)


def test_workers_change_no_bit(dataset: ImageDataset) -> None:
    alone, pair = Trainer(TINY, dataset), Trainer(TINY, dataset, workers=2)
    for _ in range(3):
        alone.train_step()
        pair.train_step()
    assert same_tensors(alone, pair)


def test_microbatches_sum_to_the_gradient_of_the_batch(dataset: ImageDataset) -> None:
    config = replace(TINY, precision="float32")
    batch = make_batch(config, dataset, 0)
    whole_loss, whole = Trainer(replace(config, microbatch=8), dataset).gradients(batch)
    parts_loss, parts = Trainer(replace(config, microbatch=3), dataset).gradients(batch)
    torch.testing.assert_close(parts_loss, whole_loss)
    for part, gradient in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(steps=1000, warmup_steps=100, learning_rate=1e-3)
    assert config.learning_rate_at(0) == pytest.approx(1e-5)
    assert config.learning_rate_at(99) == pytest.approx(1e-3)
    assert config.learning_rate_at(100) == pytest.approx(1e-3)
    assert config.learning_rate_at(550) == pytest.approx(5e-4)
    assert 0 < config.learning_rate_at(999) < 1e-8
    assert config.learning_rate_at(1000) == 0
    rates = [config.learning_rate_at(step) for step in range(1001)]
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_the_moving_average_is_the_recurrence(dataset: ImageDataset) -> None:
    trainer = Trainer(replace(TINY, ema_decay=0.2), dataset)
    name, weight = next(iter(trainer.network.named_parameters()))
    expected = weight.detach().double().clone()
    for step in range(4):
        trainer.train_step()
        decay = min(0.2, (1 + step) / (10 + step))
        assert trainer.config.ema_decay_at(step) == decay
        expected = decay * expected + (1 - decay) * weight.detach().double()
    torch.testing.assert_close(trainer.ema[name].double(), expected, rtol=1e-6, atol=1e-7)
    averaged = trainer.ema_network()
    assert torch.equal(dict(averaged.named_parameters())[name], trainer.ema[name])
    assert not averaged.training


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.1, 0.08, 0.12), (1.0, 1, 1)])
def test_labels_are_dropped_at_the_given_rate(
    dataset: ImageDataset, probability: float, low: float, high: float
) -> None:
    config = replace(TINY, batch_size=100, label_dropout=probability)
    labels = torch.cat([make_batch(config, dataset, step).labels for step in range(40)])
    assert low <= (labels == 10).float().mean() <= high
    assert labels.min() >= 0


def test_an_epoch_shows_every_image_once(dataset: ImageDataset) -> None:
    config = replace(TINY, batch_size=20, label_dropout=0.0)
    epochs = [[make_batch(config, dataset, 10 * epoch + step) for step in range(10)] for epoch in range(2)]
    pixels = [torch.cat([batch.x0 for batch in epoch]).sum(dim=(1, 2, 3)) for epoch in epochs]
    assert torch.equal(pixels[0].sort().values, pixels[1].sort().values)
    assert not torch.equal(pixels[0], pixels[1])
    expected = (dataset.images.float() / 127.5 - 1).sum(dim=(1, 2, 3))
    torch.testing.assert_close(pixels[0].sort().values, expected.sort().values)


def test_timesteps_cover_every_stratum(dataset: ImageDataset) -> None:
    config = replace(TINY, batch_size=100)
    for step in range(5):
        batch = make_batch(config, dataset, step)
        assert (batch.levels // 10).tolist() == list(range(100))
    assert not torch.equal(make_batch(config, dataset, 0).levels, make_batch(config, dataset, 1).levels)
    assert torch.equal(make_batch(config, dataset, 3).noise, make_batch(config, dataset, 3).noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_zero_for_the_right_answer(dataset: ImageDataset, prediction: str) -> None:
    """eps, x0 and v each solve ``x_t = a x0 + s eps`` with what the network returns."""
    config = replace(TINY, prediction=prediction, precision="float32")
    trainer = Trainer(config, dataset)
    batch = make_batch(config, dataset, 0)
    abar = torch.from_numpy(config.make_schedule().alphas_cumprod.copy())[batch.levels].float()[:, None, None, None]

    def oracle(x_t: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        eps = (x_t - abar.sqrt() * batch.x0) / (1 - abar).sqrt()
        v = (abar.sqrt() * x_t - batch.x0) / (1 - abar).sqrt()
        return {"epsilon": eps, "sample": batch.x0, "v_prediction": v}[prediction]

    trainer.network.forward = oracle  # type: ignore[method-assign]
    assert trainer.loss(batch) < 1e-6


def test_flip_mirrors_about_half(dataset: ImageDataset) -> None:
    config = replace(TINY, batch_size=200)
    plain, flipped = make_batch(config, dataset, 0), make_batch(replace(config, flip=True), dataset, 0)
    mirrored = (flipped.x0 == plain.x0.flip(3)).all(dim=3).all(dim=2).all(dim=1)
    kept = (flipped.x0 == plain.x0).all(dim=3).all(dim=2).all(dim=1)
    assert (mirrored | kept).all()
    assert 60 < mirrored.sum() < 140


def test_unlabelled_images(dataset: ImageDataset) -> None:
    trainer = Trainer(TINY, ImageDataset(dataset.images))
    assert torch.isfinite(trainer.train_step())
    assert trainer.network.num_classes is None


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("steps", 0, r"steps must be in \[1, "),
        ("batch_size", 1.5, "batch_size must be an integer, got 1.5"),
        ("channels", (), "channels must have at least one entry"),
        ("channels", (8, 0), r"channels\[1\] must be in"),
        ("attention_levels", (3,), "attention_levels must be in"),
        (
            "prediction",
            "noise",
            "prediction must be one of .*, 'v_prediction', 'auto' with schedule 'cosine', got 'noise'",
        ),
        ("schedule", "quadratic", "schedule must be one of 'linear', 'cosine'"),
        ("precision", "float8", "precision must be one of 'float32', 'bfloat16'"),
        ("learning_rate", float("nan"), "learning_rate must be a finite number"),
        ("label_dropout", 1.1, "label_dropout must be a finite number in"),
        ("ema_decay", -0.1, "ema_decay must be a finite number in"),
        ("flip", 1, "flip must be True or False"),
    ],
)
def test_wrong_fields(field: str, value: object, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        replace(TINY, **{field: value})


def test_config_survives_json() -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(asdict(TINY)))) == TINY
    with pytest.raises(ValueError, match=r"unknown fields \['stepps'\]"):
        TrainConfig.from_dict({"stepps": 3})


def test_a_batch_larger_than_the_data(dataset: ImageDataset) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most the 200 images of the data set, got 201"):
        Trainer(replace(TINY, batch_size=201), dataset)


def test_another_run_is_not_resumed(dataset: ImageDataset, tmp_path: Path) -> None:
    train(replace(TINY, steps=2), dataset, tmp_path)
    with pytest.raises(ValueError, match=r"batch_size is 4, but the saved run has 8; it cannot change on resume"):
        train(replace(TINY, batch_size=4), dataset, tmp_path)
    with pytest.raises(ValueError, match=r"the data set is .* but the saved run was trained on"):
        train(TINY, ImageDataset(dataset.images.flip(0)[:150], dataset.labels[:150]), tmp_path)
    assert train(replace(TINY, steps=3, learning_rate=1e-4), dataset, tmp_path).step == 3


def test_a_run_starts_from_the_weights_of_another_prediction(dataset: ImageDataset, tmp_path: Path) -> None:
    """And a run that goes on does not start again."""
    first = train(replace(TINY, steps=2), dataset, tmp_path / "first")
    flow = replace(TINY, schedule="flow", prediction="flow", steps=2)
    fresh, begun = Trainer(flow, dataset), Trainer(flow, dataset)
    begun.start_from(first.network)
    assert not same_tensors(fresh, begun)
    for name, value in first.network.state_dict().items():
        assert torch.equal(begun.state().tensors[f"weights.{name}"], value)
        assert torch.equal(begun.state().tensors[f"ema.{name}"], value)
    begun.train_step()
    assert not torch.equal(next(begun.network.parameters()), next(first.network.parameters()))  # a copy, no alias
    stops = iter((False, True))  # asked before each step
    train(flow, dataset, tmp_path / "second", start_from=first.network, should_stop=lambda: next(stops))
    whole = train(flow, dataset, tmp_path / "second", start_from=fresh.network)
    begun.train_step()
    assert same_tensors(whole, begun)


def test_another_network_to_start_from(dataset: ImageDataset) -> None:
    trainer = Trainer(TINY, dataset)
    before = {name: value.clone() for name, value in trainer.state().tensors.items()}
    for other in ({"channels": (8, 32)}, {"layers_per_block": 2}):
        with pytest.raises(ValueError, match="the network to start from is not the one to train: "):
            trainer.start_from(Trainer(replace(TINY, **other), dataset).network)
    assert all(torch.equal(value, before[name]) for name, value in trainer.state().tensors.items())


def test_the_last_two_states_are_kept(dataset: ImageDataset, tmp_path: Path) -> None:
    train(TINY, dataset, tmp_path)
    kept = [".train.lock", "metrics.jsonl", "state-00000004", "state-00000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_an_interrupted_save_leaves_nothing(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train(replace(TINY, steps=2), dataset, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    written = []

    def full_disk(path: Path, data: bytes) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_bytes(data[: len(data) // 2])

    trainer.train_step()
    with monkeypatch.context() as patch:
        patch.setattr(train_state, "write_synced", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train_state.save_state(tmp_path, trainer.state())
    assert written
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert train(replace(TINY, steps=3), dataset, tmp_path).step == 3


def test_leftovers_of_a_killed_process_are_removed(dataset: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / ".state-00000002.0123.tmp").mkdir()
    train(replace(TINY, steps=2), dataset, tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_state_is_named(dataset: ImageDataset, tmp_path: Path, name: str) -> None:
    train(replace(TINY, steps=2), dataset, tmp_path)
    path = tmp_path / "state-00000002" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="state-00000002 is not a sound training state"):
        train(TINY, dataset, tmp_path)


def test_metrics_of_steps_made_again_are_dropped(dataset: ImageDataset, tmp_path: Path) -> None:
    train(replace(TINY, steps=4), dataset, tmp_path)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write('{"step": 6, "loss": 9}\n{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 6]
    train(TINY, dataset, tmp_path)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["loss"] != 9
    assert set(rows[0]) == {"step", "loss", "lr", "images_per_s", "elapsed_s"}


def test_a_loss_that_is_not_finite_stops_the_run(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: self.network.conv_in.weight.sum() * torch.nan)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, parameters: [torch.zeros_like(p) for p in parameters])
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        train(replace(TINY, save_every=2, log_every=3), dataset, tmp_path)
    assert not list(tmp_path.glob("state-*"))


def test_command_trains_exports_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ",".join(f"class {label}" for label in range(10))
    arguments = [str(SLICE), "--out", str(tmp_path), "--workers", "1", "--class-names", names, *TINY_ARGUMENTS]
    assert train_cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "exported step 4" in said.out
    rows = [json.loads(line) for line in said.out.splitlines() if line.startswith("{")]
    assert rows[-1]["left_s"] == 0
    assert rows[0]["left_s"] >= 0
    assert re.search(
        r"^stepfusion: UNet2D of [\d,]+ parameters on cpu, [\d,]+ images of 1x\d+x\d+, steps 0 to 4$", said.err, re.M
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "model" / "stepfusion.json").read_text())
    assert facts["class_names"] == names.split(",")
    assert facts["null_label"] == 10
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    exported = weights.read_bytes()
    weights.unlink()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    assert train_cli.main([*arguments, "--export-only"]) == 0
    assert weights.read_bytes() == exported
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_diffusers_reads_the_export(dataset: ImageDataset, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    trainer = train(TINY, dataset, tmp_path)
    export_model(trainer, tmp_path / "model", ExportRecord(tmp_path))
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "model" / "unet").eval()
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    abar = trainer.config.make_schedule().alphas_cumprod
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), abar, rtol=1e-4)
    x, t, labels = torch.randn(2, 1, 14, 14), torch.tensor([3, 900]), torch.tensor([1, 10])
    with torch.no_grad():
        ours = trainer.ema_network().half().float()(x, t, labels)
        theirs = model(x, t, labels).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--export-only"], "run has no saved state to export"),
        (["--class-names", "a,b"], "--class-names must give 10 names, got 2"),
        (["--batch-size", "500"], "batch_size must be at most the 200 images"),
        (["--channels", "8", "15"], "norm_num_groups"),
        (["--learning-rate", "0"], "learning_rate must be a finite number in (0, 1], got 0.0"),
    ],
)
def test_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], sentence: str
) -> None:
    out = tmp_path / "run"
    assert train_cli.main([str(SLICE), "--out", str(out), "--workers", "1", *TINY_ARGUMENTS, *changes]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_without_matplotlib_the_plot_is_skipped(
    dataset: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(TINY, steps=2), dataset, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_loss(tmp_path)
    assert "matplotlib is not installed: no loss.png" in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--workers", "1", *TINY_ARGUMENTS]
    arguments[arguments.index("--steps") + 1] = "1000000"
    command = [sys.executable, "-m", "stepfusion.commands.train", str(SLICE), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        metrics = tmp_path / "metrics.jsonl"
        while not read_metrics(metrics) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()  # or a process that goes on would hold the test for ever
    assert process.returncode == 130
    assert "the state is saved, the same command goes on" in output
    newest = train_state.latest_state(tmp_path)
    assert newest is not None
    assert f"stopped at step {train_state.load_state(newest).metadata.step} of" in output
