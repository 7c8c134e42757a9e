"""Rollouts and their replays: equal bits, the densities of the literature, gradients, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion_testing.condition_networks import Mixed
from stepfusion_testing.networks import tiny_unet
from stepfusion_testing.path_networks import SHAPE, PathNetwork
from stepfusion_testing.recorded_graph import Captures

SCHEDULE = sf.NoiseSchedule.linear(1000)


class Policy(nn.Module):
    """Predicts epsilon from every pixel's neighbours and the timestep; with ``learned``, v as well."""

    in_channels, sample_size = 2, 6

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4 if learned else 2, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        time = self.time(timesteps.to(x.dtype)[:, None] / 1000)[:, :, None, None]
        return self.last(torch.tanh(self.first(x) + time))


def engine_of(model: Any, path: Any = SCHEDULE, **given: Any) -> sf.Engine:
    return sf.Engine(model, path, **{"device": "cpu", "dtype": "float32", "network": "eager", **given})


def assert_replayed(engine: sf.Engine, network: Any, rollout: sf.Rollout) -> None:
    """Every step has the log-probability that it had, to the bit, with a gradient and without."""
    for step in range(len(rollout.rows)):
        logprob = engine.step_logprob(network, rollout, step)
        assert logprob.requires_grad
        assert torch.equal(logprob.detach(), rollout.logprobs[step]), f"step {step}"
        assert rollout.logprobs[step].isfinite().all()
    with torch.no_grad():
        assert torch.equal(engine.step_logprob(network, rollout, 0), rollout.logprobs[0])


# Replays


@pytest.mark.parametrize(("backend", "invariant"), [("reference", False), ("cpu", True), ("triton", False)])
def test_a_replay_of_a_guided_unet_has_the_bits_of_its_rollout(
    backend: str, invariant: bool, request: pytest.FixtureRequest
) -> None:
    """So the first ratio of a policy-gradient update is exactly 1."""
    if backend == "triton":
        request.getfixturevalue("kernel_device")
    network = tiny_unet()
    engine = engine_of(network, null_label=3, batch=4, invariant=invariant, backend=backend)
    rollout = engine.rollout(3, steps=3, eta=1.0, seed=4, labels=[0, 1, 2], guidance=[1.0, 3.0, 2.0], network=network)
    assert rollout.rows == (0, 1)
    assert_replayed(engine, network, rollout)


@pytest.mark.parametrize(
    "table",
    [
        sf.ddpm(SCHEDULE, 4, prediction="epsilon"),
        sf.ddpm(SCHEDULE, 4, prediction="epsilon", clip=None),
        sf.ddim(SCHEDULE, 4, eta=0.5),
        sf.euler_ancestral(SCHEDULE, 4),
        sf.ddpm(SCHEDULE, 3, prediction="epsilon", threshold=0.9),
    ],
    ids=lambda table: table.name,
)
def test_stochastic_samplers_are_replayed(table: sf.StepTable) -> None:
    network = Policy()
    engine = engine_of(network)
    rollout = engine.rollout(4, table, seed=1, network=network)
    assert len(rollout.rows) == len(table) - 1
    assert torch.equal(rollout.images, engine.sample(4, table, seed=1))
    assert_replayed(engine, network, rollout)


def test_learned_variance_is_replayed_with_its_gradient() -> None:
    network = Policy(learned=True)
    engine = engine_of(network)
    table = sf.ddpm(SCHEDULE, 4, prediction="epsilon", variance="learned_range")
    rollout = engine.rollout(4, table, network=network)
    assert_replayed(engine, network, rollout)
    engine.step_logprob(network, rollout, 1).sum().backward()
    assert network.last.weight.grad is not None
    assert (network.last.weight.grad[2:] != 0).all()  # of v


@pytest.mark.parametrize(
    ("path", "make"),
    [
        (sf.SigmaPath(), lambda path: sf.euler(path, 4, prediction="edm", s_churn=2.0)),
        (sf.FlowPath(), lambda path: sf.flow_sde(path, 4, prediction="flow")),
    ],
    ids=["churn", "flow"],
)
def test_other_paths_are_replayed(path: Any, make: Any) -> None:
    """The network is shown a multiple of x there, and told a float."""
    network = PathNetwork().eval()
    engine = engine_of(network, path, shape=SHAPE)
    rollout = engine.rollout(4, make(path), network=network)
    assert len(rollout.rows) >= 2
    assert_replayed(engine, network, rollout)


