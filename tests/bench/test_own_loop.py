"""The loop of baselines without diffusers: the same images, and a name that says so; models of published figures."""

from typing import Any

import pytest
import torch

from stepfusion.bench import peers
from stepfusion.bench.floors import Floors
from stepfusion.bench.kernel_elementwise import elementwise
from stepfusion.bench.models import PUBLISHED, load_model
from stepfusion.bench.own_loop import OWN, OwnScheduler
from stepfusion.bench.peers import Eager, EagerHalf, Inductor, all_providers
from stepfusion.bench.providers import Case
from stepfusion.bench.race import Race
from stepfusion.networks import ADMUNet, ADMUNetConfig, UNet2DConfig
from stepfusion_testing.cpu_kernels import cpp_contenders

CPU = torch.device("cpu")
FLOORS = Floors((), 1e9, {"float32": 1e12, "bfloat16": 1e12})
CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}


@pytest.fixture
def without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = peers.why_not

    def why_not(*packages: str) -> str | None:
        return "not installed" if "diffusers" in packages else found(*packages)

    for module in ("peers", "kernel_elementwise", "providers", "optional"):
        monkeypatch.setattr(f"stepfusion.bench.{module}.why_not", why_not)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_the_own_steps_are_those_of_diffusers(sampler: str, variance: str, clip: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {**CONFIG, "variance_type": variance, "clip_sample": clip}
    if sampler == "ddim":
        config.pop("variance_type")
    theirs = getattr(diffusers, f"{sampler.upper()}Scheduler").from_config(config)
    ours = OwnScheduler(sampler, config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    a = b = torch.randn(2, 3, 4, 4, generator=generator)
    noise = torch.randn(7, 2, 3, 4, 4, generator=generator)
    with peers._injected(theirs, noise), ours.given(noise):
        for t in ours.timesteps.tolist():
            a, b = ours.step(a.tanh(), t, a).prev_sample, theirs.step(b.tanh(), t, b).prev_sample
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_diffusers")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_without_diffusers_the_baselines_run_in_the_own_loop(sampler: str) -> None:
    case = Case(load_model("tiny"), CPU, 2, 5, sampler)
    names = [provider.name for provider in (Eager(), EagerHalf(), Inductor())]
    assert names == [
        f"{OWN}, {name}" for name in ("eager float32", "eager bfloat16 channels_last", "inductor bfloat16")
    ]
    with Race("compare", case, [p for p in all_providers(CPU) if not p.compiles], FLOORS) as race:
        absent = {row.provider for row in race.absent()}
        rows = {row.provider: row for row in race.loops(1)}
    assert absent == {"diffusers float32", "diffusers bfloat16 channels_last"} | cpp_contenders(absent=True)
    assert f"{OWN}, eager float32" in rows
    assert all(row.error is None and row.median_ms is not None for row in rows.values())


def test_with_diffusers_the_names_are_as_they_were() -> None:
    pytest.importorskip("diffusers")
    assert Eager().name == "eager float32"


def test_whoever_compiles_compiles_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that changes nothing stands for Inductor: whatever the first call is given must fit the weights."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    case = Case(load_model("tiny"), CPU, 2, 2)
    truth = Eager().build(case).evaluate(1)
    built = [p for p in all_providers(CPU) if p.compiles and p.family in ("diffusers", "inductor")]
    assert {provider.dtype for provider in built} == {"float32", "bfloat16"}
    for provider in built:
        allowed = 1e-4 if provider.dtype == "float32" else 0.1
        torch.testing.assert_close(provider.build(case).evaluate(1), truth, rtol=0, atol=allowed)
    case.folder.cleanup()


@pytest.mark.usefixtures("without_diffusers")
def test_without_diffusers_the_steps_have_a_baseline() -> None:
    steps = [work for work in elementwise(CPU, ((2, 3, 4, 4),)) if "step" in work.op]
    assert len(steps) == 4
    for work in steps:
        inputs = work.make()
        own = work.runs[OWN](inputs, True)
        torch.testing.assert_close(own, work.runs["reference"](inputs, True), rtol=0, atol=1e-4)


def test_another_prediction_type_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^the own loop needs a network that predicts epsilon, and it predicts sample"
    ):
        OwnScheduler("ddim", {**CONFIG, "prediction_type": "sample"})


def test_a_network_that_returns_its_variance_runs_beside_the_engine() -> None:
    """guided-diffusion's UNets have no twin in diffusers; theirs are rows that say so."""
    case = Case(load_model("adm-tiny"), CPU, 2, 2)
    with Race("compare", case, [p for p in all_providers(CPU) if not p.compiles], FLOORS) as race:
        absent = {row.provider: row.notes for row in race.absent()}
        rows = [*race.evaluations(1), *race.loops(1)]
    assert absent["diffusers float32"] == "diffusers has no network like adm-tiny"
    assert {row.provider.removeprefix(f"{OWN}, ") for row in rows} >= {"stepfusion eager float32", "eager float32"}
    for row in rows:
        assert row.error is None, row
        assert row.max_difference is not None


@pytest.mark.parametrize(
    ("name", "parameters"), [("adm-64", 295_904_454), ("adm-256", 553_838_086), ("sd-class", None)]
)
def test_models_of_published_figures_have_the_published_size(name: str, parameters: int | None) -> None:
    from stepfusion.bench import models

    assert name in PUBLISHED
    with torch.device("meta"):
        if name in models._ADM:
            network: torch.nn.Module = ADMUNet(ADMUNetConfig(**{**models._ADM_COMMON, **models._ADM[name]}))
            count = sum(parameter.numel() for parameter in network.parameters())
        else:
            count = UNet2DConfig(**{**models._COMMON, **models._PUBLISHED[name]}).parameter_count
    assert count == parameters or (parameters is None and 3e8 < count < 8.6e8)
