"""Ticks that are captured once and replayed: the same images, whatever changes between requests."""

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.lanes.runner import Runner
from stepfusion_testing.networks import labelled, smooth
from stepfusion_testing.recorded_graph import INTERPRETER, Captures
from stepfusion_testing.tiny_model import tiny_network

pytestmark = pytest.mark.interpreter
SHAPE = (2, 4, 4)


@pytest.fixture
def schedule() -> sf.NoiseSchedule:
    return sf.NoiseSchedule.linear()


def both(schedule: sf.NoiseSchedule, network: Any = smooth, **arguments: Any) -> tuple[sf.Engine, sf.Engine]:
    """An engine that captures its ticks, with Triton's step, and an eager one with the reference's, of equal bits."""
    arguments = {"shape": SHAPE, "device": "cpu", "dtype": "float32", **arguments}
    captured = sf.Engine(network, schedule, network="graph", backend="triton", **arguments)
    return captured, sf.Engine(network, schedule, network="eager", backend="reference", **arguments)


def one_at_a_time(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A launch of Triton's interpreter, which has global state."""

    @wraps(kernel)
    def launch(*args: Any, **kwargs: Any) -> torch.Tensor:
        with INTERPRETER:
            return kernel(*args, **kwargs)

    return launch


def idle_runners(engine: sf.Engine) -> list[Runner]:
    return engine.runners.pool.idle


REQUESTS: list[dict[str, Any]] = [
    {"steps": 4},
    {"steps": 3, "eta": 0.7, "seed": 5},
    {"sampler": "ddpm", "steps": 5, "seed": (1 << 64) - 1},
    {"indices": [3, 9, 1]},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_captured_tick_gives_the_same_bits(
    schedule: sf.NoiseSchedule,
    captures: Captures,
    request_: dict[str, Any],
) -> None:
    captured, eager = both(schedule)
    arguments = {"n": None if "indices" in request_ else 3, "steps": 3, **request_}
    assert torch.equal(captured.sample(**arguments), eager.sample(**arguments))
    assert sum(graph.replays for graph in captures.graphs) > 0


def test_nothing_but_the_bucket_captures_again(schedule: sf.NoiseSchedule, captures: Captures) -> None:
    """Samplers, steps, etas, seeds, labels and guidance scales are data."""
    captured, eager = both(schedule, labelled, num_classes=4, null_label=3)
    for sampler, steps in (("ddim", 2), ("ddpm", 3)):
        for eta in (0.0, 1.0) if sampler == "ddim" else (None,):
            for labels, guidance, seed in (([0, 1, 2], 2.0, 0), ([2, 2, 0], [0.5, 1.5, 3.0], 7)):
                table = captured.table(sampler, steps, **({} if eta is None else {"eta": eta}))
                arguments: dict[str, Any] = {"labels": labels, "guidance": guidance, "seed": seed}
                images = captured.sample(3, table, **arguments)
                assert torch.equal(images, eager.sample(3, table, **arguments))
    mixed = [captured.table(steps=2), captured.table("ddpm", 4), captured.table(steps=3, eta=0.3)]
    assert torch.equal(captured.sample(3, mixed, guidance=2.0), eager.sample(3, mixed, guidance=2.0))
    assert len(captures.graphs) == 1
    captured.sample(5, steps=2, guidance=2.0)
    assert len(captures.graphs) == 2, "another bucket"


def test_longer_tables_than_there_is_room_for_capture_again(captures: Captures) -> None:
    """There is room for as many rows as the schedule has timesteps, rounded up to 15."""
    captured, eager = both(sf.NoiseSchedule.linear(12, scaled=False))
    assert captured.sample(2, steps=2).isfinite().all()
    start = torch.zeros(2, *SHAPE)
    tables = [
        captured.table("ddim", timesteps=range(11, -1, -1)),
        captured.table("ddim", timesteps=range(3, -1, -1)),
    ]
    assert torch.equal(captured.sample(2, tables, start=start), eager.sample(2, tables, start=start))
    assert len(captures.graphs) == 2


def test_a_unet_with_its_time_path_hoisted(schedule: sf.NoiseSchedule, captures: Captures) -> None:
    """Its norms run in Triton, too, whose bits are not the reference's."""
    network = tiny_network()
    captured, plain = both(schedule, network, shape=None, null_label=3)
    eager = sf.Engine(network, schedule, device="cpu", backend="triton", network="eager", null_label=3)
    arguments: dict[str, Any] = {"n": 1, "labels": [2], "guidance": 1.5}
    for steps in (1, 2):
        images = captured.sample(steps=steps, **arguments)
        torch.testing.assert_close(images, plain.sample(steps=steps, **arguments), rtol=0, atol=1e-4)
    assert torch.equal(images, eager.sample(steps=steps, **arguments))


def test_intermediates_and_given_noise(schedule: sf.NoiseSchedule, captures: Captures) -> None:
    captured, eager = both(schedule)
    for ours, theirs in zip(captured.stream(3, steps=4, eta=1.0), eager.stream(3, steps=4, eta=1.0), strict=True):
        assert (ours.step, ours.timestep, ours.images) == (theirs.step, theirs.timestep, theirs.images)
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.x0, theirs.x0)
    noise = torch.randn(4, 3, *SHAPE)
    table = captured.table(steps=4, eta=1.0)
    assert torch.equal(captured.sample(3, table, noise=noise), eager.sample(3, table, noise=noise))
    assert [graph.replays for graph in captures.graphs] == [4, 4], "one that keeps x0, one that reads noise"


def test_cancelling_leaves_a_usable_engine(schedule: sf.NoiseSchedule, captures: Captures) -> None:
    captured, eager = both(schedule)
    with pytest.raises(sf.SamplingCancelled):
        captured.sample(4, steps=6, callback=lambda event: event.step < 2)
    for _ in captured.stream(4, steps=6):
        break
    assert bool((idle_runners(captured)[0].rows == sf.kernels.PARKED).all()), "no lane is left behind"
    assert torch.equal(captured.sample(3, steps=3, seed=8), eager.sample(3, steps=3, seed=8))


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # the interpreter is NumPy
def test_a_broken_image_is_named(schedule: sf.NoiseSchedule, captures: Captures) -> None:
    def breaks(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return smooth(x, timesteps) / (labels - 2).view(-1, 1, 1, 1)

    captured, _ = both(schedule, breaks, num_classes=4)
    with pytest.raises(sf.NonFiniteError, match=r"^image 1 \(seed 0, index 1\) became non-finite at step 1 of 3 "):
        captured.sample(3, steps=3, labels=[0, 2, 1])
    assert captured.sample(3, steps=3, labels=[0, 3, 1]).isfinite().all()


def test_a_network_that_waits_for_the_device_runs_eagerly_and_says_why(
    schedule: sf.NoiseSchedule,
    captures: Captures,
) -> None:
    def waits(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return smooth(x, timesteps) * (1.0 if float(x.abs().max()) < 100 else 0.0)

    captured, eager = both(schedule, waits)
    attempts: list[int] = []
    captures.failure = lambda: attempts.append(1)
    reason = "operation not permitted when stream is capturing: aten._local_scalar_dense.default"
    with pytest.warns(RuntimeWarning, match=f"cannot be captured as a CUDA graph, and runs eagerly: {reason}"):
        images = captured.sample(2, steps=3)
    assert torch.equal(images, eager.sample(2, steps=3))
    assert f"no tick was captured: {reason}" in captured.explain()
    assert torch.equal(captured.sample(5, steps=3), eager.sample(5, steps=3)), "and no second warning"
    assert len(attempts) == 1
    assert not captures.graphs


def test_memory_that_runs_out_in_a_capture_halves_the_bucket(
    schedule: sf.NoiseSchedule,
    captures: Captures,
) -> None:
    captured, eager = both(schedule, batch=8)
    failures = iter([True, False])

    def full() -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("full")

    captures.failure = full
    with pytest.warns(RuntimeWarning, match="out of memory: going on with 4 lanes at a time"):
        images = captured.sample(8, steps=2)
    assert torch.equal(images, eager.sample(8, steps=2))
    assert [runner.lanes for runner in idle_runners(captured)] == [4], "the lanes that did not fit are gone"


def test_engines_and_threads_do_not_meet(
    schedule: sf.NoiseSchedule,
    captures: Captures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests of several threads to several engines at once: each gets the images it would have got alone."""
    for name in ("normal", "diffusion_step"):
        monkeypatch.setattr(sf.kernels, name, one_at_a_time(getattr(sf.kernels, name)))
    captured, eager = both(schedule)
    other, _ = both(schedule, lambda x, t: -smooth(x, t))
    seeds = range(4)
    wanted = {seed: eager.sample(2, steps=5, eta=0.5, seed=seed) for seed in seeds}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(2):
            other.sample(2, steps=2, seed=seed)
            if not torch.equal(captured.sample(2, steps=5, eta=0.5, seed=seed), wanted[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_request_inside_another_gets_lanes_of_its_own(
    schedule: sf.NoiseSchedule,
    captures: Captures,
) -> None:
    captured, eager = both(schedule)

    def last(events: Iterator[sf.Event]) -> torch.Tensor:
        for event in events:
            inner, x = captured.sample(2, steps=2, seed=9), event.x
        assert torch.equal(inner, eager.sample(2, steps=2, seed=9))
        return x

    assert torch.equal(last(captured.stream(2, steps=3)), eager.sample(2, steps=3))


def test_the_recorded_graph_is_as_strict_as_a_real_one(schedule: sf.NoiseSchedule, captures: Captures) -> None:
    """The negative control: a network that reads a Python number on each call is frozen by a capture."""
    calls: list[int] = []

    def counts(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return smooth(x, timesteps) * (1 + 0.1 * len(calls))

    captured, eager = both(schedule, counts)
    images = captured.sample(2, steps=4)
    assert len(calls) == 4, "three calls to warm up, one to capture, none to replay"
    calls.clear()
    assert not torch.equal(images, eager.sample(2, steps=4))
