"""Inversion and interpolation: round trips, great arcs, and that eta = 0 leaves nothing to chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion_testing.walking import Gaussian

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = {"device": "cpu", "backend": "reference"}


@pytest.fixture(scope="module")
def bundled() -> sf.Engine:
    return sf.Engine.from_pretrained("fashion-mnist", **CPU)


@pytest.fixture(scope="module")
def ideal() -> sf.Engine:
    """The ideal denoiser of data N(0.2, 0.5^2), for which the map between image and noise is known."""
    schedule = sf.NoiseSchedule.linear(1000)
    network = Gaussian(torch.from_numpy(schedule.alphas_cumprod.copy()), "epsilon", 0.2, 0.5)
    return sf.Engine(network, schedule, shape=(1, 8, 8), options={"clip": None}, **CPU)


def psnr(x: Tensor, y: Tensor) -> float:
    """The mean over images [n, ...] in [-1, 1], in dB."""
    mean_square = np.square(x.double().numpy() - y.double().numpy()).reshape(len(x), -1).mean(1)
    return float((10 * np.log10(4 / mean_square)).mean())


def arc(a: np.ndarray, b: np.ndarray, w: float) -> np.ndarray:
    """Song et al. 2021, equation 67, as it stands there."""
    theta = np.arccos((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return (np.sin((1 - w) * theta) * a + np.sin(w * theta) * b) / np.sin(theta)


def noises(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 1, 8, 8, generator=generator))


def test_slerp_is_the_papers_equation() -> None:
    a, b = noises()
    for w, point in zip((0.0, 0.3, 1.0), sf.slerp(a, b, [0.0, 0.3, 1.0]), strict=True):
        np.testing.assert_allclose(point.numpy(), arc(a.double().numpy(), b.double().numpy(), w), atol=1e-6)
    assert torch.equal(sf.slerp(a, b, 7), sf.slerp(a, b, [i / 6 for i in range(7)]))
    assert sf.slerp(a.double(), b, 2).dtype == torch.float64
    assert sf.slerp(a.bfloat16(), b.bfloat16(), 2).dtype == torch.float32


def test_slerp_keeps_the_length_and_a_line_does_not() -> None:
    a, b = noises()
    a, b = a / a.norm(), b / b.norm()
    assert sf.slerp(a, b, 9).flatten(1).norm(dim=1).sub(1).abs().max() < 1e-6
    assert ((a + b) / 2).norm() < 0.8


def test_slerp_of_parallel_noises_is_a_line() -> None:
    a, _ = noises()
    torch.testing.assert_close(sf.slerp(a, a, 3), a.expand(3, 1, 8, 8))
    torch.testing.assert_close(sf.slerp(a, 2 * a, [0.25])[0], 1.25 * a)


def test_encode_converges_to_the_known_map_of_a_gaussian(ideal: sf.Engine) -> None:
    """x_T = sqrt(abar) m + (x - m) sqrt(abar s^2 + 1 - abar) / s, and Euler's error is of first order."""
    x, errors = 0.2 + 0.5 * torch.stack(noises()), []
    for steps in (50, 100, 200):
        abar = float(ideal.schedule.alphas_cumprod[ideal.table("ddim", steps).timesteps[0]])
        exact = math.sqrt(abar) * 0.2 + (x - 0.2) / 0.5 * math.sqrt(abar * 0.25 + 1 - abar)
        errors.append(float((ideal.encode(x, steps=steps) - exact).abs().max()))
    assert all(0.45 < less / more < 0.55 for more, less in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.05


def test_reconstruction_error_falls_with_the_steps(ideal: sf.Engine) -> None:
    x = 0.2 + 0.5 * torch.stack(noises())
    errors = [float((ideal.reconstruct(x, steps=steps) - x).abs().max()) for steps in (25, 50, 100, 200)]
    assert all(more > 1.5 * less for more, less in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("labels", [[3], pytest.param([1, 3, 8], marks=pytest.mark.soak)], ids=str)
def test_bundled_images_come_back(labels: list[int], bundled: sf.Engine) -> None:
    """The promise, on one image or three: at least 30 dB at 200 steps, and rising from 50 to 100 to 200."""
    x = bundled.sample(len(labels), steps=25, labels=labels, guidance=1.5, progress=False).clamp(-1, 1)
    quality = [psnr(bundled.reconstruct(x, steps=steps, labels=labels), x) for steps in (50, 100, 200)]
    assert quality[0] < quality[1] < quality[2], quality
    assert quality[2] >= 30, quality


def test_another_label_on_the_way_back_is_another_image(bundled: sf.Engine) -> None:
    """The negative control: the same noise walked under the null label does not come back."""
    x = bundled.sample(2, steps=10, labels=[1, 3], progress=False).clamp(-1, 1)
    other = bundled.sample(start=bundled.encode(x, steps=50, labels=[1, 3]), steps=50)
    assert psnr(other, x) < 20 < 30 < psnr(bundled.reconstruct(x, steps=50, labels=[1, 3]), x)


def test_from_a_given_start_eta_0_ignores_the_seed_and_eta_1_does_not(bundled: sf.Engine) -> None:
    start = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for eta, same in ((0.0, True), (1.0, False)):
        one, other = (bundled.sample(start=start, steps=5, eta=eta, labels=4, seed=seed) for seed in (1, 2))
        assert torch.equal(one, other) is same, eta


def test_interpolate_ends_in_the_images_of_its_ends(bundled: sf.Engine) -> None:
    x = bundled.interpolate(5, (1 << 64) - 1, 3, steps=4, labels=9)
    ends = bundled.sample(2, steps=4, labels=9, seed=[5, (1 << 64) - 1], indices=[0, 0])
    torch.testing.assert_close(x[[0, 2]], ends, atol=1e-5, rtol=0)
    assert (x[1] - x[0]).abs().max() > 0.1 < (x[1] - x[2]).abs().max()


def test_interpolate_between_given_noises_walks_the_arc(bundled: sf.Engine) -> None:
    a, b = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    middle = torch.from_numpy(arc(a.double().numpy(), b.double().numpy(), 0.4)).float()[None]
    table = bundled.table("ddim", 4, clip=None)
    x = bundled.interpolate(a, b, [0.4], table, labels=2)
    torch.testing.assert_close(x, bundled.sample(start=middle, table=table, labels=2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": np.zeros(3)}, TypeError, "a must be a floating-point tensor, got ndarray"),
        ({"b": torch.zeros(1, 8, 8, dtype=torch.int64)}, TypeError, "b must be a floating-point tensor, got int64"),
        ({"a": torch.full((1, 8, 8), math.nan)}, ValueError, "a must be finite and not all zero"),
        ({"b": torch.zeros(1, 8, 8)}, ValueError, "b must be finite and not all zero"),
        (
            {"b": torch.ones(8, 8)},
            ValueError,
            r"a and b must have one shape and device, got \[1, 8, 8\] and \[8, 8\]",
        ),
        (
            {"b": -noises()[0]},
            ValueError,
            "opposite directions: no arc between them is the shortest",
        ),
        ({"weights": 1}, ValueError, r"weights must be in \[2, 1048576\], got 1"),
        ({"weights": [0.5, 1.5]}, ValueError, r"weights must be a finite number in \[0, 1\], got 1.5"),
        ({"weights": []}, TypeError, r"weights must be how many, or a sequence of numbers in \[0, 1\], got \[\]"),
        ({"weights": "7"}, TypeError, r"weights must be how many, or a sequence of numbers in \[0, 1\], got '7'"),
    ],
)
def test_slerp_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    a, b = noises()
    with pytest.raises(error, match=message):
        sf.slerp(**{"a": a, "b": b, "weights": 7, **change})


@pytest.mark.parametrize(
    ("ends", "error", "message"),
    [
        ((1, -1), ValueError, r"b must be in \[0, 18446744073709551615\], got -1"),
        ((1.5, 2), TypeError, "a must be an integer, got 1.5"),
        ((1, torch.zeros(2, 1, 8, 8)), ValueError, r"b must have shape \[1, 8, 8\], got \[2, 1, 8, 8\]"),
    ],
)
def test_interpolate_refuses(ideal: sf.Engine, ends: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ideal.interpolate(*ends)


def test_reconstruct_refuses_what_encode_refuses(ideal: sf.Engine) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \[2, 1, 8, 8\], got \[2, 1, 4, 4\]"):
        ideal.reconstruct(torch.zeros(2, 1, 4, 4))
