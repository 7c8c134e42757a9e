"""Ticks of networks with conditions: further inputs of every lane, and in a guided tick what stands for none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import write_bundle
from stepfusion.export.exporters import exporter
from stepfusion.export.load import ExportedTick, load_tick
from stepfusion.export.manifest import NULL, Manifest
from stepfusion.export.spec_json import model_to_json
from stepfusion.export.tick import InitialNoise
from stepfusion.export.tick_loop import walk
from stepfusion.export.tick_program import check_tick, tick_example, tick_module, tick_program, tick_specs
from stepfusion_testing.condition_networks import condition_engine, mixed_engine, options_of

SMALL = Batch(1, 2, 4)
LOOP = 1e-3  # float32, largest difference of images
SEED, INDEX = torch.tensor([5, 5, -9]), torch.tensor([0, 9, 2**32 - 1])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ExportedTick:
    """A guided tick of the small network, as a program; its bundle says ONNX, and holds none."""
    engine = mixed_engine()
    specs, model = tick_specs(engine, SMALL, guided=True), model_to_json(engine, SMALL)
    manifest = Manifest("onnx", "tick", "any", "float32", *specs, {"torch": "2"}, model, {})
    out, table = tmp_path_factory.mktemp("tick") / "bundle", engine.table("ddim", 4, eta=1.0)
    bundle = write_bundle(out, manifest, lambda folder: None, table=table)
    tick = tick_program(engine, SMALL, guided=True).module()
    return ExportedTick(torch.no_grad()(tick), InitialNoise(engine.shape), bundle)


def expected(engine: sf.Engine, table: sf.StepTable, **options: Any) -> Tensor:
    """What the engine makes of the same seeds and indices."""
    return engine.sample(table=table, seed=[s % (1 << 64) for s in SEED.tolist()], indices=INDEX.tolist(), **options)


def assert_close_to_rounding(images: Tensor, wanted: Tensor) -> None:
    """Nothing holds the images of random weights in [-1, 1]."""
    torch.testing.assert_close(images, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def lanes(engine: sf.Engine, options: dict[str, Any], prefix: str, option: str) -> dict[str, Tensor]:
    """Conditions of a request as inputs [3, ...] of a tick."""
    sizes = {one.name: len(one.shape) for one in engine.spec.conditions}
    given: dict[str, Tensor] = options.get(option, {})
    return {
        prefix + name: value if value.ndim > sizes[name] else value.expand(3, *value.shape)
        for name, value in given.items()
    }


def walked(engine: sf.Engine, table: sf.StepTable, tick: Any, options: dict[str, Any]) -> Tensor:
    inputs, _ = tick_specs(engine, SMALL, guided="guidance" in options, history=table.history)
    start = table.start_scales[0] * InitialNoise(engine.shape)(SEED, INDEX)
    given = {"seed": SEED, "index": INDEX, "guidance": torch.full((3,), options.get("guidance", 1.0))}
    given |= lanes(engine, options, "", "conditions") | lanes(engine, options, NULL, "null_conditions")
    if "labels" in options:
        given["labels"] = torch.tensor(options["labels"])
    return walk(tick, inputs, table, range(len(table)), start, given)


@pytest.mark.parametrize("name", ["stable diffusion", "sdxl", "inpainting", "mixed"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_consumer_gets_the_engines_images(name: str, guided: bool) -> None:
    engine = mixed_engine() if name == "mixed" else condition_engine(name)
    options = options_of(engine)
    if not guided:
        del options["guidance"]
    for sampler in ("ddpm", "dpmpp_2m"):
        table = engine.table(sampler, 4)
        tick = tick_module(engine, guided=guided, history=table.history)
        with torch.no_grad():
            images = walked(engine, table, tick, options)
        assert_close_to_rounding(images, expected(engine, table, **options))


def test_dits_learned_variance_is_in_its_tick() -> None:
    engine = condition_engine("dit", null_label=3)
    options, table = options_of(engine), engine.table("ddpm", 4, variance="learned_range")
    with torch.no_grad():
        images = walked(engine, table, tick_module(engine, guided=True), options)
    assert_close_to_rounding(images, expected(engine, table, **options))


def test_a_program_takes_any_batch(loaded: ExportedTick) -> None:
    engine = mixed_engine()
    for batch in (1, 3):
        example = tick_example(engine, batch, guided=True)
        with torch.no_grad():
            wanted = tick_module(engine, guided=True)(*example)
            torch.testing.assert_close(loaded.tick(*example), wanted, rtol=0, atol=1e-5)


def test_conditions_stand_between_guidance_and_what_rows_keep() -> None:
    engine = mixed_engine(dtype="bfloat16")
    inputs, _ = tick_specs(engine, SMALL, guided=True, history=1)
    names = ["labels", "guidance", "text", "sizes", "null_text", "null_sizes", "history"]
    assert [spec.name for spec in inputs][6:] == names
    assert [spec.dtype for spec in inputs][8:12] == ["float32", "int64", "float32", "int64"]
    for spec, value in zip(inputs, tick_example(engine, 2, guided=True, history=1), strict=True):
        assert spec.dtype == str(value.dtype).removeprefix("torch.")
    alone, _ = tick_specs(engine, SMALL)
    assert [spec.name for spec in alone][6:] == ["labels", "text", "sizes"]


def test_a_loaded_tick_samples_with_conditions(loaded: ExportedTick) -> None:
    engine, table = mixed_engine(), loaded.bundle.table
    assert table is not None
    options = options_of(engine)
    conditions = lanes(engine, options, "", "conditions")
    null = lanes(engine, options, "", "null_conditions")
    given: dict[str, Any] = {"labels": torch.tensor(options["labels"]), "guidance": torch.full((3,), 2.0)}
    images = loaded.sample(SEED, INDEX, **given, conditions=conditions, null_conditions=null)
    torch.testing.assert_close(images, expected(engine, table, **options), rtol=0, atol=LOOP)
    # without null conditions, what is given stands for none as well: the null label alone tells the halves apart
    images = loaded.sample(SEED, INDEX, **given, conditions=conditions)
    del options["null_conditions"]
    torch.testing.assert_close(images, expected(engine, table, **options), rtol=0, atol=LOOP)


def test_conditions_that_are_missing_or_wrong_are_named(loaded: ExportedTick) -> None:
    given: dict[str, Any] = {"labels": torch.tensor([0, 1, 2]), "guidance": torch.full((3,), 2.0)}
    text, sizes = torch.zeros(3, 5, 6), torch.zeros(3, 2, dtype=torch.int64)
    for conditions, message in (
        ({}, r"^the tick needs the condition text; it has text, sizes$"),
        ({"text": text, "sizes": sizes, "y": text}, r"^the tick takes no condition y; it has text, sizes$"),
        ({"text": text[:2], "sizes": sizes}, r"^the tick cannot take a condition: text is float32 \[2, 5, 6\]"),
    ):
        with pytest.raises(sf.ExportError, match=message):
            loaded.sample(SEED, INDEX, **given, conditions=conditions)
    with pytest.raises(sf.ExportError, match=r"^the tick takes no condition y; it has text, sizes$"):
        loaded.sample(SEED, INDEX, **given, conditions={"text": text, "sizes": sizes}, null_conditions={"y": text})


def test_guidance_needs_a_null_label_or_conditions() -> None:
    engine = condition_engine("stable diffusion")
    check_tick(engine, engine.table("ddim", 3), True)
    with pytest.raises(
        sf.ExportError, match=r"^a guided tick needs a null label or conditions, and the model has none$"
    ):
        check_tick(condition_engine("dit", null_label=None), engine.table("ddim", 3), True)


def test_the_page_of_the_bundle_names_the_conditions(loaded: ExportedTick) -> None:
    page = (loaded.bundle.path / "README.md").read_text()
    assert '"text": numpy.zeros((len(index), 5, 6), numpy.float32),' in page
    assert '"null_sizes": numpy.zeros((len(index), 2), numpy.int64),' in page
    assert (
        'conditions={"text": text, "sizes": sizes}, null_conditions={"text": null_text, "sizes": null_sizes}' in page
    )
    assert "The inputs whose names begin with `null_` stand for none of them" in page


@pytest.mark.soak
def test_the_page_of_an_onnx_tick_runs_without_stepfusion(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    engine, folder = mixed_engine(), tmp_path / "bundle"
    table = engine.table("ddim", 4, eta=1.0)
    exporter("onnx")(engine, folder, kind="tick", guided=True, batch=SMALL, table=table)
    page = (folder / "README.md").read_text()
    script = page.partition("```python\n")[2].partition("```")[0]
    script += "\nimport sys; assert 'torch' not in sys.modules; numpy.save(sys.argv[1], x)"
    out = tmp_path / "images.npy"
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=folder, check=True)
    zeros = {"text": torch.zeros(5, 6), "sizes": torch.zeros(2, dtype=torch.int64)}
    images = engine.sample(4, table, labels=0, conditions=zeros)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), images, rtol=0, atol=LOOP)


@pytest.mark.soak
@pytest.mark.parametrize("form", ["onnx", "aoti"])
@pytest.mark.parametrize("name", ["sdxl", "dit", "mixed"])
def test_networks_in_every_format_give_the_engines_images(form: str, name: str, tmp_path: Path) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    engine = mixed_engine() if name == "mixed" else condition_engine(name, null_label=3 if name == "dit" else None)
    table, options = engine.table("ddim", 4), options_of(engine)
    exporter(form)(engine, tmp_path / "bundle", kind="tick", guided=True, batch=SMALL, table=table)
    given: dict[str, Any] = {"labels": torch.tensor(options["labels"])} if "labels" in options else {}
    if engine.spec.conditions:
        given["conditions"] = lanes(engine, options, "", "conditions")
        given["null_conditions"] = lanes(engine, options, "", "null_conditions")
    images = load_tick(tmp_path / "bundle").sample(SEED, INDEX, guidance=torch.full((3,), 2.0), **given)
    torch.testing.assert_close(images, expected(engine, table, **options), rtol=0, atol=LOOP)