@pytest.mark.parametrize("guidance", [None, 2.5])
def test_conditions_are_replayed_with_their_gradient(guidance: float | None) -> None:
    """What is prepared of them, and what the time path makes of rows, are parts of the policy."""
    network = Mixed()
    engine = engine_of(network, num_classes=4, null_label=3)
    conditions = {"text": torch.randn(4, 5, 6), "sizes": torch.tensor([3, 5])}
    null = {"null_conditions": {"text": torch.zeros(5, 6)}} if guidance is not None else {}
    given: Any = {"labels": [0, 1, 2, 0], "conditions": conditions, "guidance": guidance, **null}
    table = engine.table("ddim", 3, eta=1.0, clip=None)
    rollout = engine.rollout(4, table, network=network, **given)
    assert_replayed(engine, network, rollout)
    engine.step_logprob(network, rollout, 0).sum().backward()
    assert all(parameter.grad is not None and (parameter.grad != 0).any() for parameter in network.parameters())


def test_steps_and_images_may_be_mixed() -> None:
    """A minibatch of a trainer: other images, in another order, each at a step of its own; more than a batch."""
    network = Policy()
    engine = engine_of(network, batch=2, invariant=True)
    rollout = engine.rollout(5, steps=4, eta=1.0, network=network)
    images, steps = [3, 0, 4, 1], torch.tensor([2, 0, 1, 2])
    found = engine.step_logprob(network, rollout[images], steps)
    assert torch.equal(found.detach(), rollout.logprobs[steps, images])
    alone = engine.step_logprob(network, rollout[3:4], 2)
    assert torch.equal(alone.detach(), rollout.logprobs[2, 3:4])


def test_rows_of_long_tables_are_replayed() -> None:
    """Features are made 64 rows at a time; a replay makes those that it needs."""
    network = tiny_unet(classes=None)
    engine = engine_of(network)
    table = engine.table("ddpm", 75)
    rollout = engine.rollout(2, table, rows=[3, 60, 70], network=network)
    assert rollout.states.shape[0] == 6
    steps = [[0, 2], [1, 1], [2, 0]]
    for one in steps:
        logprob = engine.step_logprob(network, rollout, one).detach()
        assert torch.equal(logprob, rollout.logprobs[one, [0, 1]])


def test_an_engines_own_form_is_kept_to_rounding() -> None:
    """Without a network the engine's own walks: its images, and log-probabilities that a replay meets to rounding."""
    network = tiny_unet(classes=None)
    engine = sf.Engine(network, SCHEDULE, device="cpu")
    rollout = engine.rollout(3, steps=4, eta=1.0, seed=2)
    assert torch.equal(rollout.images, engine.sample(3, steps=4, eta=1.0, seed=2))
    for step in range(3):
        logprob = engine.step_logprob(network, rollout, step)
        torch.testing.assert_close(logprob.detach(), rollout.logprobs[step], rtol=1e-4, atol=1e-3)


def test_in_captured_ticks(captures: Captures) -> None:
    """A captured tick reads and writes the buffers of its runner, log-probabilities too."""
    engine = engine_of(Policy(), backend="triton", network="graph")
    plain = engine_of(Policy(), backend="reference")
    for seed in (1, 2):
        rollout, want = (one.rollout(1, steps=2, eta=1.0, seed=seed) for one in (engine, plain))
        assert torch.equal(rollout.logprobs, want.logprobs)
        assert torch.equal(rollout.states, want.states)
    assert len(captures.graphs) == 1


def test_the_callers_settings_do_not_matter() -> None:
    """In inference mode, under autocast, with another default dtype; and there may be no images at all."""
    network = Policy()
    engine = engine_of(network)
    want = engine.rollout(2, steps=3, eta=1.0, network=network)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            rollout = engine.rollout(2, steps=3, eta=1.0, network=network)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rollout.logprobs, want.logprobs)
    with torch.autocast("cpu"):
        assert_replayed(engine, network, rollout)
    nothing = rollout[[]]
    assert (len(nothing), engine.step_logprob(network, nothing, 0).tolist()) == (0, [])
    assert len(engine.rollout(0, steps=3, eta=1.0, network=network)) == 0


