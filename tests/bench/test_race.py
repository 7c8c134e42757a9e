"""Providers of one case: that each does the work it is timed for, and what becomes of one that cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from stepfusion.bench.floors import Floors
from stepfusion.bench.headline import Notebook, headline_rows
from stepfusion.bench.models import _COMMON, _PUBLISHED, load_model
from stepfusion.bench.options import Options
from stepfusion.bench.ours import Ours, check_runs_as_asked
from stepfusion.bench.peers import Diffusers, Eager, OpenVINO, all_providers
from stepfusion.bench.providers import Built, Case, Provider, Unavailable
from stepfusion.bench.race import Race
from stepfusion.execution import compiled
from stepfusion.execution.cuda_graph import CapturePolicy
from stepfusion.kernels.cpu.library import onednn_limit
from stepfusion.networks import UNet2DConfig
from stepfusion.samplers.schedule import NoiseSchedule

CPU = torch.device("cpu")
FLOORS = Floors((), 1e9, {"float32": 1e12, "bfloat16": 1e12})


@pytest.fixture
def case() -> Iterator[Case]:
    made = Case(load_model("tiny"), CPU, 2, 2)
    yield made
    made.folder.cleanup()


class Stub(Provider):
    """A provider whose outputs are those of ours, moved by ``shift``."""

    family, dtype = "stub", "float32"

    def __init__(self, name: str, shift: float = 0.0, error: Exception | None = None) -> None:
        self.name, self.shift, self.error, self.timed = name, shift, error, 0

    def build(self, case: Case) -> Built:
        if self.error is not None:
            raise self.error
        ours = Ours("eager", "float32").build(case)

        def finish() -> None:
            self.timed += 1

        return Built(
            lambda count: ours.evaluate(count) + self.shift, lambda noise: ours.loop(noise) + self.shift, finish
        )


def test_a_provider_that_is_wrong_is_an_error_and_is_not_timed(case: Case) -> None:
    right, wrong = Stub("right"), Stub("wrong", shift=0.3)
    with Race("compare", case, [right, wrong], FLOORS) as race:
        rows = {row.provider: row for row in race.loops(2, finish=True)}
    assert rows["right"].error is None
    assert rows["right"].median_ms is not None
    assert right.timed > 0
    assert (rows["wrong"].error or "").endswith("accepted is rms 0.001; nothing was timed")
    assert rows["wrong"].median_ms is None
    assert wrong.timed == 0


def test_who_cannot_run_is_a_note_and_who_fails_an_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = OpenVINO("float32")
    monkeypatch.setattr(missing, "packages", ("a_package_that_is_not",))
    providers = [
        Stub("unavailable", error=Unavailable("no such device")),
        Stub("broken", error=OSError("gone")),
        missing,
    ]
    with Race("compare", case, [*providers, Stub("fine")], FLOORS) as race:
        rows = {row.provider: row for row in race.absent()}
        assert [row.provider for row in race.evaluations(1)] == ["fine"]
    assert rows["unavailable"].notes == "no such device"
    assert rows["unavailable"].error is None
    assert rows["broken"].error == "OSError: gone"
    assert rows["openvino float32"].notes == "not installed: pip install a_package_that_is_not"


@pytest.mark.parametrize("wrong", ["fails", "differs"])
def test_a_compilation_that_was_declined_has_no_time(wrong: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine then runs eagerly, which is right for a user and would be a false row here."""

    def compile_wrongly(graph: torch.fx.GraphModule, inputs: Any, options: Any) -> Callable[..., Any]:
        if wrong == "fails":
            raise RuntimeError("no C++ compiler")
        return lambda *args: tuple(out + 1.0 for out in graph.forward(*args))

    monkeypatch.setattr(torch._inductor, "compile", compile_wrongly)
    monkeypatch.setattr(compiled, "why_not_cpu_form", lambda device, dtype: "Inductor is to compile it")

    with Race("compare", case, [Ours("eager", "float32"), Ours("compile", "float32")], FLOORS) as race:
        with pytest.warns(RuntimeWarning, match="the network runs eagerly"):
            rows = list(race.evaluations(1))
        rows += [*race.loops(1), *race.loops(1, finish=True)]
    assert {row.provider for row in rows} == {"stepfusion eager float32", "stepfusion compile float32"}
    for row in rows:
        if row.provider == "stepfusion eager float32":
            assert (row.error, row.median_ms is None) == (None, False)
        else:
            assert (row.error or "").startswith("RuntimeError: the engine does not run as it was asked to: ")
            assert ("no C++ compiler" if wrong == "fails" else "differs") in (row.error or "")
            assert row.median_ms is None


def test_a_tick_that_was_not_captured_has_no_time(case: Case) -> None:
    engine = Ours("eager", "float32").engine(case)
    check_runs_as_asked(engine)
    engine.runners.policy = CapturePolicy()
    check_runs_as_asked(engine)
    engine.runners.policy.failure = "the network waits for the device"
    with pytest.raises(RuntimeError, match=r"as it was asked to: the network waits for the device$"):
        check_runs_as_asked(engine)


