"""The C++ sampling kernels beyond what every fused op is tested for: instruction sets, layouts, memory, gradients."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfusion import kernels
from stepfusion.kernels import BackendError, cpu_ops, reference
from stepfusion.kernels.cpu import sampling_library
from stepfusion_testing.cpu_kernels import thread_counts
from stepfusion_testing.fused import INSTRUCTION_SETS, use_sampling_kernels
from stepfusion_testing.twins import BUFFERS, StepCase, assert_same_bits, assert_step_equivalent, outputs

CPU = torch.device("cpu")
RUN = 1024  # of sampling.h

pytestmark = pytest.mark.skipif(
    sampling_library.why_not_sampling_kernels() is not None,
    reason=f"C++: {sampling_library.why_not_sampling_kernels()}",
)


def _table() -> Tensor:
    return torch.linspace(0.05, 0.95, 10)


def _calls(shape: tuple[int, ...] = (3, 21, 23), dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
    """Arguments of every op but the step, for five images."""
    batch = (5, *shape)
    t, seeds, indices = torch.tensor([0, 9, 4, 7, 1]), torch.tensor([1, -1, 2**62, 7, 7]), torch.arange(5) + 2**31
    abar = torch.linspace(0.999, 0.01, 10, dtype=torch.float64)
    single = {"x": torch.randn(batch), "out": torch.randn(batch).to(dtype), "t": t, "t_prev": t - 1}
    single |= {"alphas_cumprod": abar, "seeds": seeds, "indices": indices}
    tables = dict.fromkeys(("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance"), _table())
    return {
        "q_sample": {
            "x_start": torch.randn(batch).to(dtype),
            "t": t,
            "sqrt_alphas_cumprod": _table(),
            "sqrt_one_minus_alphas_cumprod": _table().flip(0),
            "seeds": seeds,
            "indices": indices,
        },
        "q_posterior_mean_variance": {
            "x_start": torch.randn(batch).to(dtype),
            "x_t": torch.randn(batch).to(dtype),
            "t": t,
            **tables,
            "posterior_log_variance_clipped": _table().log(),
        },
        "normal": {"seeds": seeds, "indices": indices, "timesteps": t, "shape": shape},
        "to_uint8": {"x": torch.randn(batch).to(dtype)},
        "ddim_step": {**single, "eta": 0.7},
        "ddpm_step": single,
    }


def _results(value: Any) -> list[Tensor]:
    """Every tensor of a result, as float32."""
    return [tensor.float() for tensor in (value if isinstance(value, tuple) else (value,))]


def _same(name: str, got: Any, want: Any) -> None:
    for ours, theirs in zip(_results(got), _results(want), strict=True):
        assert_same_bits(name, ours, theirs)


# Instruction sets and threads

CASES = [
    StepCase((3, 21, 23), torch.bfloat16, "drawn", guidance=(7.5, 1.0, 0.0, 3.0), copies=2, history=1, known=True),
    StepCase((3, 21, 23), torch.float16, "drawn", learned=True),
    StepCase((4101,), torch.float32, "given", learned=True, history=3),
    StepCase((3, 21, 23), torch.bfloat16, "drawn", guidance=(7.5, 1.0, 0.0, 3.0), copies=2, history=3, unguided=True),
    StepCase((3, 21, 23), torch.float16, "none", history=2, x0=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction_sets_give_the_same_bits_in_the_step(case: StepCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an exponential too, which is the kernel's own."""
    given = case.arguments(CPU)
    expected = outputs(cpu_ops.diffusion_step, given)
    for name in INSTRUCTION_SETS:
        use_sampling_kernels(name, monkeypatch)
        for output, tensor in outputs(cpu_ops.diffusion_step, given).items():
            assert_same_bits(output, tensor, expected[output])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(_calls()))
def test_instruction_sets_give_the_same_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _calls(dtype=dtype)[name]
    expected = getattr(cpu_ops, name)(**arguments)
    for instructions in INSTRUCTION_SETS:
        use_sampling_kernels(instructions, monkeypatch)
        _same(name, getattr(cpu_ops, name)(**arguments), expected)


