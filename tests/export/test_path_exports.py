"""Exports of networks on EDM's path and on the straight one, and ticks of samplers that keep a history."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion.export import export_program
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import read_bundle, write_bundle
from stepfusion.export.load import load_tick
from stepfusion.export.manifest import MANIFEST, Manifest
from stepfusion.export.program import example_inputs
from stepfusion.export.spec_json import model_to_json
from stepfusion.export.tick import InitialNoise, predict
from stepfusion.export.tick_loop import outputs_of, table_inputs, walk
from stepfusion.export.tick_program import (
    check_tick,
    compare_tick,
    initial_noise_program,
    tick_example,
    tick_module,
    tick_program,
    tick_specs,
)
from stepfusion.export.to_aoti import export_aoti
from stepfusion.kernels import COLUMNS
from stepfusion.kernels.coefficients import HISTORY
from stepfusion.samplers.registry import samplers_of
from stepfusion_testing.path_networks import FLOW, SHAPE, SIGMA, path_engine
from stepfusion_testing.twins import assert_same_bits

COSINE = sf.NoiseSchedule.cosine(100)
PATHS = [SIGMA, FLOW, COSINE]
NAMES = ["sigma", "flow", "cosine"]
SEED, INDEX = torch.tensor([5, 5, -9]), torch.tensor([0, 9, 2**32 - 1])
LABELS = torch.tensor([0, 2, 1])
LOOP = 1e-3  # float32, largest difference of images


def sampled(engine: sf.Engine, table: sf.StepTable, **options: object) -> Tensor:
    """What the engine makes of the same seeds and indices."""
    seeds = [seed % (1 << 64) for seed in SEED.tolist()]
    return engine.sample(table=table, seed=seeds, indices=INDEX.tolist(), **options)  # type: ignore[arg-type]


def walked(
    tick: object, engine: sf.Engine, table: sf.StepTable, guided: bool = False, history: int | None = None
) -> Tensor:
    """What a consumer makes of a tick, whose history has so many entries; as many as the table uses by default."""
    start = table.start_scales[0] * InitialNoise(engine.shape)(SEED, INDEX)
    inputs, _ = tick_specs(
        engine, Batch(1, 2, 8), guided=guided, history=table.history if history is None else history
    )
    lanes = {"seed": SEED, "index": INDEX, "labels": LABELS, "guidance": torch.tensor([1.0, 2.5, 0.0])}
    return walk(tick, inputs, table, range(len(table)), start, lanes)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_consumer_gets_the_engines_images_of_every_sampler(path: sf.Path) -> None:
    engine = path_engine(path, 3)
    for sampler in samplers_of(path):
        table = engine.table(sampler, 5)
        tick = tick_module(engine, guided=True, history=table.history)
        images = walked(tick, engine, table, guided=True)
        expected = sampled(engine, table, labels=LABELS, guidance=[1.0, 2.5, 0.0])
        assert_same_bits(sampler, images, expected)


def test_churn_is_in_the_first_state_and_in_the_rows() -> None:
    engine = path_engine(SIGMA)
    table = engine.table("heun", 4, s_churn=10.0, s_noise=1.1)
    assert table.start_scales[0] > 80
    assert_same_bits("churn", walked(tick_module(engine, history=1), engine, table), sampled(engine, table))


# The quick one has every further input: what the network is told, its scale, and a history of two entries.
@pytest.mark.parametrize(
    ("path", "sampler"),
    [
        (SIGMA, "dpmpp_3m"),
        pytest.param(COSINE, "dpmpp_2m", marks=pytest.mark.soak),
        pytest.param(FLOW, "heun", marks=pytest.mark.soak),
    ],
)
def test_a_program_of_any_batch_and_any_table(path: sf.Path, sampler: str) -> None:
    engine = path_engine(path, 3)
    batch, history = Batch(1, 2, 8), engine.table(sampler, 6).history
    tick = tick_program(engine, batch, guided=True, history=history).module()
    noise = initial_noise_program(engine, batch).module()
    assert torch.equal(noise(SEED, INDEX), InitialNoise(SHAPE)(SEED, INDEX))
    for steps in (3, 11):
        table = engine.table(sampler, steps)
        with torch.no_grad():
            images = walked(tick, engine, table, guided=True, history=history)
        expected = sampled(engine, table, labels=LABELS, guidance=[1.0, 2.5, 0.0])
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    assert "after 6 row(s)" in compare_tick(
        engine, batch, engine.table(sampler, 6).last(6), tick, noise, "program", guided=True
    )


def test_a_history_that_no_row_reads_may_hold_anything() -> None:
    engine = path_engine(SIGMA)
    table = engine.table("heun", 3)
    x, _, *shared, _ = tick_example(engine, 2, history=1)
    values = table_inputs(table, x.device)
    shared[0:2] = values["coefficients"], values["timesteps"]
    shared[4:6] = values["told"], values["in_scale"]
    tick = tick_module(engine, history=1)
    row, nothing = torch.tensor([0, -1]), torch.full((2, 1, *SHAPE), torch.nan)
    moved, kept = tick(x, row, *shared, nothing)
    clean, first = tick(x, row, *shared, torch.zeros_like(nothing))
    assert torch.equal(moved, clean)
    assert torch.equal(kept[0], first[0])  # the row keeps its x0
    assert kept[1].isnan().all()  # a parked lane keeps what it had
    assert torch.equal(moved[1], x[1])
    corrected, _ = tick(x, torch.tensor([1, 1]), *shared, nothing)
    assert corrected.isnan().all()  # the corrector reads it


def test_a_table_is_put_on_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    put = sf.StepTable.on
    monkeypatch.setattr(sf.StepTable, "on", lambda *given: seen.append(given) or put(*given))
    engine = path_engine(FLOW)
    walked(lambda x, *_: x, engine, engine.table("euler", 3))
    assert len(seen) == 1


def test_a_row_that_uses_more_history_than_a_tick_keeps_gives_nan() -> None:
    engine = path_engine(FLOW)
    columns = engine.table("dpmpp_3m", 8).on(torch.device("cpu")).coefficients
    x = torch.randn(8, *SHAPE)
    used = columns[:, [COLUMNS.index(name) for name in HISTORY]] != 0
    for entries in (0, 1, 2):
        broken = used[:, entries:].any(1)
        assert broken.any() == (entries < 2)
        x0 = predict(x, x, columns, entries, scaled=True)
        assert torch.equal(x0.isnan().flatten(1).all(1), broken)


def test_a_tick_of_a_schedule_is_called_as_ever() -> None:
    engine = path_engine(COSINE, 3)
    inputs, outputs = tick_specs(engine, Batch.fixed(2), guided=True)
    names = ["x", "row", "coefficients", "timesteps", "seed", "index", "labels", "guidance"]
    assert [spec.name for spec in inputs] == names
    assert [spec.name for spec in outputs] == ["x_next"]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_the_specs_name_what_the_tick_takes_and_returns(path: sf.Path) -> None:
    engine = path_engine(path, 3)
    inputs, outputs = tick_specs(engine, Batch(1, 2, 8), guided=True, history=2)
    example = tick_example(engine, 2, guided=True, history=2)
    returned = outputs_of(tick_module(engine, guided=True, history=2)(*example))
    for specs, values in ((inputs, example), (outputs, returned)):
        for spec, value in zip(specs, values, strict=True):
            assert spec.dtype == str(value.dtype).removeprefix("torch.")
            assert list(value.shape[1:]) == list(spec.shape[1:])
    assert inputs[-1].shape == ("batch", 2, *SHAPE)


def test_what_needs_the_whole_image_is_still_refused() -> None:
    engine = path_engine(SIGMA)
    table = engine.table("heun", 4)
    check_tick(engine, table, False)
    columns = table.coefficients.copy()
    columns[2, COLUMNS.index("rescale")] = 0.5
    with pytest.raises(sf.ExportError, match=r"^a tick has no dynamic thresholding and no rescaled guidance"):
        check_tick(engine, replace(table, coefficients=columns), False)


# Networks


@pytest.mark.parametrize("path", [SIGMA, FLOW], ids=NAMES[:2])
def test_a_program_is_told_floats(path: sf.Path) -> None:
    engine = path_engine(path)
    told = example_inputs(engine, 5)[1]
    assert told.dtype == torch.float32
    assert len(told.unique()) == 5
    module = export_program(engine).module()
    with torch.no_grad():
        assert_same_bits("program", module(*example_inputs(engine, 5)), engine.network(*example_inputs(engine, 5)))


# In onnxruntime


@pytest.mark.parametrize("path", [pytest.param(SIGMA, marks=pytest.mark.soak), FLOW], ids=NAMES[:2])
def test_an_onnx_network_is_an_engine_again(path: sf.Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from stepfusion.export.to_onnx import export_onnx

    engine = path_engine(path, 3)
    bundle = export_onnx(engine, tmp_path / "bundle", table=engine.table("heun", 4))
    assert [spec.dtype for spec in bundle.manifest.inputs] == ["float32", "float32", "int64"]
    back = sf.Engine.from_exported(tmp_path / "bundle", batch=4)
    assert (back.schedule, back.prediction) == (engine.schedule, engine.prediction)
    images = sampled(back, engine.table("heun", 4), labels=LABELS, guidance=2.0)
    expected = sampled(engine, engine.table("heun", 4), labels=LABELS, guidance=2.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=LOOP)


# ONNX writes a fixed batch in half the time; a dynamic one without a history is in test_onnx_tick.py.
@pytest.mark.parametrize(
    ("path", "sampler", "batch"),
    [
        (SIGMA, "dpmpp_3m", Batch.fixed(3)),
        *(
            pytest.param(path, sampler, Batch(1, 2, 8), marks=pytest.mark.soak)
            for path, sampler in (
                (SIGMA, "heun"),
                (FLOW, "dpmpp_3m"),
                (SIGMA, "euler_ancestral"),
                (COSINE, "dpmpp_2m"),
            )
        ),
    ],
)
def test_an_onnx_tick_gives_the_engines_images(path: sf.Path, sampler: str, batch: Batch, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from stepfusion.export.to_onnx import export_onnx

    engine = path_engine(path, 3)
    table = engine.table(sampler, 6)
    export_onnx(engine, tmp_path / "bundle", kind="tick", guided=True, batch=batch, table=table)
    loaded = load_tick(tmp_path / "bundle", "cpu")
    assert len(loaded.bundle.manifest.outputs) == 1 + bool(table.history)
    scale = torch.tensor([1.0, 2.5, 0.0])
    images = loaded.sample(SEED, INDEX, labels=LABELS, guidance=scale)
    expected = sampled(engine, table, labels=LABELS, guidance=scale.tolist())
    torch.testing.assert_close(images, expected, rtol=0, atol=LOOP)
    with pytest.raises(sf.ExportError, match=r"^guidance is missing, and the tick takes it$"):
        loaded.sample(SEED, INDEX, labels=LABELS)
    page = (tmp_path / "bundle" / "README.md").read_text()
    assert re.search(r"the state by \S+ after \d+ row\(s\) of .*; the initial noise is bit for bit", page)
    script = page.partition("```python\n")[2].partition("```")[0]
    script += "\nimport sys; assert 'torch' not in sys.modules; numpy.save(sys.argv[1], x)"
    out = tmp_path / "images.npy"
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=tmp_path / "bundle", check=True)
    alone = engine.sample(min(4, batch.high), table, labels=0)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), alone, rtol=0, atol=LOOP)


# In machine code and in OpenVINO, which carries networks and no ticks


@pytest.mark.soak
@pytest.mark.parametrize(("path", "sampler"), [(SIGMA, "heun"), (FLOW, "dpmpp_3m")], ids=NAMES[:2])
def test_a_compiled_tick_gives_the_engines_images(path: sf.Path, sampler: str, tmp_path: Path) -> None:
    engine = path_engine(path, 3)
    table = engine.table(sampler, 6)
    export_aoti(engine, tmp_path / "bundle", kind="tick", guided=True, batch=Batch(1, 2, 8), table=table)
    scale = torch.tensor([1.0, 2.5, 0.0])
    images = load_tick(tmp_path / "bundle", "cpu").sample(SEED, INDEX, labels=LABELS, guidance=scale)
    expected = sampled(engine, table, labels=LABELS, guidance=scale.tolist())
    torch.testing.assert_close(images, expected, rtol=0, atol=LOOP)
    other = sampled(engine, table, labels=LABELS, guidance=1.0)
    assert (images - other).abs().max() > 10 * LOOP  # what the tick would give without its scales


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino.*")
@pytest.mark.parametrize("path", [SIGMA, FLOW], ids=NAMES[:2])
def test_an_openvino_network_is_an_engine_again(path: sf.Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    from stepfusion.export.to_openvino import export_openvino

    engine = path_engine(path, 3)
    export_openvino(engine, tmp_path / "bundle", batch=Batch(1, 2, 8))
    back = sf.Engine.from_exported(tmp_path / "bundle", batch=4)
    assert (back.schedule, back.prediction) == (engine.schedule, engine.prediction)
    table = engine.table("heun", 4)
    images = sampled(back, table, labels=LABELS, guidance=2.0)
    torch.testing.assert_close(images, sampled(engine, table, labels=LABELS, guidance=2.0), rtol=0, atol=LOOP)


def test_a_bundle_whose_history_does_not_fit_is_refused(tmp_path: Path) -> None:
    engine, batch, out = path_engine(FLOW), Batch.fixed(2), tmp_path / "bundle"
    table = engine.table("heun", 3)
    specs, model = tick_specs(engine, batch, history=table.history), model_to_json(engine, batch)
    manifest = Manifest("onnx", "tick", "any", "float32", *specs, {"torch": "2"}, model, {})
    write_bundle(out, manifest, lambda folder: None, table=table)
    assert read_bundle(out).manifest.inputs == specs[0]
    given = json.loads((out / MANIFEST).read_text())
    for role, entry, message in (
        ("inputs", {"dtype": "int64"}, r"has the input history, int64 \[2, 1, 2, 5, 3\]; accepted is float32"),
        ("inputs", {"shape": [2, 1, 3, 5, 3]}, r"has the input history, float32 \[2, 1, 3, 5, 3\]; accepted is"),
        ("inputs", {"shape": [2, 2, *SHAPE]}, r"accepted is one like the input history$"),
        ("outputs", {"shape": [2, 2, *SHAPE]}, r"accepted is one like the input history$"),
        ("inputs", {"name": "past"}, r"has 2 output\(s\)"),
    ):
        wrong = copy.deepcopy(given)
        wrong[role][-1] |= entry
        (out / MANIFEST).write_text(json.dumps(wrong))
        with pytest.raises(sf.ExportError, match=message):
            read_bundle(out)
