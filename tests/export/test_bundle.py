"""A bundle is whole and untouched, or nothing in it is opened."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepfusion as sf
from stepfusion.export import bundle as bundles
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import read_bundle, sha256, write_bundle
from stepfusion.export.environment import check_runs_here
from stepfusion.export.load import load_network
from stepfusion.export.manifest import Manifest, Tensorspec
from stepfusion.export.spec_json import ModelEntries, batch_from_json, model_to_json, spec_from_json
from stepfusion.export.table_json import read_table, table_to_json
from stepfusion.networks import ADMUNet, ADMUNetConfig, ContextUNet, DiT, UNet2D, UNet2DCondition, UNet2DConfig
from stepfusion_testing.condition_networks import condition_network
from stepfusion_testing.exports import cpu_engine
from stepfusion_testing.networks import smooth, tiny_unet


def manifest(engine: sf.Engine, **changes: Any) -> Manifest:
    image = ("batch", *engine.shape)
    made = Manifest(
        format="onnx",
        kind="network",
        device="any",
        dtype="float32",
        inputs=(Tensorspec("x", "float32", image), Tensorspec("timesteps", "int64", ("batch",))),
        outputs=(Tensorspec("out", "float32", image),),
        versions={"torch": "2.13.0+cpu"},
        model=model_to_json(engine, Batch(1, 2, 4)),
        files={},
    )
    return replace(made, **changes)


def artefact(folder: Path) -> str:
    (folder / "sub").mkdir()
    (folder / "sub" / "weights.bin").write_bytes(b"weights")
    return "A note of the export."


@pytest.fixture
def written(engine: sf.Engine, tmp_path: Path) -> Path:
    out = tmp_path / "bundle"
    write_bundle(out, manifest(engine), artefact, table=engine.table("ddpm", clip=None))
    return out


def test_what_is_written_is_read_back_to_the_bit(engine: sf.Engine, written: Path) -> None:
    table, read = engine.table("ddpm", clip=None), read_bundle(written)
    assert read.table is not None
    assert np.isinf(table.column("clip")).all()
    for name in ("coefficients", "timesteps", "next_row"):
        np.testing.assert_array_equal(getattr(read.table, name), getattr(table, name))
    assert (read.table.name, read.table.prediction, read.table.starts) == (table.name, table.prediction, table.starts)
    assert read.table.schedule == engine.schedule
    files = {"sub/weights.bin", "table.json", "README.md"}
    assert read.manifest == manifest(engine, files={name: sha256(written / name) for name in files})
    assert "A note of the export." in (written / "README.md").read_text()


def _with_columns(written: Path, table: sf.StepTable, count: int) -> Path:
    """The file of a table with its first ``count`` columns alone, as earlier versions wrote it."""
    given = json.loads(table_to_json(table))
    given["columns"] = given["columns"][:count]
    given["coefficients"] = [row[:count] for row in given["coefficients"]]
    path = written / "older.json"
    path.write_text(json.dumps(given))
    return path


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_tables_of_14_columns_are_read_as_they_were_meant(engine: sf.Engine, tmp_path: Path, sampler: str) -> None:
    """Nothing is scaled, and a multistep solver keeps the x0 that the next row reads."""
    table = engine.table(sampler, 5)
    read = read_table(_with_columns(tmp_path, table, 14), engine.schedule)
    np.testing.assert_array_equal(read.coefficients, table.coefficients)
    assert read.history == table.history == (sampler == "dpmpp_2m")
    assert (read.column("net_scale") == 1).all()


@pytest.mark.parametrize("count", [0, 9, 13, 15, 20])
def test_tables_of_other_columns_are_refused(engine: sf.Engine, tmp_path: Path, count: int) -> None:
    path = _with_columns(tmp_path, engine.table(steps=3), count)
    with pytest.raises(sf.ExportError, match=r"older.json cannot be used: columns are .*; accepted are \["):
        read_table(path, engine.schedule)


def test_an_earlier_table_with_a_longer_row_is_refused(engine: sf.Engine, tmp_path: Path) -> None:
    path = _with_columns(tmp_path, engine.table(steps=3), 14)
    given = json.loads(path.read_text())
    given["coefficients"][1].append(1.0)
    path.write_text(json.dumps(given))
    with pytest.raises(sf.ExportError, match=r"row 1 of coefficients must have 14 entries, got 15$"):
        read_table(path, engine.schedule)


def test_the_spec_of_a_model_comes_back(engine: sf.Engine, written: Path) -> None:
    model = read_bundle(written).manifest.model
    spec = spec_from_json(model)
    assert spec == engine.spec
    for name in ("shape", "num_classes", "null_label", "class_names", "prediction", "schedule", "options"):
        assert getattr(spec, name) == getattr(engine, name), name
    assert batch_from_json(model) == Batch(1, 2, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"variance": "learned_range", "spacing": "leading", "steps_offset": 0, "clip": 1.0},
        {"clip": None, "threshold": 0.995, "sample_max_value": 2.0},
        {"spacing": "trailing", "steps_offset": 1, "final_alpha_cumprod": 0.9999, "compat": "diffusers"},
        {"lambda_min_clipped": -5.1, "lower_order_final": True, "rederive_eps": True, "eta": 0.5},
    ],
)
def test_options_of_checkpoints_come_back(options: dict[str, Any]) -> None:
    engine = cpu_engine(tiny_unet(), options=options)
    assert spec_from_json(model_to_json(engine)) == engine.spec


def test_what_is_written_is_what_is_returned(engine: sf.Engine, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    bundle, read = write_bundle(out, manifest(engine), artefact, table=engine.table("ddim", 3)), read_bundle(out)
    assert (bundle.manifest, bundle.path) == (read.manifest, out)
    assert bundle.table is not None
    assert read.table is not None
    assert bundle.table.digest == read.table.digest


def test_an_export_and_its_loading_hash_each_file_once(
    engine: sf.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(bundles, "sha256", lambda path: hashed.append(path.name) or sha256(path))  # type: ignore[func-returns-value]
    bundle = write_bundle(tmp_path / "bundle", manifest(engine), artefact, table=engine.table("ddim", 3))
    assert sorted(hashed) == ["README.md", "table.json", "weights.bin"]
    with pytest.raises(sf.ExportError, match=r"^the package|cannot run model.onnx"):
        load_network(bundle)  # what was just written needs no second look
    assert len(hashed) == 3
    with pytest.raises(sf.ExportError, match=r"^the package|cannot run model.onnx"):
        load_network(bundle.path)
    assert sorted(hashed[3:]) == sorted(hashed[:3])


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[dict[str, Any]], Any]]] = {
    "UNet2D": (tiny_unet, lambda config: UNet2D(UNet2DConfig.from_dict(config))),
    "ContextUNet": (lambda: ContextUNet(1, 8, 5, 8, 50), ContextUNet.from_config),
    "UNet2DCondition": (lambda: condition_network("everything"), UNet2DCondition.from_config),
    "DiT": (lambda: condition_network("dit"), DiT.from_config),
    "ADMUNet": (
        lambda: ADMUNet(ADMUNetConfig(8, 32, 1, channel_mult=(1, 1), attention_resolutions=(), num_heads=1)),
        lambda config: ADMUNet(ADMUNetConfig(**{k: v for k, v in config.items() if not k.startswith("_")})),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_manifest_says_what_the_network_was_built_from(name: str) -> None:
    make, again = NETWORKS[name]
    engine = cpu_engine(make())
    written = model_to_json(engine)
    read = ModelEntries.model_validate_json(json.dumps(written)).model_dump(exclude_unset=True)
    assert read == written, "it is compared with what is read back"
    shapes = [(key, tensor.shape) for key, tensor in engine.network.state_dict().items()]
    assert [(key, tensor.shape) for key, tensor in again(written["network"]).state_dict().items()] == shapes
    assert len(written["network"]) > 4


def test_a_manifest_names_the_class_of_any_other_network() -> None:
    assert model_to_json(cpu_engine(smooth, shape=(1, 8, 8)))["network"] == {"_class_name": "function"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_export_leaves_nothing(
    engine: sf.Engine, tmp_path: Path, failure: type[BaseException]
) -> None:
    def build(folder: Path) -> None:
        artefact(folder)
        raise failure

    with pytest.raises(failure):
        write_bundle(tmp_path / "bundle", manifest(engine), build)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_stopped_while_it_is_verified_leaves_nothing(
    engine: sf.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "read_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "bundle", manifest(engine), artefact)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_before_any_work(engine: sf.Engine, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        raise AssertionError("work was done")

    with pytest.raises(sf.ExportError, match=r"^out must be a directory that does not exist yet, and .+ exists$"):
        write_bundle(tmp_path, manifest(engine), build)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(sf.ExportError, match=r"dangling exists$"):
        write_bundle(tmp_path / "dangling", manifest(engine), build)
    with pytest.raises(sf.ExportError, match=r"is not a directory$"):
        write_bundle(tmp_path / "nowhere" / "bundle", manifest(engine), build)


def test_an_artefact_may_not_take_a_name_of_the_bundle(engine: sf.Engine, tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "table.json").write_text("{}")

    with pytest.raises(sf.ExportError, match=r"^the onnx export wrote table.json"):
        write_bundle(tmp_path / "bundle", manifest(engine), build)


def test_a_manifest_that_json_cannot_hold_is_not_written(engine: sf.Engine, tmp_path: Path) -> None:
    known = model_to_json(engine)
    for change, message in (
        ({"shape": (1, 8, 8)}, r"reads back as another manifest"),
        ({"options": {"clip": math.inf}}, r"not JSON compliant"),
        ({"num_classes": "all"}, r"manifest.json: model.num_classes: Input should be a valid integer, got 'all'$"),
    ):
        with pytest.raises((sf.ExportError, ValueError), match=message):
            write_bundle(tmp_path / "bundle", manifest(engine, model={**known, **change}), artefact)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "device", "dtype", "message"),
    [
        ({"device": "cuda"}, "cpu", "float32", r"was made for cuda, and device is cpu$"),
        ({"device": "cpu"}, "cuda:1", "float32", r"was made for cpu, and device is cuda:1$"),
        ({}, "cpu", "bfloat16", r"has a float32 network, and dtype is bfloat16$"),
        (
            {"format": "aoti", "versions": {"torch": "1.0.0"}},
            "cpu",
            "float32",
            r"was made for torch 1.0.0, and torch here is 2\.",
        ),
        (
            {"format": "aoti", "versions": {"platform": "plan9-vax"}},
            "cpu",
            "float32",
            r"was made for platform plan9-vax, and platform here is \w+-\w+$",
        ),
        (
            {"format": "tensorrt", "device": "any", "versions": {"compute_capability": "1.0 1.1"}},
            "cpu",
            "float32",
            r"was made for compute capability 1.0 1.1, and compute capability here is none$",
        ),
        (
            {"format": "tensorrt-rtx", "device": "any", "versions": {"tensorrt-rtx": "0.0.1"}},
            "cpu",
            "float32",
            r"was made for tensorrt-rtx 0.0.1, and tensorrt-rtx here is ",
        ),
    ],
)
def test_an_artefact_for_somewhere_else_is_refused(
    engine: sf.Engine, changes: dict[str, Any], device: str, dtype: str, message: str
) -> None:
    with pytest.raises(sf.ExportError, match=message):
        check_runs_here(manifest(engine, **changes), device=device, dtype=dtype)


def test_an_artefact_that_depends_on_no_version_runs_with_any(engine: sf.Engine) -> None:
    check_runs_here(manifest(engine, versions={"torch": "1.0.0"}), device="cpu", dtype="float32")
