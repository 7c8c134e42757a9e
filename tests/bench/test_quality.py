"""The quality gate: its arithmetic against closed forms, its classifier, and the bundled model's card."""

import json
import math
import pathlib
import re

import pytest
import torch
from safetensors.torch import save_file

from stepfusion import Engine
from stepfusion.bench import image_classifier, quality
from stepfusion.samplers.path import FlowPath, Path, SigmaPath
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset, load_dataset
from stepfusion.training.trainer import Trainer

SLICE = pathlib.Path(__file__).parents[1] / "data" / "fashion-mnist-slice"
MODEL = "fashion-mnist"


@pytest.fixture(scope="module")
def classifier() -> image_classifier.Classifier:
    return image_classifier.load_classifier()


def exact_sample(mean: torch.Tensor, covariance: torch.Tensor, count: int = 400) -> torch.Tensor:
    """Points whose sample mean and covariance are exactly the given ones: [count, D], float64."""
    raw = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw -= raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_with_diagonal_covariance() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([1.0, 1.0, 3.0]).double()
    var_a, var_b = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 1.0, 0.25]).double()
    closed = 26.0 + (var_a.sqrt() - var_b.sqrt()).square().sum().item()
    a, b = exact_sample(mean_a, var_a.diag()), exact_sample(mean_b, var_b.diag())
    assert quality.frechet_distance(a, b) == pytest.approx(closed, rel=1e-10)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    """For 2x2 matrices, ``tr (A B)^1/2 = sqrt(tr AB + 2 sqrt(det AB))``."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[1.0, -0.5], [-0.5, 4.0]]).double()
    product = a @ b
    cross = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    closed = (a.trace() + b.trace()).item() - 2 * cross
    zero = torch.zeros(2).double()
    measured = quality.frechet_distance(exact_sample(zero, a), exact_sample(zero, b))
    assert measured == pytest.approx(closed, rel=1e-10)
    assert measured != pytest.approx((a.diag().sqrt() - b.diag().sqrt()).square().sum().item(), rel=1e-2)


def test_frechet_distance_of_singular_features() -> None:
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 3] = 0
    assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert quality.frechet_distance(x, x + 2) == pytest.approx(16, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [((3,), (3, 1)), ((4, 2), (4, 3)), ((1, 2), (4, 2))])
def test_frechet_distance_refuses(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {list(a)} and {list(b)}")):
        quality.frechet_distance(torch.zeros(a), torch.zeros(b))


def test_balanced_labels() -> None:
    assert quality.balanced_labels(25, 10).bincount().tolist() == [3] * 5 + [2] * 5


def test_samples_are_rounded_as_files_hold_them() -> None:
    stored = image_classifier.to_unit_range(torch.arange(256))
    assert torch.equal(quality.as_stored(stored), stored)
    assert torch.equal(quality.as_stored(stored + 0.003), stored)
    assert quality.as_stored(torch.tensor([-1.5, 2.0])).tolist() == [-1.0, 1.0]


def test_the_bundled_classifier_knows_the_test_images(classifier: image_classifier.Classifier) -> None:
    facts = json.loads((image_classifier.CLASSIFIER_DIRECTORY / "classifier.json").read_text())
    assert facts["test_accuracy"] >= 0.92
    assert sum(path.stat().st_size for path in image_classifier.CLASSIFIER_DIRECTORY.iterdir()) < 2**20
    assert image_classifier.test_accuracy(classifier, load_dataset(SLICE, "test")) >= 0.85


def test_a_classifier_learns_and_survives_its_file(tmp_path: pathlib.Path) -> None:
    """From every third pixel of both axes, which is a ninth of the work."""
    whole = load_dataset(SLICE)
    dataset = ImageDataset(whole.images[:, :, ::3, ::3].contiguous(), whole.labels)
    trained = image_classifier.train_classifier(dataset, epochs=6, batch_size=20)
    image_classifier.save_classifier(trained, tmp_path, {"epochs": 6})
    loaded = image_classifier.load_classifier(tmp_path)
    x = image_classifier.to_unit_range(dataset.images)
    torch.testing.assert_close(loaded(x), trained(x), rtol=0.05, atol=0.05)
    assert image_classifier.test_accuracy(loaded, dataset) > 0.5


def test_a_damaged_classifier_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "classifier.safetensors"
    path.write_bytes((image_classifier.CLASSIFIER_DIRECTORY / path.name).read_bytes()[:1000])
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a classifier")):
        image_classifier.load_classifier(tmp_path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a classifier")):
        image_classifier.load_classifier(tmp_path)


def test_a_classifier_needs_labels() -> None:
    dataset = load_dataset(SLICE)
    with pytest.raises(ValueError, match="a classifier needs labels and at least 128 images, got 200 images"):
        image_classifier.train_classifier(ImageDataset(dataset.images))


def test_evaluate_tells_real_images_from_noise(classifier: image_classifier.Classifier) -> None:
    train, test = load_dataset(SLICE), load_dataset(SLICE, "test")
    pool = image_classifier.to_unit_range(train.images)

    def real(labels: torch.Tensor, seed: int, guidance: float | None) -> torch.Tensor:
        return torch.stack([pool[(train.labels == label).nonzero()[i // 10, 0]] for i, label in enumerate(labels)])

    def noise(labels: torch.Tensor, seed: int, guidance: float | None) -> torch.Tensor:
        return torch.randn(len(labels), 1, 28, 28, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)

    sizes = {"accuracy_samples": 100, "frechet_samples": 200}
    settings = {"guidance": None, "other_guidance": 2.0, **sizes}
    good = quality.evaluate(real, train, test, classifier, **settings)
    assert good["accuracy_gate"]["passed"]
    assert good["frechet_gate"]["passed"]
    assert good["frechet_ratio"] == pytest.approx(1, rel=0.01)
    assert set(good["asked_for_accuracy_by_guidance"]) == {"None", "2.0"}
    bad = quality.evaluate(noise, train, test, classifier, **settings)
    assert not bad["accuracy_gate"]["passed"]
    assert not bad["frechet_gate"]["passed"]


def tiny_engine(path: Path) -> Engine:
    """An engine for a network that was hardly trained, in place of one that is read from a directory."""
    schedule = "edm" if isinstance(path, SigmaPath) else "flow"
    config = TrainConfig(schedule=schedule, channels=(8,), head_dim=8, norm_groups=4, batch_size=8)
    network = Trainer(config, load_dataset(SLICE)).ema_network()
    return Engine(network, path, prediction=schedule, null_label=10, batch=64, dtype="float32", network="eager")


@pytest.mark.parametrize(
    ("path", "arguments", "name", "evaluations"),
    [
        (SigmaPath(), ["--steps", "4"], "heun", 7),
        (SigmaPath(), ["--sampler", "euler", "--steps", "3"], "euler", 3),
        (FlowPath(told_scale=1000.0), ["--sampler", "heun", "--steps", "3"], "heun", 5),
        (FlowPath(told_scale=1000.0), ["--steps", "2"], "euler", 2),
    ],
    ids=str,
)
def test_a_model_of_another_path_is_measured(
    path: Path,
    arguments: list[str],
    name: str,
    evaluations: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny_engine(path))
    common = ["evaluate", "model", "--data", str(SLICE), "--frechet-samples", "20", "--workers", "1"]
    assert quality.main([*common, *arguments]) == 1  # it misses both gates
    row = json.loads(capsys.readouterr().out)
    assert name in row["sampler"].lower()
    assert row["evaluations"] == evaluations
    assert math.isfinite(row["frechet_ratio"])


def test_a_sampler_of_other_paths_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny_engine(SigmaPath()))
    missing = str(tmp_path / "no data there")
    assert quality.main(["evaluate", "model", "--data", missing, "--sampler", "ddpm"]) == 2
    assert "ddpm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main(["evaluate", "model", "--data", missing, "--sampler", "ddim_inversion"])


def bundled_directory() -> pathlib.Path:
    import stepfusion

    return pathlib.Path(stepfusion.__file__).parent / "models" / MODEL


def recorded() -> dict:
    return json.loads((bundled_directory() / "quality.json").read_text())


def test_the_bundled_model_passed_its_gate() -> None:
    facts = recorded()
    assert facts["asked_for_accuracy"] >= quality.ACCURACY_GATE
    assert facts["frechet_samples_to_test"] <= quality.FRECHET_RATIO_GATE * facts["frechet_train_to_test"]
    assert facts["accuracy_samples"] == 1000
    assert facts["frechet_samples"] == 5000
    assert facts["test_images"] == 10_000
    size = sum(path.stat().st_size for path in bundled_directory().rglob("*") if path.is_file())
    assert size <= 6_000_000


def test_the_model_card_says_what_was_measured() -> None:
    card, facts = (bundled_directory() / "README.md").read_text(), recorded()
    assert f"{facts['asked_for_accuracy']:.1%}".replace("%", " %") in card
    for key in ("frechet_samples_to_test", "frechet_train_to_test", "frechet_ratio"):
        assert f"{facts[key]:.3f}" in card, key


@pytest.mark.slow
def test_the_bundled_model_draws_what_is_asked_for(classifier: image_classifier.Classifier) -> None:
    labels = quality.balanced_labels(30, 10)
    engine = Engine.from_pretrained(MODEL, device="cpu")
    samples = engine.sample(30, steps=10, eta=0.0, seed=0, labels=labels, guidance=recorded()["guidance"])
    assert image_classifier.asked_for_accuracy(classifier, samples, labels) >= 0.8
    assert image_classifier.asked_for_accuracy(classifier, samples, labels.roll(1)) < 0.2
