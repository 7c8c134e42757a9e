"""GaussianDiffusion as an object: copied and changed after use, respaced, and under settings of the caller."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.kernels.tolerance import tolerance
from stepfusion_testing.ambient import AMBIENT
from stepfusion_testing.diffusion_models import ConvolutionalModel, ElementwiseModel

SHAPE = (2, 3, 5, 4)
TOTAL = 40
SCHEDULE = sf.NoiseSchedule.linear(TOTAL)
X, Z, T = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([30, 0])
LANES = {"seeds": torch.tensor([1, 2]), "indices": torch.tensor([3, 4])}
MODEL = ElementwiseModel(TOTAL).requires_grad_(False)
Results = dict[str, torch.Tensor]


def pull(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 - torch.tanh(x)


def everything(d: sf.GaussianDiffusion, model: Any = MODEL) -> Results:
    """What every method returns."""
    return without_loops(d, model) | {
        **{f"bpd {name}": value for name, value in d.respaced("4").calc_bpd_loop(model, X).items()},
        "p_sample_loop": d.p_sample_loop(model, SHAPE, steps=4, seed=3),
        "p_sample_loop guided": d.p_sample_loop(model, SHAPE, steps=4, seed=3, cond_fn=pull, repeat_noise=True),
        "ddim_sample_loop": d.ddim_sample_loop(model, SHAPE, timesteps="ddim5", seed=3, eta=0.5),
        "intermediates": torch.cat(d.p_sample_loop_intermediates(model, SHAPE, log_every_t=50)[1]),
    }


def without_loops(d: sf.GaussianDiffusion, model: Any = MODEL) -> Results:
    """What every method but the loops returns, which take minutes in Triton's interpreter."""
    found = {
        "q_mean_variance": d.q_mean_variance(X, T),
        "q_posterior": d.q_posterior_mean_variance(X, Z, T),
        "p_mean_variance": tuple(d.p_mean_variance(model, X, T).values()),
        "p_sample": tuple(d.p_sample(model, X, T, **LANES).values()),
        "p_sample guided": tuple(d.p_sample(model, X, T, **LANES, cond_fn=pull, denoised_fn=torch.sin).values()),
        "ddim_sample": tuple(d.ddim_sample(model, X, T, eta=0.4, **LANES).values()),
        "ddim_sample guided": tuple(d.ddim_sample(model, X, T, cond_fn=pull).values()),
        "ddim_reverse_sample": tuple(d.ddim_reverse_sample(model, X, T).values()),
        "vb_terms_bpd": tuple(d.vb_terms_bpd(model, X, Z, T).values()),
    }
    results = {f"{name} {i}": value for name, values in found.items() for i, value in enumerate(values)}
    results |= {loss: d.training_losses(model, X, T, loss=loss, **LANES) for loss in ("l1", "huber", "mse", "kl")}
    return results | {
        "q_sample": d.q_sample(X, T, **LANES),
        "predict_eps_from_x0": d.predict_eps_from_x0(X, T, Z),
        "predict_start_from_noise": d.predict_start_from_noise(X, T, Z),
        "predict_start_from_v": d.predict_start_from_v(X, T, Z),
        "prior_bpd": d.prior_bpd(X),
        "p_losses": d.p_losses(model, X, T, **LANES)["loss"],
        "snr": d.training_losses(model, X, T, min_snr_gamma=5.0, **LANES),
    }


def differing(one: Results, other: Results) -> list[str]:
    """The names of results that have other bits, dtypes or devices."""

    def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    return [name for name in one if not alike(one[name], other[name])]