def test_the_first_output_is_not_what_is_compared(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled network may answer its first call by the eager one, and later ones wrongly."""
    liar = Stub("liar")
    truth = liar.build(case)
    answers = iter([0.0])
    lying = Built(lambda count: truth.evaluate(count) + next(answers, 0.3), truth.loop, truth.finish)
    monkeypatch.setattr(liar, "build", lambda case: lying)
    with Race("compare", case, [liar], FLOORS) as race:
        (row,) = race.evaluations(1)
    assert (row.error or "").endswith("nothing was timed")


def test_fractions_refer_to_the_ceiling_that_was_measured(case: Case) -> None:
    with Race("compare", case, [Stub("fine")], FLOORS) as race:
        (row,) = race.evaluations(2)
    assert row.flops == case.model.flops(2)
    assert row.median_ms is not None
    assert row.fraction == pytest.approx(row.flops / (row.median_ms / 1e3) / 1e12)


def test_evaluations_of_a_call_are_shared_out() -> None:
    case = Case(load_model("tiny"), CPU, 2, 2, evaluations=3)
    with Race("compare", case, [Stub("fine")], FLOORS) as race:
        (row,) = race.evaluations(2)
    assert row.flops == case.model.flops(2)
    assert row.notes == "3 evaluations a call"


def test_the_evaluation_table_returns_what_the_network_returns(case: Case) -> None:
    """Else the fraction and every ratio of an evaluation would be of something else."""
    network = case.model.network
    with torch.no_grad():
        direct = network(case.start, torch.full((2,), case.timestep))
    torch.testing.assert_close(Ours("eager", "float32").build(case).evaluate(1), direct, rtol=0, atol=1e-5)
    torch.testing.assert_close(Diffusers().build(case).evaluate(1), direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_whole_loops_agree_with_the_pipelines_as_shipped(sampler: str) -> None:
    case = Case(load_model("tiny"), CPU, 2, 5, sampler)
    ours, pipeline, loop = (p.build(case).loop(case.noise) for p in (Ours("eager", "float32"), Diffusers(), Eager()))
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(ours.clamp(-1, 1), pipeline, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, loop, rtol=0, atol=1e-4)
    case.folder.cleanup()


def test_drawn_noise_is_not_the_compared_noise() -> None:
    case = Case(load_model("tiny"), CPU, 2, 3, "ddpm")
    for provider in (Ours("eager", "float32"), Eager(), Diffusers()):
        built = provider.build(case)
        assert not torch.allclose(built.loop(None), built.loop(case.noise), atol=1e-2), provider.name
    case.folder.cleanup()


def test_finished_images_are_on_the_host(case: Case) -> None:
    pixels = Ours("eager", "float32").build(case).finish()
    assert isinstance(pixels, torch.Tensor)
    assert (pixels.dtype, pixels.shape, pixels.device) == (torch.uint8, (2, 8, 8, 3), CPU)
    images = Diffusers().build(case).finish()
    assert images.shape == (2, 8, 8, 3)  # type: ignore[attr-defined]
    assert abs(images * 255.0 - pixels.numpy()).max() < 1.0  # type: ignore[operator]


@pytest.mark.slow
def test_the_exported_network_is_the_same_network() -> None:
    """Through ONNX, with labels, in both runtimes, where they are installed."""
    case = Case(load_model("fashion-mnist"), CPU, 2, 2)
    runtimes = [p for p in all_providers(CPU) if p.family in ("openvino", "onnxruntime") and p.dtype == "float32"]
    here = [provider for provider in runtimes if provider.why_not(case) is None]
    if (
        onednn_limit() is not None
    ):  # oneDNN inside of OpenVINO obeys it, and OpenVINO does not: the process would crash
        here = [provider for provider in here if provider.family != "openvino"]
    if not here:
        pytest.skip("neither OpenVINO nor onnxruntime can run here with onnx and onnxscript")
    truth = Diffusers().build(case).evaluate(1)
    for provider in here:
        torch.testing.assert_close(provider.build(case).evaluate(1), truth, rtol=0, atol=1e-4)
    case.folder.cleanup()


def test_published_networks_have_the_published_size() -> None:
    sizes = {name: UNet2DConfig(**{**_COMMON, **config}).parameter_count for name, config in _PUBLISHED.items()}
    assert sizes["cifar10"] == 35_746_307
    assert sizes["celebahq-256"] == 113_673_219


def test_flops_grow_with_the_batch_and_count_the_attention() -> None:
    model = load_model("cifar10")
    attention = 6 * 2 * 2 * 256**2 * 256  # six blocks, two products of 256 tokens with one head of 256 channels
    assert model.flops(2) == 2 * model.flops(1)
    assert model.flops(1) - attention == pytest.approx(12.05e9, rel=0.01)


def test_models_are_the_same_every_time() -> None:
    torch.manual_seed(5)
    first, second = (load_model("tiny").network.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# The headline


def test_headline_rows_agree_and_have_four_times() -> None:
    rows = [r for r in headline_rows(Options(CPU, tiny=True, compiled=False)) if not r.op.startswith("ceiling")]
    assert [(row.op, row.provider) for row in rows] == [
        ("DDPM-10", "notebook loop float32"),
        ("DDPM-10", "stepfusion eager float32"),
        ("DDIM-2", "notebook loop float32"),
        ("DDIM-2", "stepfusion eager float32"),
    ]
    for row in rows:
        assert row.error is None
        assert row.median_ms is not None
        assert row.max_difference is not None
        assert row.max_difference < 1e-4


@pytest.mark.parametrize("ancestral", [True, False])
def test_the_notebook_loop_finds_a_point(ancestral: bool) -> None:
    """Where the network knows that all images are one point, both samplers end at it, whatever the noise."""
    schedule = NoiseSchedule.linear(50, scaled=False)
    point = torch.tensor([0.3, -0.7]).view(1, 2, 1, 1)
    abar = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32)

    def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        a = abar[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * point) / (1 - a).sqrt()

    timesteps = list(range(49, -1, -1 if ancestral else -10))
    notebook = Notebook(network, schedule, timesteps, ancestral=ancestral)
    out = notebook.sample(torch.randn(3, 2, 1, 1), torch.zeros(3, dtype=torch.int64), None)
    torch.testing.assert_close(out, point.expand(3, 2, 1, 1), rtol=0, atol=1e-4)
