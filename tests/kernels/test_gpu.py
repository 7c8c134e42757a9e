"""What only a GPU can show: real sizes, offsets past 2**31, CUDA graphs, streams, several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from twins import StepCase, assert_same_bits, assert_step_equivalent, outputs

from stepfusion import kernels
from stepfusion.kernels import reference

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
LANES = tuple(i % 6 - 1 for i in range(48))  # every row, and parked lanes

REAL = [
    StepCase((3, 32, 32), torch.bfloat16, "drawn", copies=2, rows=LANES),
    StepCase((3, 256, 256), torch.bfloat16, "drawn", rows=LANES),
    StepCase((3, 256, 256), torch.float16, "given", guidance=tuple(i % 3 * 3.75 for i in range(48)), rows=LANES),
    StepCase((4, 128, 128), torch.float32, "none", rows=LANES),
    StepCase((3, 64, 64), torch.bfloat16, "drawn", learned=True, rows=LANES),
    StepCase((1, 511, 513), torch.bfloat16, "drawn", rows=LANES),
]


@pytest.mark.parametrize("case", REAL, ids=str)
def test_step_at_real_sizes(case: StepCase) -> None:
    """Fused and reference on the GPU: equal bits, drawn noise included."""
    assert_step_equivalent(kernels.diffusion_step, case.arguments(CUDA))


@pytest.mark.parametrize("case", REAL[:4], ids=str)
def test_step_equals_the_reference_on_a_cpu(case: StepCase) -> None:
    given = case.arguments(torch.device("cpu"))
    on_gpu = outputs(kernels.diffusion_step, {name: tensor.to(CUDA) for name, tensor in given.items()})
    for name, result in outputs(reference.diffusion_step, given).items():
        assert_same_bits(name, on_gpu[name], result)


def test_noise_equals_the_reference_on_a_cpu() -> None:
    seeds, indices, timesteps = torch.randint(-(2**63), 2**63 - 1, (16,)), torch.arange(16), torch.arange(16) * 60
    want = reference.normal(seeds, indices, timesteps, (3, 256, 256), kernels.STREAM_INITIAL)
    lanes = [t.to(CUDA) for t in (seeds, indices, timesteps)]
    for op in (kernels, reference):
        assert_same_bits("z", op.normal(*lanes, (3, 256, 256), kernels.STREAM_INITIAL).cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forward_and_pixels_equal_the_reference_on_a_cpu(dtype: torch.dtype) -> None:
    x, t = torch.randn(16, 3, 64, 64).to(dtype), torch.arange(16) * 5
    tables, seeds = torch.rand(4, 80).unbind(), torch.arange(16)
    calls: list[tuple[str, dict[str, Any]]] = [
        (
            "q_sample",
            dict(
                zip(
                    ("x_start", "t", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
                    (x, t, *tables[:2]),
                    strict=True,
                )
            )
            | {"seeds": seeds, "indices": seeds + 2},
        ),
        ("to_uint8", {"x": x}),
    ]
    for name, given in calls:
        moved = {key: value.to(CUDA) for key, value in given.items()}
        got, want = getattr(kernels, name)(**moved), getattr(reference, name)(**given)
        pairs = [(got, want)] if isinstance(want, torch.Tensor) else list(zip(got, want, strict=True))
        for ours, theirs in pairs:
            assert_same_bits(name, ours.float().cpu(), theirs.float())
    mean = kernels.q_posterior_mean_variance(*(a.to(CUDA) for a in (x, x.flip(0), t, *tables)))[0]
    assert_same_bits("mean", mean.cpu(), reference.q_posterior_mean_variance(x, x.flip(0), t, *tables)[0])


def test_step_beyond_two_to_the_31_elements() -> None:
    lanes, elements = 17, 2**27 - 4096
    needed = lanes * elements * (4 + 2 + 2 * 2) + 2**30
    if torch.cuda.mem_get_info(CUDA)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    given = StepCase((elements,), torch.bfloat16, "drawn", x0=False, rows=(2,)).arguments(CUDA)
    want = outputs(kernels.diffusion_step, given)
    assert_same_bits("x_next", want["x_next"], outputs(reference.diffusion_step, given)["x_next"])

    x = torch.zeros(lanes, elements, device=CUDA)
    out = torch.zeros(lanes, elements, device=CUDA, dtype=torch.bfloat16)
    net = torch.zeros(2 * lanes, elements, device=CUDA, dtype=torch.bfloat16)
    x[-1], out[-1] = given["x"][0], given["out"][0]
    rows = torch.full((lanes,), kernels.PARKED, device=CUDA)
    rows[-1] = 2
    per_lane = {name: given[name].expand(lanes).contiguous() for name in ("seeds", "indices")}
    kernels.diffusion_step(x, out, rows, given["coefficients"], given["timesteps"], x_next=x, x_net=net, **per_lane)
    assert_same_bits("x_next", x[-1].cpu(), want["x_next"][0])
    for copy in (net[lanes - 1], net[-1]):
        assert_same_bits("x_net", copy.cpu(), want["x_net"][0])
    assert not x[:-1].any()


def _loop(given: dict[str, torch.Tensor]) -> None:
    """One tick without a network: the step in place, then every lane one row on."""
    lanes = {name: given[name] for name in ("seeds", "indices", "x_net", "flags")}
    tensors = [given[name] for name in ("x", "out", "rows", "coefficients", "timesteps")]
    kernels.diffusion_step(*tensors, x_next=given["x"], **lanes)
    given["rows"].add_(1)


def test_a_cuda_graph_replays_the_step() -> None:
    case = StepCase((3, 32, 32), torch.bfloat16, "drawn", x0=False, rows=(0, 1, 0, 2))
    given = case.arguments(CUDA)
    eager = {name: tensor.clone() for name, tensor in given.items()}
    for _ in range(3):
        _loop(eager)
    captured = {name: tensor.clone() for name, tensor in given.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _loop(captured)
    for name, tensor in given.items():
        captured[name].copy_(tensor)
    for _ in range(3):
        graph.replay()
    for name in ("x", "x_net", "flags", "rows"):
        assert_same_bits(name, captured[name].cpu(), eager[name].cpu())


def test_the_step_runs_on_the_current_stream() -> None:
    """The input is ready only after a long sleep on that stream: on another one the step would read zeros."""
    given = StepCase((3, 32, 32), torch.bfloat16).arguments(CUDA)
    want = outputs(kernels.diffusion_step, given)  # compiles, too
    late = {**given, "x": torch.zeros_like(given["x"])}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late["x"].copy_(given["x"])
        kernels.diffusion_step(**late)
    stream.synchronize()
    assert_same_bits("x_next", late["x_next"].cpu(), want["x_next"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_step_runs_on_the_device_of_its_tensors() -> None:
    given = StepCase((3, 32, 32), torch.bfloat16).arguments(torch.device("cuda:1"))
    with torch.cuda.device(0):
        assert_step_equivalent(kernels.diffusion_step, given)
        assert torch.cuda.current_device() == 0