@pytest.mark.parametrize("name", sorted(_calls()))
def test_threads_give_the_same_bits(name: str) -> None:
    arguments = _calls((3, 80, 80))[name]
    expected = getattr(reference, name)(**arguments)
    for _ in thread_counts():
        _same(name, getattr(cpu_ops, name)(**arguments), expected)


@pytest.mark.parametrize("case", [StepCase((3, 80, 80), torch.bfloat16, "drawn", copies=2), CASES[0]], ids=str)
def test_threads_give_the_same_step(case: StepCase) -> None:
    given = case.arguments(CPU)
    given["out"][3] = torch.nan  # several threads flag one lane
    expected = outputs(reference.diffusion_step, given)
    for _ in thread_counts():
        for name, tensor in outputs(cpu_ops.diffusion_step, given).items():
            assert_same_bits(name, tensor, expected[name])


# Memory

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [
    (1, 5, 7),
    (2, 7, 9),
    (3, 41, 41),
    (4, 33, 32),
    (5, 6, 6),
    (8, 13, 11),
    (17, 12, 12),
    (130, 4, 5),
    (1100, 2, 3),
]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_operand_of_the_step_may_be_channels_last(shape: tuple[int, ...], learned: bool) -> None:
    """One at a time, and all."""
    options = {"guidance": (7.5, 1.0, 0.0, 3.0), "known": True, "history": 2}
    given = StepCase(shape, torch.float16, "given", learned=learned, **options).arguments(CPU)
    expected = outputs(cpu_ops.diffusion_step, given)
    names = ("x", "out", "noise", "out_uncond", "known")
    for chosen in (*((name,) for name in names), names):
        moved = {n: t.to(memory_format=torch.channels_last) if n in chosen else t for n, t in given.items()}
        for name, tensor in outputs(cpu_ops.diffusion_step, moved).items():
            assert_same_bits(name, tensor, expected[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_keyed_by_the_logical_element(shape: tuple[int, ...]) -> None:
    """In channels_last a run starts inside a quad of normals wherever the size of a plane is no multiple of four."""
    given = StepCase(shape, torch.bfloat16, "drawn").arguments(CPU)
    given["out"] = given["out"].to(memory_format=torch.channels_last)
    assert_step_equivalent(cpu_ops.diffusion_step, given, truncated=False)


@pytest.mark.parametrize("name", ["q_sample", "q_posterior_mean_variance", "to_uint8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_operand_may_be_channels_last(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arguments = _calls(shape, dtype)[name]
    expected = getattr(reference, name)(**arguments)
    images = [n for n, value in arguments.items() if isinstance(value, Tensor) and value.ndim == 4]
    for chosen in (*((name,) for name in images), images):
        moved = {n: v.to(memory_format=torch.channels_last) if n in chosen else v for n, v in arguments.items()}
        _same(name, getattr(cpu_ops, name)(**moved), expected)


def _shifted(tensor: Tensor, offset: int) -> Tensor:
    """The values of ``tensor`` at an address that is a multiple of nothing but an element's size."""
    room = torch.full((tensor.numel() + offset,), 7, dtype=tensor.dtype)
    moved = room[offset:].view(tensor.shape)
    moved.copy_(tensor)
    return moved


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_addresses_need_no_alignment(case: StepCase, offset: int) -> None:
    given = case.arguments(CPU)
    expected = outputs(cpu_ops.diffusion_step, given)
    moved = {name: _shifted(tensor, offset) for name, tensor in given.items()}
    results = {name: moved[name] for name in BUFFERS if name in moved}
    cpu_ops.diffusion_step(**moved)
    for name, tensor in results.items():
        assert_same_bits(name, tensor, expected[name])


@pytest.mark.parametrize("elements", [1, 3, 4, 5, 63, 64, 65, RUN - 1, RUN, RUN + 1, 3 * RUN + 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_else_is_written(elements: int, dtype: torch.dtype) -> None:
    """What lies before and behind every output keeps its values."""
    given = StepCase((elements,), dtype, "drawn", copies=2, history=3, rows=(1, 2)).arguments(CPU)
    guard = 70
    rooms = {}
    for name in BUFFERS:
        rooms[name] = torch.full((given[name].numel() + 2 * guard,), 7, dtype=given[name].dtype)
        given[name] = rooms[name][guard:-guard].view(given[name].shape).copy_(given[name])
    cpu_ops.diffusion_step(**given)
    for room in rooms.values():
        assert bool((room[:guard] == 7).all())
        assert bool((room[-guard:] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_widened_and_narrowed_as_pytorch_does(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1)
    t, one, none = torch.tensor([0]), torch.ones(1), torch.zeros(1)
    for signal in (1.0, 0.3, 1e-3, 60000.0):
        tables = (one * signal, none)
        got, _ = cpu_ops.q_sample(values, t, *tables, noise=torch.zeros(values.shape))
        want, _ = reference.q_sample(values, t, *tables, noise=torch.zeros(values.shape))
        assert_same_bits("x_t", got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_float32_is_narrowed_as_pytorch_does(dtype: torch.dtype) -> None:
    """Random bits: subnormal numbers, ties and what is too large among them; and every tie of small mantissas."""
    words = torch.randint(-(2**31), 2**31 - 1, (2**18,)).to(torch.int32)
    ties = torch.arange(0, 2**31 - 1, 2**12).to(torch.int32)
    x = torch.cat((words, ties, ties + 1, ties - 1)).view(torch.float32).view(1, -1)
    table = torch.zeros(1, len(kernels.COLUMNS))
    table[0, [kernels.COLUMNS.index(name) for name in ("next_x", "net_scale")]] = 1.0
    copy = torch.empty_like(x, dtype=dtype)
    row = torch.tensor([0])
    state = cpu_ops.diffusion_step(x, torch.zeros_like(x), row, table, row, x_net=copy)
    finite = x.isfinite()  # 0 times infinity is no number
    assert_same_bits("x_next", state[finite], x[finite])
    assert_same_bits("x_net", copy, state.to(dtype))


def test_the_exponential_is_rounded_nearly_always_right() -> None:
    """The standard deviation exp(v / 2 + 1 / 2 + ...) of a learned variance, from 0 to infinity."""
    exponents = torch.cat((torch.linspace(-110, 95, 200_003), torch.linspace(-1e-3, 1e-3, 2001)))
    exponents = torch.cat((exponents, torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])))
    x = torch.zeros(1, len(exponents), 1)
    table = torch.zeros(1, len(kernels.COLUMNS))
    for column, value in {"sigma": 1.0, "clip": 1.0, "half_log_min": -1.0, "half_log_span": 2.0}.items():
        table[0, kernels.COLUMNS.index(column)] = value
    out = torch.cat((x, exponents.view(1, -1, 1)), dim=1)
    row = torch.tensor([0])
    got = cpu_ops.diffusion_step(x, out, row, table, row, noise=torch.ones_like(x)).flatten()
    arguments = -1.0 + (exponents * 0.5 + 0.5) * 2.0
    exact = arguments.double().exp()
    want = exact.float()
    assert_same_bits("of what is not finite", got[-7:], want[-7:])
    near = torch.nextafter(want, torch.full_like(want, torch.inf)), torch.nextafter(want, torch.zeros_like(want))
    right = got == want
    assert bool((right | (got == near[0]) | (got == near[1]) | want.isnan()).all())
    assert int((~right & ~want.isnan()).sum()) <= 2


@pytest.mark.parametrize("name", ["x", "out", "noise", "known"])
def test_a_lane_that_is_not_finite_leaves_the_others_alone(name: str) -> None:
    given = StepCase((3, 9, 9), torch.float32, "given", known=True, copies=2, history=1).arguments(CPU)
    clean = outputs(cpu_ops.diffusion_step, given)
    given[name][3] = torch.inf
    got = outputs(cpu_ops.diffusion_step, given)
    for output in ("x_next", "x0", "flags"):
        assert_same_bits(output, got[output][:3], clean[output][:3])
    assert_same_bits("history", got["history"][:, :3], clean["history"][:, :3])
    assert got["flags"].tolist() == [-1, -1, -1, 1]


def test_a_flag_is_set_by_what_is_not_finite_alone() -> None:
    """A sum of these would overflow."""
    given = StepCase((7,), torch.float32, "none", rows=(1, 2)).arguments(CPU)
    given["coefficients"][:] = 0.0
    given["coefficients"][:, kernels.COLUMNS.index("next_x")] = 1.0
    given["x"][:] = 3e38
    assert outputs(cpu_ops.diffusion_step, given)["flags"].tolist() == [-1, -1]


def test_the_step_beyond_two_to_the_31_elements(tmp_path: Path) -> None:
    """The last of 2**22 + 1 lanes of 1024 elements; the others are parked, and their memory is a hole in a file."""
    lanes = 2**22 + 1

    def reserve(dtype: torch.dtype, count: int = lanes) -> Tensor:
        path = tmp_path / "zeros"
        zeros = torch.from_file(str(path), shared=True, size=count * RUN, dtype=dtype).view(count, RUN)
        path.unlink()
        return zeros

    given = StepCase((RUN,), torch.float16, rows=(1,), copies=2, x0=False).arguments(CPU)
    want = outputs(cpu_ops.diffusion_step, given)
    far = {"x": reserve(torch.float32), "out": reserve(torch.float16)}
    for name, tensor in far.items():
        tensor[-1] = given[name][0]
    net, rows = reserve(torch.float16, 2 * lanes), torch.full((lanes,), kernels.PARKED)
    rows[-1] = 1
    repeated = {name: given[name].expand(lanes).contiguous() for name in ("seeds", "indices", "flags")}
    cpu_ops.diffusion_step(**{**given, **far, **repeated, "rows": rows, "x_next": far["x"], "x_net": net})
    assert_same_bits("x_next", far["x"][-1], want["x_next"][0])
    for copy in (lanes - 1, 2 * lanes - 1):
        assert_same_bits("x_net", net[copy], want["x_net"][0])
    assert not far["x"][0].any()
    assert not net[0].any()


# What goes to the reference, and what is refused


def test_names_and_signatures_are_those_of_the_other_fused_ops() -> None:
    assert cpu_ops.__all__ == reference.__all__
    for name in cpu_ops.__all__:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (cpu_ops, kernels))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]


def _gradient(ops: Any, name: str, arguments: dict[str, Any], by: str) -> Tensor:
    given = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    given[by].requires_grad_()
    result = getattr(ops, name)(**given)
    (result[0] if isinstance(result, tuple) else result).square().sum().backward()
    assert isinstance(given[by].grad, Tensor)
    return given[by].grad


@pytest.mark.parametrize(("name", "by"), [("q_sample", "x_start"), ("q_posterior_mean_variance", "x_t")])
def test_gradients_are_those_of_the_reference(name: str, by: str) -> None:
    arguments = _calls()[name]
    assert_same_bits("gradient", *(_gradient(ops, name, arguments, by) for ops in (cpu_ops, reference)))


@pytest.mark.parametrize("by", ["x", "out"])
def test_what_requires_a_gradient_gets_one_or_an_error(by: str) -> None:
    """The same as from the reference, whichever it is; never a result that has silently lost its history."""

    def attempt(ops: Any) -> Tensor | str:
        try:
            return _gradient(ops, "ddim_step", _calls()["ddim_step"], by)
        except RuntimeError as error:
            return str(error)

    ours, theirs = attempt(cpu_ops), attempt(reference)
    assert type(ours) is type(theirs)


def test_without_gradients_a_parameter_is_a_tensor_as_any_other() -> None:
    arguments = _calls()["q_sample"]
    expected = reference.q_sample(**arguments)
    arguments["x_start"].requires_grad_()
    with torch.no_grad():
        _same("q_sample", cpu_ops.q_sample(**arguments), expected)


@pytest.mark.parametrize("name", sorted(set(_calls()) - {"normal"}))
def test_float64_is_the_references(name: str) -> None:
    arguments = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in _calls()[name].items()
    }
    got, want = (getattr(ops, name)(**arguments) for ops in (cpu_ops, reference))
    for ours, theirs in zip(_results(got), _results(want), strict=True):
        assert torch.equal(ours, theirs)


def test_tables_in_float64_give_variances_in_float64() -> None:
    arguments = _calls()["q_posterior_mean_variance"]
    for name in arguments:
        if name.startswith("posterior"):
            arguments[name] = arguments[name].double()
    got, want = (ops.q_posterior_mean_variance(**arguments) for ops in (cpu_ops, reference))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", sorted(_calls()))
def test_another_device_is_refused(name: str) -> None:
    arguments = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in _calls()[name].items()}
    with pytest.raises(BackendError, match="the C\\+\\+ sampling kernels cannot run on meta: they are for CPUs"):
        getattr(cpu_ops, name)(**arguments)


class _Forward(torch.nn.Module):
    def forward(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x_t: Tensor = cpu_ops.q_sample(x, t, _table(), _table(), noise=noise)[0]
        return x_t


def test_a_program_that_is_exported_holds_the_reference() -> None:
    """It is to run where no C++ library is."""
    x, t = torch.randn(2, 3, 4, 5), torch.tensor([1, 2])
    program = torch.export.export(_Forward(), (x, t, x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("stepfusion" in target for target in targets)
    assert_same_bits("x_t", program.module()(x, t, x), _Forward()(x, t, x))


def test_a_compiled_program_holds_the_kernel() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph.code)
        return graph

    x, t = torch.randn(2, 3, 4, 5), torch.tensor([1, 2])
    compiled = torch.compile(_Forward(), fullgraph=True, backend=backend)
    assert_same_bits("x_t", compiled(x, t, x), _Forward()(x, t, x))
    assert len(graphs) == 1
    assert "q_sample_cpu" in graphs[0]


@pytest.fixture
def op_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments that it takes."""
    ops, calls = torch.ops.stepfusion, _calls((3, 4, 5))
    step = StepCase((3, 4, 5), torch.float16, "drawn", copies=2).arguments(CPU)
    names = ("x", "out", "rows", "coefficients", "timesteps", "seeds", "indices", "noise", "out_uncond", "guidance")
    names += ("x_next", "x_net", "x0", "flags", "known", "history")
    kept = StepCase((3, 4, 5), torch.float32, "none", history=3).arguments(CPU)
    forward, t = calls["q_sample"], calls["q_sample"]["t"]
    x, tables = forward["x_start"], [_table(), _table()]
    identity = (forward["seeds"], forward["indices"])
    return [
        (ops.diffusion_step_cpu_.default, (*(step.get(name) for name in names), False)),
        (ops.diffusion_step_cpu_.default, (*(kept.get(name) for name in names), False)),
        (ops.q_sample_cpu_.default, (x, t, *tables, *identity, None, torch.empty_like(x), torch.empty_like(x))),
        (ops.q_sample_cpu_.default, (x, t, *tables, None, None, x, torch.empty_like(x), None)),
        (ops.q_posterior_cpu.default, (x, x, t, *tables, *tables)),
        (ops.normal_cpu_.default, (*identity, t, 0, torch.empty_like(x))),
        (ops.to_uint8_cpu.default, (x,)),
    ]


def test_the_ops_are_what_torch_library_wants(op_calls: list[tuple[Any, tuple[Any, ...]]]) -> None:
    for op, arguments in op_calls:
        torch.library.opcheck(op, arguments)
