"""The engine on a GPU: captured ticks, a host that runs ahead, memory, bulk output."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion_testing.networks import tiny_unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]


@pytest.fixture(scope="module")
def schedule() -> sf.NoiseSchedule:
    return sf.NoiseSchedule.linear()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises in this block. Copying weights to the device does."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def engine(schedule: sf.NoiseSchedule, **arguments: Any) -> sf.Engine:
    return sf.Engine(tiny_unet(size=16, channels=3), schedule, null_label=3, **{"device": "cuda", **arguments})


def test_auto_captures(schedule: sf.NoiseSchedule) -> None:
    assert engine(schedule).plan.network.value == "graph"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_captured_tick_gives_the_same_bits(schedule: sf.NoiseSchedule, dtype: str, invariant: bool) -> None:
    captured, eager = (
        engine(schedule, network=network, dtype=dtype, invariant=invariant, batch=8) for network in ("graph", "eager")
    )
    for request in (
        {"steps": 2},
        {"steps": 3, "eta": 1.0, "guidance": 2.0, "labels": 1},
        {"sampler": "ddpm", "steps": 3},
    ):
        assert torch.equal(captured.sample(5, seed=3, **request), eager.sample(5, seed=3, **request))


@pytest.mark.parametrize("path", ["schedule", "sigma", "flow"])
def test_a_captured_tick_walks_any_path(schedule: sf.NoiseSchedule, path: str) -> None:
    """Heun, multistep, first-order and stochastic lanes in one graph, each as it is alone and without a graph."""
    on = {"schedule": schedule, "sigma": sf.SigmaPath(), "flow": sf.FlowPath()}[path]
    captured, eager = (
        engine(on, network=network, dtype="float32", invariant=True, batch=4)  # type: ignore[arg-type]
        for network in ("graph", "eager")
    )
    samplers = [("ddim", 5), ("heun", 4), ("dpmpp_3m", 8), ("euler_ancestral", 3)]
    tables = [captured.table(sampler, steps) for sampler, steps in samplers]
    mixed = captured.sample(4, tables, seed=3, labels=1, guidance=2.0)
    for image, table in enumerate(tables):
        alone = eager.sample(1, table, seed=3, indices=[image], labels=1, guidance=2.0)
        assert torch.equal(mixed[image], alone[0]), table


def test_the_gpu_agrees_with_the_reference_on_the_cpu(schedule: sf.NoiseSchedule) -> None:
    on_gpu = engine(schedule, dtype="float32")
    on_cpu = engine(schedule, device="cpu", backend="reference")
    wanted = on_cpu.sample(4, steps=10, eta=1.0, labels=[0, 1, 2, 3])
    images = on_gpu.sample(4, steps=10, eta=1.0, labels=[0, 1, 2, 3])
    torch.testing.assert_close(images.cpu(), wanted, rtol=0, atol=5e-3)  # float32 is without TF32; sums differ


def test_changing_the_request_captures_nothing(schedule: sf.NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(schedule)
    one.sample(4, steps=2)

    def refuse(*_: Any) -> None:
        pytest.fail("captured again")

    monkeypatch.setattr(sf.execution.cuda_graph, "capture", refuse)
    for sampler in ("ddim", "ddpm"):
        for steps in (3, 8):
            for seed in (0, 1):
                one.sample(4, sampler=sampler, steps=steps, seed=seed, labels=[seed, 1, 2, 3])


def test_the_host_does_not_wait_inside_the_loop(schedule: sf.NoiseSchedule) -> None:
    one = engine(schedule, batch=8)
    table = one.table(steps=20)
    one.sample(8, table)
    key = one.runners.key(one.request(8, table, labels=0), 8)
    runner = one.runners.pool.take(key, lambda _: pytest.fail("no idle runner"))
    with no_waiting():
        for _ in range(20):
            runner.tick()


def test_intermediates_cancellation_and_non_finite_images(schedule: sf.NoiseSchedule) -> None:
    one = engine(schedule)
    events = list(one.stream(3, steps=5))
    assert [event.step for event in events] == list(range(5))
    assert torch.equal(events[-1].x, one.sample(3, steps=5))
    with pytest.raises(sf.SamplingCancelled):
        one.sample(3, steps=50, callback=lambda event: event.step < 3)
    start = torch.full((2, *one.shape), 3e38)
    with pytest.raises(sf.NonFiniteError, match="image 0 "):
        one.sample(table=one.table(steps=4, clip=None), start=start)
    assert one.sample(3, steps=5).isfinite().all()


def test_threads_share_an_engine(schedule: sf.NoiseSchedule) -> None:
    one = engine(schedule)
    wanted = [one.sample(3, steps=6, eta=1.0, seed=seed).cpu() for seed in range(4)]
    images: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            images[seed] = one.sample(3, steps=6, eta=1.0, seed=seed).cpu()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(images[seed], wanted[seed])


@pytest.mark.parametrize("invariant", [False, True])
def test_bulk_pixels_are_those_of_sample(schedule: sf.NoiseSchedule, invariant: bool) -> None:
    """Bit for bit, if both run so many lanes: the last 8 of 40 images run in 8 lanes, unless that must not matter."""
    one = engine(schedule, batch=16, invariant=invariant)
    images = 40 if invariant else 48
    pixels = torch.cat(list(one.generate(images, steps=2)))
    assert pixels.device.type == "cpu"
    assert torch.equal(pixels, one.to_uint8(one.sample(images, steps=2)).cpu())


def test_the_batch_follows_the_free_memory(schedule: sf.NoiseSchedule) -> None:
    assert engine(schedule).batch == 256
    gc.collect()
    torch.cuda.empty_cache()  # what other tests used counts, too
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 0.2 * (1 << 30) / total))
    try:
        one = engine(schedule, batch=4096, network="eager")
        with pytest.warns(RuntimeWarning, match="out of memory: going on with"):
            images = one.sample(4096, steps=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert images.isfinite().all()


def test_compiled_and_captured(schedule: sf.NoiseSchedule) -> None:
    compiled = engine(schedule, network="compile+graph", dtype="float32")
    eager = engine(schedule, network="eager", dtype="float32")
    torch.testing.assert_close(compiled.sample(2, steps=5), eager.sample(2, steps=5), rtol=0, atol=5e-3)
    assert compiled.evaluator.declined is None
    assert compiled.runners.policy is not None
    assert compiled.runners.policy.failure is None


@pytest.mark.parametrize("network", ["graph", "eager"])
def test_float32_is_float32_and_tf32_is_not(schedule: sf.NoiseSchedule, network: str) -> None:
    """PyTorch's convolutions use TF32 unless they are told not to."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with TF32")
    exact = engine(schedule, device="cpu", backend="reference", dtype="float32").sample(4, steps=1)
    apart = {
        dtype: float((engine(schedule, dtype=dtype, network=network).sample(4, steps=1).cpu() - exact).abs().max())
        for dtype in ("float32", "tf32")
    }
    assert apart["float32"] < 1e-4 < apart["tf32"] < 5e-2
    assert torch.backends.cudnn.allow_tf32


def test_random_numbers_and_captures_work_after_a_capture_that_fails(schedule: sf.NoiseSchedule) -> None:
    """With another thread alive, in which waiting must not be an error, the capture itself finds out."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        test_a_network_that_waits_runs_eagerly(schedule)
    finally:
        done.set()
        other.join()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(8, device="cuda").isfinite().all()
    graph, value = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        value.add_(1)
    value.zero_()
    graph.replay()
    assert float(value) == 1
    captured, eager = (engine(schedule, network=network, dtype="bfloat16") for network in ("graph", "eager"))
    assert torch.equal(captured.sample(3, steps=4), eager.sample(3, steps=4))
    assert captured.runners.policy is not None
    assert captured.runners.policy.failure is None


def test_a_network_that_waits_runs_eagerly(schedule: sf.NoiseSchedule) -> None:
    def waits(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * (1.0 if float(x.abs().max()) < 100 else 0.0)

    one = sf.Engine(waits, schedule, shape=(3, 8, 8), device="cuda")
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph, and runs eagerly"):
        images = one.sample(2, steps=3)
    assert images.isfinite().all()
    assert "no tick was captured" in one.explain()
