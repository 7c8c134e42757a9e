"""What only a GPU can show: real sizes, offsets past 2**31, CUDA graphs, streams, several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import reference
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.twins import StepCase, assert_same_bits, assert_step_equivalent, assert_within, outputs

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
    *(StepCase((3, 128, 128), torch.bfloat16, "drawn", history=n, copies=2, rows=LANES) for n in (1, 2, 3)),
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


def _norm_arguments(
    lanes: int, channels: int, skip: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """One call of the group norm, as in a residual block, on the GPU."""
    x, other = (
        torch.randn(lanes, c, size, size, device=CUDA).to(dtype, memory_format=torch.channels_last)
        for c in (channels, skip)
    )
    width = channels + skip
    wide = torch.randn(lanes, 4 * width, device=CUDA).to(dtype)
    given = {"x": x, "weight": torch.randn(width, device=CUDA), "bias": torch.randn(width, device=CUDA)}
    given |= {"groups": 32, "eps": 1e-6, "time": wide[:, width : 2 * width]}
    return given | ({"skip": other} if skip else {})


NORMS = [
    (16, 128, 0, 32),
    (3, 256, 128, 32),
    (2, 128, 128, 256),
    (2, 512, 256, 33),
    (64, 256, 256, 8),
    (1, 512, 0, 16),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_group_norm_at_real_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = _norm_arguments(*shape, dtype)
    double = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    truth = reference.group_norm_silu(**double)
    largest = max(given["x"].abs().max().item(), 1.0) + given["time"].abs().max().item()  # of variance about 1
    magnitude = largest * given["weight"].abs().max().item() + given["bias"].abs().max().item()
    bound = tolerance(dtype, magnitude, ROUNDINGS["group_norm_silu"])
    for op in (kernels, reference):
        assert_within("out", op.group_norm_silu(**given), truth, bound)


@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_group_norm_has_the_same_bits_every_time_and_in_every_batch(shape: tuple[int, int, int, int]) -> None:
    given = _norm_arguments(*shape)
    want = kernels.group_norm_silu(**given)
    for _ in range(100):
        assert torch.equal(kernels.group_norm_silu(**given), want)
    for lane in {0, shape[0] - 1}:
        alone = {n: v[lane : lane + 1] if n in ("x", "skip", "time") else v for n, v in given.items()}
        assert_same_bits("out", kernels.group_norm_silu(**alone), want[lane : lane + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [384, 768, 1024, 1152, 1536, 4096])
def test_layer_norms_at_real_sizes(channels: int, dtype: torch.dtype) -> None:
    x, branch = (torch.randn(16, 256, channels, device=CUDA).to(dtype) for _ in range(2))
    shift, scale, gate = torch.randn(16, 3 * channels, device=CUDA).to(dtype).chunk(3, dim=1)
    given = {"scale": scale, "shift": shift, "eps": 1e-6, "branch": branch, "gate": gate}
    out, h = kernels.add_layer_norm_modulate(x, **given)
    added = gate.double()[:, None] * branch.double()
    assert_within("sum", h, x.double() + added, tolerance(dtype, float((x.double().abs() + added.abs()).max()), 2))
    truth = reference.layer_norm_modulate(h.double(), scale.double(), shift.double(), 1e-6)
    largest = float((h.double().abs() / h.double().std(2, keepdim=True)).max() * (1 + scale.double()).abs().max())
    bound = tolerance(dtype, largest + float(shift.abs().max()), ROUNDINGS["layer_norm_modulate"])
    assert_within("out", out, truth, bound)
    assert_same_bits("out", kernels.layer_norm_modulate(h, scale, shift, 1e-6), out)
    for _ in range(20):
        assert torch.equal(kernels.add_layer_norm_modulate(x, **given)[0], out)
    alone = {name: value if name == "eps" else value[-1:] for name, value in given.items()}
    assert_same_bits("out", kernels.add_layer_norm_modulate(x[-1:], **alone)[0], out[-1:])


#: Lanes, channels of the image, of x and of the skip input, side: of CelebA-HQ 256 and Stable Diffusion, and ragged.
PROJECTIONS = [
    (8, 128, 256, 128, 128),
    (1, 128, 128, 128, 256),
    (4, 256, 512, 256, 64),
    (8, 512, 512, 512, 8),
    (5, 320, 640, 320, 64),
    (3, 40, 24, 8, 33),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", PROJECTIONS, ids=str)
def test_projections_at_real_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Float64 within rounding; the same bits every time, in every batch and doubled."""
    lanes, channels, of_x, of_skip, side = shape
    image, x, skip = (
        torch.randn(lanes, c, side, side, device=CUDA).to(dtype, memory_format=torch.channels_last)
        for c in (channels, of_x, of_skip)
    )
    depth = of_x + of_skip
    weight, bias = (torch.randn(channels, depth, device=CUDA) / 8).to(dtype), torch.randn(channels, device=CUDA)
    given = {"skip": skip, "bias": bias}
    double = {"skip": skip.double(), "bias": bias.double()}
    truth = reference.add_projection_(image.double(), x.double(), weight.double(), **double)
    sizes = {name: tensor.abs() for name, tensor in double.items()}
    largest = reference.add_projection_(image.double().abs(), x.double().abs(), weight.double().abs(), **sizes).max()
    bound = tolerance(dtype, float(largest), ROUNDINGS["add_projection"] + depth // 8)

    def once(lanes: slice = slice(None)) -> torch.Tensor:
        alone = given | {"skip": skip[lanes]}
        return kernels.add_projection_(image[lanes].clone(), x[lanes], weight, **alone)

    out = once()
    assert_within("sum", out, truth, bound)
    for _ in range(100):
        assert torch.equal(once(), out)
    assert_same_bits("last lane", once(slice(lanes - 1, lanes)), out[-1:])
    doubled = kernels.add_projection_doubled(image, x, weight, **given)
    assert_same_bits("doubled", doubled, out.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_group_norm_with_a_large_mean() -> None:
    given = _norm_arguments(2, 128, 0, 256, torch.float32)
    del given["time"]
    given["x"].mul_(0.1).add_(1e3)
    truth = reference.group_norm_silu(
        **{n: v.double() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    )
    magnitude = 1.1e4 * given["weight"].abs().max().item()  # the largest |x| over the deviation
    bound = tolerance(torch.float32, magnitude, ROUNDINGS["group_norm_silu"])
    assert_within("out", kernels.group_norm_silu(**given), truth, bound)


@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_a_cuda_graph_replays_the_group_norm(shape: tuple[int, int, int, int]) -> None:
    given, other = _norm_arguments(*shape), _norm_arguments(*shape)
    want = [kernels.group_norm_silu(**arguments) for arguments in (given, other)]  # compiles, too
    held = {n: v.clone(memory_format=torch.preserve_format) if n in ("x", "skip") else v for n, v in given.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.group_norm_silu(**held)
    for arguments, expected in zip((given, other), want, strict=True):
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                value.copy_(arguments[name])
        graph.replay()
        assert_same_bits("out", out.cpu(), expected.cpu())


def test_group_norm_beyond_two_to_the_31_elements() -> None:
    lanes, channels, size = 17, 128, 1024
    needed = 2 * lanes * channels * size * size * 2 + 2**31
    if torch.cuda.mem_get_info(CUDA)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    last = _norm_arguments(1, channels, 0, size)
    x = torch.zeros(lanes, channels, size, size, device=CUDA, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1] = last["x"][0]
    time = last["time"].expand(lanes, channels)
    out = kernels.group_norm_silu(**{**last, "x": x, "time": time})
    assert_same_bits("out", out[-1:], kernels.group_norm_silu(**last))
    assert_same_bits("out", out[-2:-1], out[:1])
