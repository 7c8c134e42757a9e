"""predict_v and get_velocity: v of clean images and noise, beside float64, diffusers, and their own inverse."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.kernels.tolerance import tolerance

SHAPE = (4, 3, 5, 6)
T = torch.tensor([0, 1, 500, 999])
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def diffusion() -> sf.GaussianDiffusion:
    return sf.GaussianDiffusion(sf.NoiseSchedule.linear())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def exact(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """sqrt(abar) eps - sqrt(1 - abar) x0 in float64."""
    abar = torch.from_numpy(ABAR[T.numpy()]).view(-1, 1, 1, 1)
    return abar.sqrt() * noise.double() - (1 - abar).sqrt() * images.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v_is_its_formula(
    diffusion: sf.GaussianDiffusion, images: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype
) -> None:
    images, noise = images.to(dtype), noise.to(dtype)
    v = diffusion.predict_v(images, T, noise)
    assert v.dtype == torch.float32
    velocity = diffusion.get_velocity(images, noise, T)
    assert velocity.dtype == dtype
    for found, rounded in ((v, torch.float32), (velocity, dtype)):
        final = torch.float32 if rounded == torch.float64 else rounded
        atol = tolerance(final, 5.0, 8)
        torch.testing.assert_close(found.double(), exact(images, noise), rtol=0, atol=atol)


def test_diffusers_velocity(diffusion: sf.GaussianDiffusion, images: torch.Tensor, noise: torch.Tensor) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule="linear").get_velocity(images, noise, T)
    ours = diffusion.get_velocity(images, noise, T)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("timesteps", [None, [999, 500, 1, 0], [999, 700, 20, 7]])
def test_the_image_comes_back(
    diffusion: sf.GaussianDiffusion, images: torch.Tensor, noise: torch.Tensor, timesteps: list[int] | None
) -> None:
    t = T
    if timesteps is not None:
        diffusion, t = diffusion.respaced(timesteps), torch.tensor([0, 1, 2, 3])
    x_t, v = diffusion.q_sample(images, t, noise), diffusion.predict_v(images, t, noise)
    back = diffusion.predict_start_from_v(x_t, t, v)
    torch.testing.assert_close(back, images, rtol=0, atol=tolerance(torch.float32, 5.0, 16))


def test_it_is_what_v_models_are_trained_on(images: torch.Tensor, noise: torch.Tensor) -> None:
    diffusion = sf.GaussianDiffusion(sf.NoiseSchedule.cosine(), prediction="v_prediction")
    v = diffusion.predict_v(images, T, noise)
    assert diffusion.training_losses(lambda x, t: v, images, T, noise=noise).max() == 0
    assert diffusion.training_losses(lambda x, t: -v, images, T, noise=noise).min() > 0.1


def test_with_zero_terminal_snr_v_is_minus_the_image(images: torch.Tensor, noise: torch.Tensor) -> None:
    diffusion = sf.GaussianDiffusion(sf.NoiseSchedule.linear().rescale_zero_terminal_snr())
    last = torch.full((4,), 999)
    assert torch.equal(diffusion.predict_v(images, last, noise), -images)


def test_gradients(diffusion: sf.GaussianDiffusion, images: torch.Tensor, noise: torch.Tensor) -> None:
    images, noise = images.requires_grad_(), noise.requires_grad_()
    diffusion.predict_v(images, T, noise).sum().backward()
    abar = torch.from_numpy(ABAR[T.numpy()]).view(-1, 1, 1, 1).expand(SHAPE)
    atol = tolerance(torch.float32, 1.0, 4)
    torch.testing.assert_close(images.grad.double(), -(1 - abar).sqrt(), rtol=0, atol=atol)
    torch.testing.assert_close(noise.grad.double(), abar.sqrt(), rtol=0, atol=atol)


def test_no_image(diffusion: sf.GaussianDiffusion) -> None:
    empty = torch.empty(0, 3, 4, 4)
    assert diffusion.predict_v(empty, torch.empty(0, dtype=torch.int64), empty).shape == (0, 3, 4, 4)


X, ONE = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, ONE + 1000, X), ValueError, "t must lie in [0, 999], got 1000 to 1000"),
        ((X, ONE.float(), X), TypeError, "t must be int64, got float32"),
        ((X, ONE[:1], X), ValueError, "t must have shape [2], got [1]"),
        ((X.long(), ONE, X), TypeError, "x_start must be float16 or bfloat16 or float32 or float64, got int64"),
        ((X, ONE, X[:1]), ValueError, "noise must have shape [2, 1, 4, 4], got [1, 1, 4, 4]"),
        ((X, ONE, X.long()), TypeError, "noise must be float16 or bfloat16 or float32 or float64, got int64"),
        ((X, ONE, X.to("meta")), ValueError, "noise must be on cpu, got meta"),
        ((X, ONE, None), TypeError, "noise must be a tensor, got NoneType"),
    ],
)
def test_refuses(
    diffusion: sf.GaussianDiffusion, arguments: tuple[torch.Tensor, ...], error: type[Exception], message: str
) -> None:
    x_start, t, noise = arguments
    with pytest.raises(error, match=re.escape(message)):
        diffusion.predict_v(x_start, t, noise)
    with pytest.raises(error, match=re.escape(message)):
        diffusion.get_velocity(x_start, noise, t)
