"""``stepfusion export``: bundles from the command line, and what it refuses before any work."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import stepfusion as sf
from stepfusion.commands import export as command
from stepfusion.commands.export import add_export_arguments, read_batch, run_export
from stepfusion.export.batch import DYNAMIC, Batch
from stepfusion.export.bundle import read_bundle
from stepfusion_testing.tiny_model import save_tiny_model


def export(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    return run_export(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_model_is_exported_in_one_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    out = tmp_path / "bundle"
    options = ("--batch-range", "1:2:4", "--sampler", "ddim", "--steps", 7, "--eta", 0.5)
    assert export(model, "--format", "onnx", "--out", out, *options) == 0
    bundle = read_bundle(out)
    assert bundle.table is not None
    assert (len(bundle.table), bundle.table.stochastic) == (7, True)
    assert bundle.manifest.model["batch"] == [1, 2, 4]
    assert bundle.manifest.model["class_names"] == ["Cat", "Dog", "T-shirt/top"]
    assert capsys.readouterr().out.startswith(f"{out}: float32 network as onnx, 3 files, ")


@pytest.mark.parametrize(
    ("options", "timesteps"),
    [(("--steps", 2, "--spacing", "trailing"), [99, 49]), (("--timesteps", "2,1"), [50, 49, 0])],
    ids=str,
)
def test_the_table_has_the_timesteps_that_were_asked_for(
    options: tuple[Any, ...], timesteps: list[int], model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    assert export(model, "--format", "onnx", "--batch", 1, "--out", tmp_path / "bundle", "--quiet", *options) == 0
    table = read_bundle(tmp_path / "bundle").table
    assert table is not None
    assert table.timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "0"), r"^--batch must be a number from 1 or 'dynamic', got '0'$"),
        (("--batch", "many"), r"^--batch must be a number from 1 or 'dynamic', got 'many'$"),
        (("--batch", "2", "--batch-range", "1:2:3"), r"^--batch-range is for --batch dynamic, got --batch 2$"),
        (("--batch-range", "1:2"), r"^--batch-range must be LOW:BEST:HIGH, as 1:8:64, got '1:2'$"),
        (
            ("--batch-range", "4:2:8"),
            r"^--batch-range must have 1 <= LOW <= BEST <= HIGH and LOW < HIGH, got '4:2:8'$",
        ),
        (
            ("--format", "openvino", "--kind", "tick"),
            r"^the format openvino does not carry a tick; onnx and aoti do$",
        ),
        (("--strip-weights",), r"^--strip-weights is an option of --format tensorrt and tensorrt-rtx, got onnx$"),
        (("--dry-run",), r"^--dry-run is an option of --format torch-tensorrt, got onnx$"),
        (("--guided",), r"^--guided is an option of --kind tick, got --kind network$"),
        (("--server-backend", "python"), r"^--server-backend is an option of --format triton-server, got onnx$"),
        (("--device", "cuda"), r"^the format onnx is written on cpu, got --device cuda$"),
        (
            ("--sampler", "ddpm", "--eta", "1"),
            r"^--eta is an option of --sampler ddim, euler_ancestral, .* and flow_sde, got --sampler ddpm$",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(command.Engine, "from_pretrained", work)
    with pytest.raises((ValueError, sf.ExportError), match=message):
        export("fashion-mnist", "--format", "onnx", "--out", tmp_path / "bundle", *arguments)
    with pytest.raises(sf.ExportError, match=r"^out must be a directory that does not exist yet, and .+ exists$"):
        export("fashion-mnist", "--format", "onnx", "--out", tmp_path)
    with pytest.raises(ValueError, match=r"^--out is needed: "):
        export("fashion-mnist", "--format", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        export("fashion-mnist", "--format", "caffe", "--out", tmp_path / "bundle")
    assert "invalid choice: 'caffe'" in capsys.readouterr().err


def test_batches_are_read() -> None:
    assert read_batch("dynamic") == DYNAMIC
    assert read_batch("dynamic", "2:3:9") == Batch(2, 3, 9)
    assert read_batch("5") == Batch.fixed(5)
