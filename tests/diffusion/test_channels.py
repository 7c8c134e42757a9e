"""What a model may return: one check, with one sentence, in every method that asks a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion_testing.diffusion_models import ConvolutionalModel

SHAPE = (2, 3, 5, 7)
X, T = torch.zeros(SHAPE), torch.tensor([0, 30])
SCHEDULE = sf.NoiseSchedule.linear(50)
NEEDED = "and variance 'fixed_small' needs [2, 3, 5, 7]"
HOOKS: dict[str, Any] = {"cond_fn": lambda x, t: x, "denoised_fn": lambda x0: x0}

Call = Callable[[sf.GaussianDiffusion, Any], object]

METHODS: dict[str, Call] = {
    "p_mean_variance": lambda d, m: d.p_mean_variance(m, X, T),
    "p_sample": lambda d, m: d.p_sample(m, X, T, noise=X),
    "p_sample, guided": lambda d, m: d.p_sample(m, X, T, noise=X, **HOOKS),
    "ddim_sample": lambda d, m: d.ddim_sample(m, X, T),
    "ddim_sample, guided": lambda d, m: d.ddim_sample(m, X, T, **HOOKS),
    "ddim_reverse_sample": lambda d, m: d.ddim_reverse_sample(m, X, T),
    "p_sample_loop": lambda d, m: d.p_sample_loop(m, SHAPE, steps=3),
    "p_sample_loop, guided": lambda d, m: d.p_sample_loop(m, SHAPE, steps=3, **HOOKS),
    "p_sample_loop_intermediates": lambda d, m: d.p_sample_loop_intermediates(m, SHAPE),
    "ddim_sample_loop": lambda d, m: d.ddim_sample_loop(m, SHAPE, steps=3),
    "ddim_sample_loop, guided": lambda d, m: d.ddim_sample_loop(m, SHAPE, steps=3, **HOOKS),
    "vb_terms_bpd": lambda d, m: d.vb_terms_bpd(m, X, X, T),
    "calc_bpd_loop": lambda d, m: d.calc_bpd_loop(m, X),
    "respaced": lambda d, m: d.respaced("5").p_sample(m, X, T.clamp(max=4), noise=X),
    "p_losses": lambda d, m: d.p_losses(m, X, T, noise=X),
    **{
        f"training_losses, {loss}": lambda d, m, loss=loss: d.training_losses(m, X, T, loss=loss, noise=X)
        for loss in ("l1", "l2", "huber", "mse", "rescaled_mse", "kl", "rescaled_kl")
    },
}


def refuses(call: Callable[[], object], message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize(
    ("variance", "channels", "wanted"),
    [
        ("learned_range", 3, 6),
        ("learned", 3, 6),
        ("learned_range", 1, 6),
        ("learned", 5, 6),
        ("learned_range", 12, 6),
        ("fixed_small", 6, 3),
        ("fixed_large", 6, 3),
        ("fixed_small", 1, 3),
    ],
)
def test_channels_that_do_not_fit_the_variance(
    method: str, variance: str, channels: int, wanted: int, backend: str
) -> None:
    diffusion = sf.GaussianDiffusion(SCHEDULE, variance=variance, backend=backend)
    message = f"the model returned shape [2, {channels}, 5, 7], and variance {variance!r} needs [2, {wanted}, 5, 7]"
    refuses(lambda: METHODS[method](diffusion, lambda x, t: torch.zeros(2, channels, 5, 7)), message)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
def test_channels_that_fit(method: str, variance: str) -> None:
    """The control: a model with parameters, of the right channels, passes everywhere."""
    diffusion = sf.GaussianDiffusion(SCHEDULE, variance=variance)
    METHODS[method](diffusion, ConvolutionalModel(learned="learned" in variance))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(2, 3, 5, 6), f"the model returned shape [2, 3, 5, 6], {NEEDED}"),
        (torch.zeros(1, 3, 5, 7), f"the model returned shape [1, 3, 5, 7], {NEEDED}"),
        (torch.zeros(()), f"the model returned shape [], {NEEDED}"),
        (None, "the model must return a tensor, got NoneType"),
        ((torch.zeros(SHAPE),), "the model must return a tensor, got tuple"),
        (
            torch.zeros(SHAPE, dtype=torch.int64),
            "the model's output must be float16 or bfloat16 or float32 or float64, got int64",
        ),
        (torch.zeros(SHAPE, device="meta"), "the model's output must be on cpu, got meta"),
    ],
    ids=str,
)  # fmt: skip
def test_other_outputs(method: str, out: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message) + "$"):
        METHODS[method](sf.GaussianDiffusion(SCHEDULE), lambda x, t: out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_every_float_dtype_is_taken(dtype: torch.dtype, backend: str) -> None:
    """On both backends alike: float64 is rounded to float32."""
    diffusion = sf.GaussianDiffusion(SCHEDULE, backend=backend)
    out = torch.randn(SHAPE).to(dtype)
    found = diffusion.p_sample(lambda x, t: out, X, T, noise=X)["sample"]
    assert torch.equal(found, diffusion.p_sample(lambda x, t: out.float(), X, T, noise=X)["sample"])


def test_an_object_with_a_sample_is_taken_as_the_engine_takes_it() -> None:
    diffusion, out = sf.GaussianDiffusion(SCHEDULE), torch.randn(SHAPE)
    wrapped = diffusion.ddim_sample(lambda x, t: SimpleNamespace(sample=out), X, T)["sample"]
    assert torch.equal(wrapped, diffusion.ddim_sample(lambda x, t: out, X, T)["sample"])


def test_a_learned_variance_needs_channels() -> None:
    message = "x must have channels, [B, C, ...], with variance 'learned', got [4]"
    diffusion = sf.GaussianDiffusion(SCHEDULE, variance="learned")
    x, t = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    refuses(lambda: diffusion.p_mean_variance(lambda x, t: x, x, t), message)
    sf.GaussianDiffusion(SCHEDULE).p_mean_variance(lambda x, t: x, x, t)


@pytest.mark.parametrize("out", [None, 3.0, torch.zeros(2, 3, 5, 1)], ids=str)
def test_hooks_must_return_tensors_like_x(out: Any) -> None:
    given = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    diffusion = sf.GaussianDiffusion(SCHEDULE)
    for hook in ("cond_fn", "denoised_fn"):
        message = f"{hook} must return shape [2, 3, 5, 7], got {given}"
        for step in ("p_sample", "ddim_sample"):
            refuses(
                lambda step=step, hook=hook: getattr(diffusion, step)(  # type: ignore[misc]
                    lambda x, t: x, X, T, noise=X, **{hook: lambda *_: out}
                ),
                message,
            )