class TestCopies:
    @pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
    @pytest.mark.parametrize("respaced", [False, True])
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, copy.copy, lambda d: pickle.loads(pickle.dumps(d))],
        ids=["deep", "copy", "pickle"],
    )
    def test_after_use(
        self, duplicate: Callable[[sf.GaussianDiffusion], sf.GaussianDiffusion], respaced: bool, backend: str
    ) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE, variance="fixed_large", clip=0.7, backend=backend)
        t = torch.tensor([5, 0])
        if respaced:
            diffusion = diffusion.respaced("10")
        before = diffusion.p_sample(MODEL, X, t, **LANES)["sample"]
        twin = duplicate(diffusion)
        assert torch.equal(twin.p_sample(MODEL, X, t, **LANES)["sample"], before)
        loops = [d.p_sample_loop(MODEL, SHAPE, timesteps=[5, 3, 0], seed=3) for d in (diffusion, twin)]
        assert torch.equal(*loops)
        assert (twin.variance, twin.clip, twin.backend) == ("fixed_large", 0.7, backend)

    def test_in_a_module_that_is_copied(self) -> None:
        """As a moving average of a whole Lightning-style module is."""

        class Trained(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.diffusion, self.network = sf.GaussianDiffusion(SCHEDULE), ConvolutionalModel()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.diffusion.training_losses(self.network, x, T, noise=Z).mean()

        module = Trained().eval()
        loss = module(X)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(X), loss)
        twin(X).backward()
        assert module.network.slope.grad is None

    def test_a_copy_does_not_follow(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        before = everything(diffusion)
        for twin in (copy.copy(diffusion), copy.deepcopy(diffusion)):
            twin.clip, twin.prediction = None, "v_prediction"
            assert differing(everything(twin), before)
            assert not differing(everything(diffusion), before)


class TestAttributes:
    @pytest.mark.parametrize("used", [True, False])
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("clip", None),
            ("clip", 0.25),
            ("prediction", "sample"),
            ("prediction", "v_prediction"),
            ("variance", "fixed_large"),
            ("v_posterior", 0.5),
            ("backend", "reference"),
            pytest.param("backend", "triton", marks=pytest.mark.interpreter),
        ],
    )
    def test_every_method_follows(self, name: str, value: Any, used: bool) -> None:
        """Set after a step, an attribute is what it would be if it had been given at the start."""
        results = without_loops if value == "triton" else everything
        changed = sf.GaussianDiffusion(SCHEDULE)
        before = results(changed) if used else {}
        setattr(changed, name, value)
        expected = results(sf.GaussianDiffusion(SCHEDULE, **{name: value}))
        assert differing(results(changed), expected) == []
        if used and name != "backend":
            assert differing(before, expected)

    def test_it_may_be_set_back(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        before = everything(diffusion)
        for clip in (None, 0.5, 1.0):
            diffusion.clip = clip
            changed = everything(diffusion)
        assert not differing(before, changed)

    def test_a_learned_variance_is_followed_too(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        everything(diffusion)
        diffusion.variance = "learned_range"
        model = ElementwiseModel(TOTAL, learned=True).requires_grad_(False)
        expected = everything(sf.GaussianDiffusion(SCHEDULE, variance="learned_range"), model)
        assert not differing(everything(diffusion, model), expected)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("clip", -1.0, "clip must be a finite number in (0, inf], got -1.0"),
            ("clip", "1", "clip must be a number, got '1'"),
            ("prediction", "eps", "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'eps'"),
            (
                "variance",
                "small",
                "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'small'",
            ),
            ("v_posterior", 2.0, "v_posterior must be a finite number in [0, 1], got 2.0"),
            ("schedule", SCHEDULE, "schedule cannot be changed: make another GaussianDiffusion"),
        ],
    )
    def test_refused(self, name: str, value: Any, message: str) -> None:
        """With one sentence, and the object as it was."""
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        kept = getattr(diffusion, name)
        with pytest.raises((TypeError, ValueError, AttributeError), match="^" + re.escape(message) + "$"):
            setattr(diffusion, name, value)
        assert getattr(diffusion, name) is kept

    def test_what_belongs_together(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE, v_posterior=0.5)
        message = "^v_posterior must be 0 with variance 'learned', got 0.5$"
        with pytest.raises(ValueError, match=message):
            diffusion.variance = "learned"
        diffusion.v_posterior = 0.0
        diffusion.variance = "learned"
        with pytest.raises(ValueError, match=message):
            diffusion.v_posterior = 0.5
        assert (diffusion.variance, diffusion.v_posterior) == ("learned", 0.0)

    def test_an_unknown_backend_is_refused(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        with pytest.raises(ValueError, match=r"^backend must be one of .*, got 'cuda'$"):
            diffusion.backend = "cuda"
        assert diffusion.backend == "auto"


HOOKS: dict[str, dict[str, Any]] = {
    "no hooks": {},
    "guided": {"cond_fn": pull},
    "denoised": {"denoised_fn": torch.sin, "repeat_noise": True},
}
SPACINGS: tuple[Any, ...] = ("10", "ddim5", "3,2", [36, 19, 7])
SEEDS = (7, 2**64 - 1)
# In Triton's interpreter: every hook, with each seed; every kind of spacing but a long one, with each seed.
INTERPRETED = (
    *(("no hooks", "3,2", SEEDS[1]), ("no hooks", SPACINGS[3], SEEDS[0]), ("guided", "3,2", SEEDS[0])),
    *(("guided", SPACINGS[3], SEEDS[1]), ("denoised", "ddim5", SEEDS[0]), ("denoised", "ddim5", SEEDS[1])),
)


def loops() -> Iterator[Any]:
    """Hooks, timesteps, seed and backend of every loop, of which some are a matter of minutes in the interpreter."""
    for hooks, timesteps, seed in itertools.product(HOOKS, SPACINGS, SEEDS):
        yield hooks, timesteps, seed, "reference"
        quick = (hooks, timesteps, seed) in INTERPRETED
        marks = [pytest.mark.interpreter, *([] if quick else [pytest.mark.soak])]
        yield pytest.param(hooks, timesteps, seed, "triton", marks=marks)


class TestRespacedNoise:
    """Noise is keyed by the training timestep, whatever t of a respaced process stands for it."""

    @pytest.mark.parametrize(("hooks", "timesteps", "seed", "backend"), list(loops()))
    def test_loops(self, hooks: str, timesteps: Any, seed: int, backend: str) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE, backend=backend)
        expected = diffusion.p_sample_loop(MODEL, SHAPE, timesteps=timesteps, seed=seed, **HOOKS[hooks])
        found = diffusion.respaced(timesteps).p_sample_loop(MODEL, SHAPE, seed=seed, **HOOKS[hooks])
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(torch.float32, 4.0, 64))

    def test_ddim_loops_and_nested_processes(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        expected = diffusion.ddim_sample_loop(MODEL, SHAPE, timesteps=[38, 25, 6], eta=1.0, seed=5)
        nested = diffusion.respaced([38, 30, 25, 9, 6]).respaced([4, 2, 0])
        for found in (
            nested.ddim_sample_loop(MODEL, SHAPE, eta=1.0, seed=5),
            diffusion.respaced([38, 30, 25, 9, 6]).ddim_sample_loop(
                MODEL, SHAPE, timesteps=[4, 2, 0], eta=1.0, seed=5
            ),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(torch.float32, 4.0, 64))

    @pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
    def test_single_steps_draw_what_loops_draw(self, backend: str) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE, backend=backend)
        timesteps, start = [36, 19, 7], torch.randn(SHAPE)
        expected = diffusion.p_sample_loop(MODEL, SHAPE, timesteps=timesteps, seed=7, start=start)
        spaced = diffusion.respaced(timesteps)
        state = start
        lanes = {"seeds": torch.tensor([7, 7]), "indices": torch.tensor([0, 1])}
        for t in (2, 1, 0):
            state = spaced.p_sample(MODEL, state, torch.full((2,), t), **lanes)["sample"]
        torch.testing.assert_close(state, expected, rtol=0, atol=tolerance(torch.float32, 4.0, 64))

    @pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
    def test_the_forward_process(self, backend: str) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE, backend=backend)
        spaced, t = diffusion.respaced([36, 19, 7]), torch.tensor([2, 0])
        expected = diffusion.q_sample(X, torch.tensor([36, 7]), **LANES)
        torch.testing.assert_close(
            spaced.q_sample(X, t, **LANES), expected, rtol=0, atol=tolerance(torch.float32, 4.0, 8)
        )
        losses = spaced.training_losses(MODEL, X, t, **LANES)
        whole = diffusion.training_losses(MODEL, X, torch.tensor([36, 7]), **LANES)
        torch.testing.assert_close(losses, whole, rtol=1e-5, atol=0)

    def test_noise_depends_on_the_timestep_alone(self) -> None:
        """The control: processes that reach one timestep by other ways draw the same, at another one they do not."""
        diffusion = sf.GaussianDiffusion(SCHEDULE, prediction="sample", clip=None)
        zero = torch.zeros(SHAPE)

        def drawn(timesteps: list[int], t: int) -> torch.Tensor:
            """The z of a step, up to its scale, from states and models of 0."""
            step = diffusion.respaced(timesteps).p_sample(lambda x, t: zero, zero, torch.full((2,), t), **LANES)
            return step["sample"] / step["sample"].std()

        first, same, other = drawn([36, 19, 7], 1), drawn([30, 25, 19, 12, 0], 2), drawn([36, 20, 7], 1)
        torch.testing.assert_close(first, same, rtol=1e-5, atol=1e-6)
        assert float((first - other).abs().max()) > 0.1


