"""A file of EDM's weights is a model like others: for engines, commands and bulk jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import stepfusion as sf
from stepfusion.bulk.checkpoint import read_checkpoint
from stepfusion.commands.main import main
from stepfusion.networks import SongUNet, SongUNetConfig
from stepfusion_testing.twins import assert_same_bits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = SongUNetConfig(
        img_resolution=8, in_channels=3, out_channels=3, label_dim=3, model_channels=16, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,),
    )  # fmt: skip
    weights = {name: value.contiguous() for name, value in SongUNet(config).state_dict().items()}
    save_file(weights, tmp_path / "net.safetensors")
    (tmp_path / "net.json").write_text(json.dumps({"sigma_data": 0.4, "sigma_max": 50.0}))
    return tmp_path / "net.safetensors"


def test_an_engine_walks_edms_path_with_its_network(file: Path) -> None:
    engine = sf.Engine.from_pretrained(file, device="cpu", dtype="float32", network="eager")
    assert engine.schedule == sf.SigmaPath(0.002, 50.0, 0.4)
    assert len(engine.table()) == 35  # Heun's method, 18 steps
    assert (engine.prediction, engine.num_classes, engine.null_label) == ("edm", 4, 3)
    network, table = sf.load_edm(file).network, engine.table("euler", 2)
    labels = torch.tensor([2, 0])
    x = 50 * torch.randn(2, 3, 8, 8)
    start = x
    for sigma, following in ((50.0, 0.002), (0.002, 0.0)):  # Karras et al. 2022, algorithm 1 without its correction
        root = (sigma**2 + 0.4**2) ** 0.5
        told = torch.full((2,), torch.tensor(sigma).log().item() / 4)
        with torch.no_grad():
            denoised = 0.4**2 / root**2 * x + sigma * 0.4 / root * network(x / root, told, labels)
        x = x + (following - sigma) * (x - denoised) / sigma
    torch.testing.assert_close(engine.sample(table=table, start=start, labels=[2, 0]), x, rtol=1e-4, atol=1e-4)


def test_a_command_samples_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "out.png"
    assert main(["sample", str(file), "-n", "2", "--steps", "3", "--labels", "1", "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.mode == "RGB"
    assert main(["sample", str(file), "--sampler", "ddpm", "--out", str(tmp_path / "other.png")]) == 1
    assert "sampler must be one of" in capsys.readouterr().err
    assert not (tmp_path / "other.png").exists()


def test_a_job_knows_it_by_weights_and_levels(file: Path) -> None:
    before = read_checkpoint(str(file)).digest
    assert read_checkpoint(str(file)).digest == before
    (file.parent / "net.json").write_text(json.dumps({"sigma_data": 0.4, "sigma_max": 60.0}))
    assert read_checkpoint(str(file)).digest != before


def test_classifier_free_guidance_has_its_null_label(file: Path) -> None:
    engine = sf.Engine.from_pretrained(file, device="cpu", dtype="float32", network="eager", batch=1, invariant=True)
    guided = engine.sample(1, steps=2, labels=1, guidance=2.0, seed=3)
    assert not torch.equal(guided, engine.sample(1, steps=2, labels=1, seed=3))
    narrow = engine.table("heun", 2, guidance_interval=(60.0, 80.0))  # no level of its own lies there
    alone = engine.sample(1, steps=2, labels=1, seed=3)
    assert_same_bits("unguided", engine.sample(1, narrow, labels=1, guidance=2.0, seed=3), alone)