def test_other_weights_have_other_probabilities() -> None:
    """Also after the features of a row were computed once: nothing of old weights is kept."""
    network = tiny_unet(classes=None)
    engine = engine_of(network)
    before = engine.rollout(2, steps=3, eta=1.0, network=network)
    with torch.no_grad():
        network.time_embedding.linear_1.weight.mul_(1.5)
    assert not torch.equal(engine.step_logprob(network, before, 1).detach(), before.logprobs[1])
    after = engine.rollout(2, steps=3, eta=1.0, network=network)
    assert not torch.equal(after.images, before.images)
    assert_replayed(engine, network, after)


# The literature


def ddim_logprob(
    x: torch.Tensor, x_next: torch.Tensor, eps: torch.Tensor, abar: float, abar_prev: float, eta: float
) -> torch.Tensor:
    """Of a DDIM step (Song et al. 2021, equations 12 and 16) in nats a pixel, as DDPO has it (Black et al. 2023)."""
    variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    std = eta * math.sqrt(variance)
    x0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clamp(-1, 1)
    eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    mean = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev - std**2) * eps
    density = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.flatten(1).mean(1)


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_log_probabilities_are_ddpos(eta: float) -> None:
    network, exact = Policy(), Policy().double()
    engine = engine_of(network)
    table = engine.table("ddim", 10, eta=eta)
    rollout = engine.rollout(3, table, network=network)
    levels = [*SCHEDULE.alphas_cumprod[table.timesteps], 1.0]
    for step, row in enumerate(rollout.rows):
        x, x_next = rollout.state(step).double(), rollout.next_state(step).double()
        with torch.no_grad():
            eps = exact(x, torch.full((3,), int(table.timesteps[row])))
        want = ddim_logprob(x, x_next, eps, float(levels[row]), float(levels[row + 1]), eta)
        torch.testing.assert_close(rollout.logprobs[step] / x[0].numel(), want, rtol=1e-4, atol=1e-4)


