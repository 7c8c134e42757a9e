"""What a type checker knows: the names in annotations are those that are registered, and wrong calls are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import stepfusion as sf
from stepfusion import options
from stepfusion.execution.plan import BACKENDS, DTYPES, NETWORK_MODES, TF32
from stepfusion.kernels.coefficients import VARIANCES
from stepfusion.samplers.dpm_solver import SOLVER_TYPES
from stepfusion.samplers.path import ALL_PREDICTIONS
from stepfusion.samplers.predictor_corrector import VARIANTS
from stepfusion.samplers.registry import SAMPLERS, options_of
from stepfusion.samplers.spacing import EVERY_SPACING
from stepfusion.samplers.timesteps import COMPATS

ROOT = Path(__file__).resolve().parents[1]
RIGHT = """
import torch
import stepfusion as sf
from PIL import Image

engine = sf.Engine.from_pretrained("fashion-mnist")
engine.sample(2, sampler="heun", steps=3, spacing="karras", order=2, seed=None, labels=["bag", 3])
engine.sample(image=Image.new("L", (28, 28)), strength=0.5)
engine.sample(image=["a.png", "b.png"], mask=torch.ones(1, 1, 28, 28))
engine.sample(engine.request(4, seed=[1, 2, 3, 4]))
engine.table("ddim", 10, clip=None, eta=0.5)
sf.serving.AsyncEngine(engine).submit(engine.request(4), priority=1)
sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), backend="reference", network="eager", dtype=torch.float32)
"""
WRONG = """
import stepfusion as sf

engine = sf.Engine.from_pretrained("fashion-mnist")
engine.sample(2, sampler="ddmi")
engine.sample(2, stpes=3)
engine.sample(2, spacing="karas")
engine.generate(2, solver_type="midpoints")
engine.sample(2, eta="1")
engine.table("ddmi")
engine.table("ddim", clipp=1.0)
engine.request(2, compat="diffuser")
sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), backend="tritn")
sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), network="compiled")
sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), dtype="bf16")
"""
FIRST_WRONG = 5  # the line of the first wrong call


@pytest.mark.parametrize(
    ("literal", "registered"),
    [
        (options.Sampler, SAMPLERS),
        (options.Spacing, EVERY_SPACING),
        (options.Prediction, ALL_PREDICTIONS),
        (options.Variance, VARIANCES),
        (options.SolverType, SOLVER_TYPES),
        (options.Variant, VARIANTS),
        (options.Compat, [name for name in COMPATS if name is not None]),
        (options.Backend, BACKENDS),
        (options.NetworkMode, NETWORK_MODES),
        (options.DType, ("auto", *DTYPES, TF32)),
    ],
    ids=lambda one: str(one)[:24],
)
def test_names_in_annotations_are_those_that_are_registered(literal: object, registered: object) -> None:
    assert sorted(get_args(literal)) == sorted(registered)  # type: ignore[call-overload]


def test_every_option_of_a_sampler_is_typed_and_is_an_option() -> None:
    taken = {name for sampler in SAMPLERS for name in options_of(sampler)}
    assert set(options.SamplerOptions.__annotations__) == taken
    assert set(options.STEP_OPTIONS) <= taken
    assert set(options.TABLE_OPTIONS) == {"sampler", "steps", "reuse", *options.STEP_OPTIONS}


def test_an_option_of_a_request_is_declared_once() -> None:
    declared = get_type_hints(options.SamplingOptions, include_extras=True)
    assert set(options.TABLE_OPTIONS) <= set(declared)
    for name in options.TABLE_OPTIONS:
        told = options.table_option(name)
        assert told.name == name
        assert len(told.option.text) > 8
        assert told.kind in (int, float, bool, str, list)


@pytest.mark.soak
def test_a_type_checker_finds_wrong_names_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="nothing checks types here")
    package = tmp_path / "package"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation"),
            *("--target", str(package), str(ROOT)),
        ],
        check=True,
        timeout=600,
    )
    found = {}
    for name, text in (("right", RIGHT), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"{name}.py"]
        environment = {"MYPYPATH": str(package), "PATH": ""}
        found[name] = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        ).stdout
    assert "Success" in found["right"], found["right"]
    lines = {int(line.split(":")[1]) for line in found["wrong"].splitlines() if line.startswith("wrong.py:")}
    calls = range(FIRST_WRONG, WRONG.count("\n") + 1)
    assert lines == set(calls), found["wrong"]


def test_public_objects_say_in_one_line_what_they_are() -> None:
    engine = sf.Engine.from_pretrained("fashion-mnist", device="cpu", backend="reference")
    request = engine.request(3, labels=["bag", "coat", "bag"], steps=4, seed=7, guidance=2.0, spacing="trailing")
    event = next(iter(engine.stream(1, steps=2, seed=1)))
    expected = {
        "Engine(1x28x28, v_prediction, cosine, cpu, reference)": engine,
        "Request(3 images, ddim, eta 0, 4 steps, seed 7, labels Bag, Coat, guidance 2.0)": request,
        "Event(step 1 of 2, timestep 999, images [0])": event,
        "Pretrained(UNet2D of 1,509,665 parameters, DDPMScheduler, 10 classes)": sf.load_pretrained("fashion-mnist"),
        "GaussianDiffusion(NoiseSchedule(linear, 100 timesteps, abar 0.999000 to 2.04e-05), epsilon, fixed_small, "
        "clip 1)": sf.GaussianDiffusion(sf.NoiseSchedule.linear(100)),
    }
    assert {repr(one): one for one in expected.values()}.keys() == expected.keys()
    assert repr(engine.spec).startswith("ModelSpec(1x28x28, v_prediction, NoiseSchedule(cosine, 1000 timesteps")
    assert "\n" not in repr(engine.spec)


def test_a_table_shows_itself_in_a_notebook() -> None:
    schedule = sf.NoiseSchedule.linear(100)
    short, long = sf.ddim(schedule, 5)._repr_html_(), sf.ddpm(schedule)._repr_html_()
    assert short.count("<tr>") == 1 + 5
    assert long.count("<tr>") == 1 + 12 + 1
    assert "<th>sigma</th>" in long
    assert "<th>sigma</th>" not in short, "a deterministic table has no column of noise"
    assert "StepTable(ddim, eta 0, 5 rows, epsilon, linear)" in short
