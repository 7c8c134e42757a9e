"""A tick as ONNX, in onnxruntime: the engine's noise bit for bit, and so its images."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.commands.export import add_export_arguments, run_export
from stepfusion.export import tick_program
from stepfusion.export.batch import Batch
from stepfusion.export.load import ExportedTick, load_network, load_tick
from stepfusion.export.runtimes import Runtime
from stepfusion.export.tick_program import compare_tick
from stepfusion.export.to_onnx import INITIAL_NOISE, MODEL, export_onnx
from stepfusion.kernels import COLUMNS, philox, reference
from stepfusion_testing.aoti_bundle import consume
from stepfusion_testing.tiny_model import NULL_LABEL, SCHEDULER, save_tiny_model, tiny_network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SEEDS, INDICES = torch.tensor([0, -1, 1 << 62, -5, 7]), torch.tensor([0, 1, 2**32 - 1, 9, 4096])
LOOP = 1e-3  # float32, largest difference of images


def make(**arguments: Any) -> sf.Engine:
    """The engine of the model that :func:`save_tiny_model` writes."""
    given = {
        "device": "cpu",
        "dtype": "float32",
        "network": "eager",
        "backend": "reference",
        "null_label": NULL_LABEL,
    }
    schedule, prediction = sf.NoiseSchedule.from_config(SCHEDULER), SCHEDULER["prediction_type"]
    return sf.Engine(tiny_network(), schedule, prediction=prediction, **{**given, **arguments})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ExportedTick:
    """The tiny network's guided tick as the command writes it, with the table of a DDIM that draws noise."""
    folder = tmp_path_factory.mktemp("tick")
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    model = save_tiny_model(folder / "tiny")
    options = (
        f"--format onnx --kind tick --guided --batch-range 1:2:8 --eta 1 --steps 5 --quiet --out {folder}/bundle"
    )
    assert run_export(parser.parse_args([str(model), *options.split()])) == 0
    return load_tick(folder / "bundle", "cpu")


def test_the_noise_is_the_kernels_bit_for_bit(loaded: ExportedTick) -> None:
    nothing, shape = torch.zeros_like(SEEDS), (1, 8, 8)
    expected = reference.normal(SEEDS, INDICES, nothing, shape, philox.STREAM_INITIAL)
    assert torch.equal(loaded.initial_noise(SEEDS, INDICES), expected)
    only_noise = torch.zeros(1, len(COLUMNS))
    only_noise[0, [COLUMNS.index(name) for name in ("sigma", "net_scale")]] = 1.0
    state, timesteps, scale = torch.zeros(5, *shape), torch.tensor([77]), torch.ones(5)
    z = loaded.tick(state, nothing, only_noise, timesteps, SEEDS, INDICES, nothing, scale)
    assert torch.equal(z, reference.normal(SEEDS, INDICES, torch.full_like(SEEDS, 77), shape))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 7), ("ddpm", 12)])
def test_a_consumer_gets_the_engines_images(sampler: str, steps: int, guidance: float, loaded: ExportedTick) -> None:
    """With tables of any length and batches of any size, those of the bundle and others."""
    engine, indices = make(), [0, 7, 4096]
    table, labels = engine.table(sampler, steps), torch.tensor([0, 1, 2])
    scale = torch.full((3,), guidance)
    images = consume(loaded.tick, loaded.initial_noise, table, 5, indices, labels, scale)
    expected = engine.sample(table=table, seed=5, indices=indices, labels=labels, guidance=guidance)
    torch.testing.assert_close(images, expected, rtol=0, atol=LOOP)
    other = consume(loaded.tick, loaded.initial_noise, table, 6, indices, labels, scale)
    assert (other - expected).abs().max() > 0.1  # what another seed gives


@pytest.mark.soak
def test_the_bundled_model_gives_the_engines_pixels(tmp_path: Path) -> None:
    engine = sf.Engine.from_pretrained(
        "fashion-mnist", device="cpu", dtype="float32", backend="reference", network="eager"
    )
    export_onnx(engine, tmp_path / "bundle", kind="tick", batch=Batch.fixed(2), table=engine.table(steps=50))
    loaded, labels = load_tick(tmp_path / "bundle"), torch.tensor([0, 7])
    assert loaded.bundle.table is not None
    images = consume(loaded.tick, loaded.initial_noise, loaded.bundle.table, 5, range(2), labels)
    expected = engine.sample(2, steps=50, seed=5, labels=labels)
    torch.testing.assert_close(images, expected, rtol=0, atol=LOOP)
    assert torch.equal(*((x * 127.5 + 127.5).clamp(0, 255).round() for x in (images, expected)))