# In Triton's interpreter: one of the default dtypes, of the devices, of the autocasts and of the modes of autograd.
INTERPRETED_SETTINGS = ("float64 by default", "another device by default", "autocast to float16", "inference mode")


def settings() -> Iterator[Any]:
    """Every ambient setting and backend."""
    for setting in AMBIENT:
        yield setting, "reference"
        marks = [pytest.mark.interpreter, *([] if setting in INTERPRETED_SETTINGS else [pytest.mark.soak])]
        yield pytest.param(setting, "triton", marks=marks)


@functools.cache
def of_one_just_made(backend: str) -> Results:
    """What one that no setting ever touched returns; no loops in Triton's interpreter."""
    return (everything if backend == "reference" else without_loops)(sf.GaussianDiffusion(SCHEDULE, backend=backend))


class TestAmbientState:
    @pytest.mark.parametrize(("setting", "backend"), list(settings()))
    def test_results_depend_on_arguments_alone(self, setting: str, backend: str) -> None:
        """First used under a setting or not, every bit, dtype and device is the same."""
        results = everything if backend == "reference" else without_loops
        expected = of_one_just_made(backend)
        diffusion = sf.GaussianDiffusion(SCHEDULE, backend=backend)
        with AMBIENT[setting]():
            assert differing(results(diffusion), expected) == []
            made_there = results(sf.GaussianDiffusion(sf.NoiseSchedule.linear(TOTAL), backend=backend))
        assert differing(made_there, expected) == []
        assert differing(results(diffusion), expected) == []

    @pytest.mark.parametrize("setting", AMBIENT)
    def test_gradients_after_it(self, setting: str) -> None:
        """What was made for a preview in inference mode does not spoil the training that follows."""
        diffusion, model = sf.GaussianDiffusion(SCHEDULE), ConvolutionalModel().eval()
        with AMBIENT[setting]():
            everything(diffusion)
        fresh = sf.GaussianDiffusion(SCHEDULE)
        for loss in ("l2", "kl"):
            gradients = []
            for d in (diffusion, fresh):
                losses = d.training_losses(model, X, T, loss=loss, noise=Z)
                gradients.append(torch.autograd.grad(losses.sum(), model.slope)[0])
            assert torch.equal(*gradients)
        sample = diffusion.p_sample(model, X, T, noise=Z)["sample"]
        assert torch.autograd.grad(sample.sum(), model.slope)[0].isfinite()

    def test_autocast_reaches_the_model_and_nothing_else(self) -> None:
        """Who trains under autocast wants the model in bfloat16: what the model returns is all that changes."""
        diffusion, model = sf.GaussianDiffusion(SCHEDULE), ConvolutionalModel().eval()
        seen: list[torch.dtype] = []
        model.convolution.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            under = diffusion.p_sample(model, X, T, noise=Z)["sample"]
            out = model(X, T)
        assert seen == [torch.bfloat16] * 2
        assert under.dtype == torch.float32
        assert torch.equal(under, diffusion.p_sample(lambda x, t: out, X, T, noise=Z)["sample"])

    def test_a_first_use_inside_a_compiled_function(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        compiled = torch.compile(lambda x: diffusion.ddim_sample(MODEL, x, T)["sample"], backend="eager")
        expected = sf.GaussianDiffusion(SCHEDULE).ddim_sample(MODEL, X, T)["sample"]
        assert torch.equal(compiled(X), expected)
        assert torch.equal(diffusion.ddim_sample(MODEL, X, T)["sample"], expected)
