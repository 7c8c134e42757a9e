"""Commands with a model directory of a flow: its samplers, its default, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import stepfusion as sf
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.commands.main import main
from stepfusion_testing.tiny_model import CLASS_NAMES, NULL_LABEL, tiny_network

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_pretrained(path, tiny_network(), FLOW, class_names=CLASS_NAMES, null_label=NULL_LABEL)
    return path


def test_sample_takes_the_samplers_of_the_path(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sampler, said in ((None, "euler"), ("heun", "heun"), ("dpmpp_3m", "3m")):
        asked = [] if sampler is None else ["--sampler", sampler]
        out = tmp_path / f"{sampler}.png"
        assert main(["sample", str(model), "-n", "2", "--steps", "3", *asked, "--out", str(out)]) == 0
        assert said in capsys.readouterr().out
        assert out.exists()
    for option, message in (
        (["--sampler", "ddpm"], "stepfusion: sampler must be one of 'ddim', "),
        (
            ["--timesteps", "5,5"],
            "stepfusion: timesteps is an option of a NoiseSchedule, got it with FlowPath(shift 3)",
        ),
        (["--spacing", "leading"], "stepfusion: spacing must be one of 'uniform', "),
    ):
        assert main(["sample", str(model), "-n", "2", *option, "--out", str(tmp_path / "no.png")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(message)
        assert error.count("\n") == 1


def test_a_job_goes_on_with_its_own_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images"
    job = ["generate", str(model), "--format", "npz", "--steps", "3", "--unit", "2", "--out", str(out), "--quiet"]
    assert main([*job, "--num", "4", "--sampler", "heun"]) == 0
    described = json.loads((out / "job.json").read_text())
    engine = sf.Engine.from_pretrained(model, device="cpu")
    assert isinstance(engine.schedule, sf.FlowPath)
    assert described["table"].startswith(f"{engine.table('heun', 3).name}, 5 steps")
    shards = sorted((out / "images").iterdir())
    before = [np.load(shard) for shard in shards]
    shards[1].unlink()
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text(lines[0])
    assert main([*job, "--num", "4", "--sampler", "heun"]) == 0
    for old, shard in zip(before, shards, strict=True):
        new = np.load(shard)
        assert all(np.array_equal(old[name], new[name]) for name in old.files)
    capsys.readouterr()
    assert main([*job, "--num", "4"]) == 1
    assert "table" in capsys.readouterr().err