def test_the_files_say_what_the_manifest_says(loaded: ExportedTick) -> None:
    path, manifest = loaded.bundle.path, loaded.bundle.manifest
    assert set(manifest.files) == {MODEL, INITIAL_NOISE, "table.json", "README.md"}
    assert (manifest.format, manifest.kind, manifest.device) == ("onnx", "tick", "any")
    values = onnx.load(path / MODEL).graph.input
    shapes = [tuple(s.dim_param or s.dim_value for s in value.type.tensor_type.shape.dim) for value in values]
    assert [value.name for value in values] == [spec.name for spec in manifest.inputs]
    assert shapes == [spec.shape for spec in manifest.inputs]
    assert ("rows", len(COLUMNS)) in shapes
    noise = onnx.load(path / INITIAL_NOISE).graph
    assert [value.name for value in (*noise.input, *noise.output)] == ["seed", "index", "x"]
    page = (path / "README.md").read_text()
    assert re.search(r"state by \S+ after 5 row\(s\) of .*; the initial noise is bit for bit the engine's", page)
    for file in (MODEL, INITIAL_NOISE):
        assert str(Path(sf.__file__).parent).encode() not in (path / file).read_bytes()


def test_the_page_of_the_bundle_runs_without_stepfusion(loaded: ExportedTick) -> None:
    script = (loaded.bundle.path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    script += "\nimport sys; assert 'torch' not in sys.modules; numpy.save(sys.argv[1], x)"
    out = loaded.bundle.path.parent / "images.npy"
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=loaded.bundle.path, check=True)
    engine = make()
    expected = engine.sample(4, loaded.bundle.table, labels=0)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected, rtol=0, atol=LOOP)


@pytest.mark.soak
def test_the_command_writes_a_tick_of_a_fixed_batch(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    model, out = save_tiny_model(tmp_path / "tiny"), tmp_path / "bundle"
    options = ["--format", "onnx", "--kind", "tick", "--batch", "2", "--steps", "3", "--quiet", "--out", str(out)]
    assert run_export(parser.parse_args([str(model), *options])) == 0
    loaded, engine = load_tick(out), sf.Engine.from_pretrained(model, device="cpu", backend="reference")
    assert [spec.shape[0] for spec in loaded.bundle.manifest.inputs] == [2, 2, "rows", "rows", 2, 2, 2]
    table, labels = engine.table(steps=3), torch.tensor([2, 0])
    images = consume(loaded.tick, loaded.initial_noise, table, 1, range(2), labels)
    torch.testing.assert_close(images, engine.sample(2, table, seed=1, labels=labels), rtol=0, atol=LOOP)


@pytest.mark.soak
def test_half_networks_keep_a_float32_state(tmp_path: Path) -> None:
    engine = make(dtype="float16")
    export_onnx(engine, tmp_path / "half", kind="tick", batch=Batch.fixed(2), table=engine.table(steps=4))
    loaded = load_tick(tmp_path / "half")
    assert loaded.bundle.manifest.dtype == "float16"
    images = consume(loaded.tick, loaded.initial_noise, engine.table(steps=4), 0, range(2), torch.tensor([0, 1]))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, engine.sample(2, steps=4, labels=[0, 1]), rtol=0, atol=0.05)


@pytest.mark.parametrize("wrong", ["tick", "initial noise", "loop"])
def test_a_tick_that_computes_something_else_is_refused(
    wrong: str, loaded: ExportedTick, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(run: Runtime, by: float) -> Runtime:
        return lambda *inputs: run(*inputs) + by

    if wrong == "loop":  # each step alone is near enough
        monkeypatch.setattr(tick_program, "check_close", lambda *_: 0.0)
    engine, batch = make(), Batch(1, 2, 8)
    table = engine.table(steps=3)
    tick, noise = off(loaded.tick, (wrong != "initial noise") * 0.01), off(loaded.initial_noise, 0.01)
    same = compare_tick(engine, batch, table, loaded.tick, loaded.initial_noise, "ONNX", guided=True)
    assert "after 3 row(s)" in same
    said = (
        r"after 3 rows; 0.001 is allowed$" if wrong == "loop" else rf"^the ONNX {wrong} differs from the network by 0"
    )
    with pytest.raises(sf.ExportError, match=said):
        compare_tick(engine, batch, table, tick, noise, "ONNX", guided=True)


def test_what_cannot_be_loaded_as_a_tick_is_refused(loaded: ExportedTick, onnx_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(sf.ExportError, match=r"holds a network as onnx; a tick as onnx, aoti can be loaded$"):
        load_tick(onnx_bundle)
    with pytest.raises(sf.ExportError, match=r"holds a tick as onnx; a network as onnx, .* can be loaded$"):
        load_network(loaded.bundle)
    copy = Path(shutil.copytree(loaded.bundle.path, tmp_path / "copy"))
    with (copy / INITIAL_NOISE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(sf.ExportError, match=r"initial_noise.onnx has SHA-256 \w+; the manifest says \w+$"):
        load_tick(copy)