def test_means_and_deviations_are_diffusers() -> None:
    """Its DDIMScheduler's step without noise is the mean of the density, and its variance is the density's."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DDIMScheduler(1000, 0.0001, 0.02, "linear", clip_sample=True)
    scheduler.set_timesteps(10)
    network, exact = Policy(), Policy().double()
    table = sf.ddim(SCHEDULE, 10, eta=1.0, compat="diffusers")
    rollout = engine_of(network).rollout(3, table, network=network)
    assert len(rollout.rows) == 9
    for step, row in enumerate(rollout.rows):
        t = int(table.timesteps[row])
        x = rollout.state(step).double()
        with torch.no_grad():
            eps = exact(x, torch.full((3,), t))
        mean = scheduler.step(eps, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        std = float(scheduler._get_variance(t, t - 100)) ** 0.5
        want = torch.distributions.Normal(mean, std).log_prob(rollout.next_state(step).double()).flatten(1).sum(1)
        torch.testing.assert_close(rollout.logprobs[step], want, rtol=1e-4, atol=1e-2)


def test_the_gradient_is_that_of_the_density() -> None:
    """By autograd through the formula of the literature, in float64, with respect to every parameter."""
    network, exact = Policy(), Policy().double()
    engine = engine_of(network)
    table = engine.table("ddim", 10, eta=1.0)
    rollout = engine.rollout(3, table, network=network)
    step, row = 4, rollout.rows[4]
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    (engine.step_logprob(network, rollout, step) * weights).sum().backward()
    levels = [*SCHEDULE.alphas_cumprod[table.timesteps], 1.0]
    x, x_next = rollout.state(step).double(), rollout.next_state(step).double()
    eps = exact(x, torch.full((3,), int(table.timesteps[row])))
    want = ddim_logprob(x, x_next, eps, float(levels[row]), float(levels[row + 1]), 1.0) * x[0].numel()
    (want * weights).sum().backward()
    for mine, theirs in zip(network.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=1e-4 * scale)


# What a rollout holds


def test_states_are_those_of_the_stream_and_noises_make_the_images_again() -> None:
    network = Policy()
    engine = engine_of(network, batch=2)
    table = engine.table("ddpm", 5)
    rollout = engine.rollout(3, table, seed=2**64 - 5, indices=[7, 2**32 - 1, 0], network=network)
    assert rollout.states.shape == (5, 3, 2, 6, 6)
    for event in engine.stream(3, table, seed=2**64 - 5, indices=[7, 2**32 - 1, 0]):
        images = list(event.images)
        if event.step < len(rollout.rows):
            assert torch.equal(rollout.next_state(event.step)[images], event.x)
        else:
            assert torch.equal(rollout.images[images], event.x)
    noise = torch.cat((rollout.noises, torch.zeros(1, 3, 2, 6, 6)))
    again = engine.rollout(3, table, start=rollout.state(0), noise=noise, network=network)
    assert torch.equal(again.images, rollout.images)
    assert torch.equal(again.logprobs, rollout.logprobs)
    assert torch.equal(again.noises, rollout.noises)


def test_chosen_rows_keep_their_states_alone() -> None:
    network = Policy()
    engine = engine_of(network)
    every = engine.rollout(2, steps=8, eta=1.0, network=network)
    some = engine.rollout(2, steps=8, eta=1.0, rows=[5, 1, 2], network=network)
    assert some.rows == (1, 2, 5)
    assert len(some.states) == 5
    assert torch.equal(some.logprobs, every.logprobs[[1, 2, 5]])
    for step, row in enumerate(some.rows):
        assert torch.equal(some.state(step), every.state(row))
        assert torch.equal(some.next_state(step), every.next_state(row))
    assert_replayed(engine, network, some)


def test_a_rollout_is_saved_and_read(tmp_path: Path) -> None:
    network = Mixed()
    engine = engine_of(network, num_classes=4, null_label=3)
    conditions = {"text": torch.randn(2, 5, 6), "sizes": torch.tensor([3, 5])}
    null = {"text": torch.zeros(5, 6)}
    rollout = engine.rollout(
        2, steps=3, eta=1.0, labels=1, conditions=conditions, null_conditions=null, guidance=2.0, network=network
    )
    rollout[1:].to("cpu").save(tmp_path / "one.safetensors")
    found = sf.Rollout.load(tmp_path / "one.safetensors", rollout.table)
    assert (len(found), found.rows, repr(found)) == (1, rollout.rows, repr(rollout[1:]))
    assert torch.equal(found.noises, rollout.noises[:, 1:])
    assert set(found.conditions) == {"text", "sizes"}
    logprob = engine.step_logprob(network, found, 1)
    assert torch.equal(logprob, engine.step_logprob(network, rollout[1:], 1))
    with pytest.raises(ValueError, match="walked another table"):
        sf.Rollout.load(tmp_path / "one.safetensors", engine.table("ddim", 4, eta=1.0))
    with pytest.raises(ValueError, match=r"must be a file that ends in \.safetensors"):
        rollout.save(tmp_path / "one.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: tensors.pop("states"), "it has no states"),
        (lambda tensors, metadata: tensors.update(states=tensors["states"][:-1]), "states must be"),
        (lambda tensors, metadata: tensors.update(logprobs=tensors["logprobs"].float()), "logprobs must be"),
        (lambda tensors, metadata: tensors.update(labels=tensors["labels"][:1]), "labels must be"),
        (lambda tensors, metadata: tensors.update(more=tensors["labels"]), "has no 'more'"),
        (lambda tensors, metadata: metadata.update(rows="0,9"), "its rows must rise"),
        (lambda tensors, metadata: metadata.update(rows="1,0"), "its rows must rise"),
        (lambda tensors, metadata: metadata.update(format="another"), "is no rollout"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    network = Policy()
    rollout = engine_of(network).rollout(2, steps=3, eta=1.0, network=network)
    file = tmp_path / "a.safetensors"
    rollout.save(file)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata)
    with pytest.raises(sf.CheckpointError, match=message):
        sf.Rollout.load(file, rollout.table)


# What is refused


HEUN = sf.heun(sf.SigmaPath(), steps=4, prediction="edm", s_churn=2.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"steps": 4, "eta": 0.0},
            "adds no noise, so that its steps have no probability: use ddpm, ddim with eta > 0",
        ),
        ({"steps": 4, "eta": 1.0, "rows": [3]}, "row 3 of .* adds no noise, so that its step has no probability"),
        ({"steps": 4, "eta": 1.0, "rows": [4]}, r"rows must be in \[0, 3\], got 4"),
        ({"steps": 4, "eta": 1.0, "rows": []}, "rows must have at least one row"),
        ({"table": sf.dpmpp_2m_sde(SCHEDULE, 4)}, "row 1 of .* takes a part of its mean from what earlier rows left"),
        ({"table": [sf.ddpm(SCHEDULE, 4), sf.ddpm(SCHEDULE, 5)]}, "a rollout needs one table for all images"),
        ({"steps": 4, "eta": 1.0, "image": torch.zeros(1, 2, 6, 6), "mask": torch.ones(1, 1, 6, 6)}, "have a mask"),
        ({"table": sf.ddpm(SCHEDULE, 4).reusing(2)}, "reuse"),
        ({"steps": 4, "eta": 1.0, "keep_on": "nowhere"}, "keep_on: device must be"),
    ],
)
def test_what_has_no_probability_is_refused(given: dict[str, Any], message: str) -> None:
    network = Policy()
    with pytest.raises(ValueError, match=message):
        engine_of(network).rollout(network=network, **given)


def test_the_rows_of_two_evaluations_are_refused() -> None:
    network = PathNetwork().eval()
    with pytest.raises(ValueError, match="takes a part of its mean from what earlier rows left"):
        engine_of(network, sf.SigmaPath(), shape=SHAPE).rollout(1, HEUN, network=network)


def test_bad_arguments_of_replays_are_named() -> None:
    network = Policy()
    engine = engine_of(network)
    rollout = engine.rollout(2, steps=3, eta=1.0, network=network)
    for step, error, message in (
        (2, ValueError, r"step must be in \[0, 1\]"),
        (-1, ValueError, r"step must be in \[0, 1\]"),
        ([0, 1, 1], ValueError, "one for each of the 2 images"),
        (0.5, TypeError, "step must be an integer"),
    ):
        with pytest.raises(error, match=message):
            engine.step_logprob(network, rollout, step)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rollout must be a Rollout, got int"):
        engine.step_logprob(network, 3, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="network must be callable, got int"):
        engine.step_logprob(3, rollout, 0)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"network must have parameters of float32, bfloat16, float16, got torch\.float64"
    ):
        engine.step_logprob(Policy().double(), rollout, 0)
    with pytest.raises(ValueError, match="network must be on cpu, where this engine is"):
        engine.rollout(2, steps=3, eta=1.0, network=Policy().to("meta"))
    with pytest.raises(TypeError, match=r"use \[1:2\]"):
        rollout[1]  # type: ignore[index]
    with pytest.raises(ValueError, match="table is for"):
        engine_of(network, sf.NoiseSchedule.cosine(1000)).step_logprob(network, rollout, 0)
    with pytest.raises(ValueError, match=r"rollout is of images \[2, 6, 6\], and the model's are \[2, 5, 6\]"):
        engine_of(network, shape=(2, 5, 6)).step_logprob(network, rollout, 0)
    learned = Policy(learned=True)
    table = sf.ddpm(SCHEDULE, 3, prediction="epsilon", variance="learned_range")
    with pytest.raises(ValueError, match="needs a learned variance too"):
        engine_of(network).step_logprob(network, engine_of(learned).rollout(1, table, network=learned), 0)
    conditioned = Mixed()
    given = {"text": torch.zeros(5, 6), "sizes": torch.tensor([3, 5])}
    other = engine_of(conditioned, num_classes=4).rollout(1, steps=3, eta=1.0, labels=0, conditions=given)
    with pytest.raises(ValueError, match=r"rollout has the conditions \['sizes', 'text'\], and the model's are \[\]"):
        engine_of(network, shape=(2, 4, 4)).step_logprob(network, other, 0)


# The page


PAGE = Path(__file__).parents[2] / "docs" / "rollouts.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.usefixtures("one_thread")
def test_the_loop_on_the_page_raises_the_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), found)
    assert len(BLOCKS) >= 3
    history = found["history"]
    assert history[-1] > history[0] + 0.2
    assert found["first_ratios"] == [1.0] * len(history)
