"""docs/models.md: its script runs, its commands parse, its tables are true. Its code runs in tests/docs."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stepfusion as sf
from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.checkpoints.load import load_model
from stepfusion.checkpoints.pipeline import find_layout
from stepfusion.commands.sample import add_sample_arguments
from stepfusion.latents.single_file_configs import configs_of
from stepfusion.networks import UNet2DCondition
from stepfusion.networks.meta import Unfilled
from stepfusion_testing.single_files import TinyFile

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def rows(section: str) -> list[list[str]]:
    """The cells of the table in a section."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_script_converts_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a.weight": torch.randn(2, 3).T, "b": torch.ones(1)}
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "model.ckpt")
    (tmp_path / "convert.py").write_text(blocks(PAGE)[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert.py", "model.ckpt"])
    runpy.run_path("convert.py")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_the_commands_parse() -> None:
    parser = argparse.ArgumentParser()
    add_sample_arguments(parser)
    commands = [row[2].strip("`") for row in rows("What is read")]
    assert len(commands) == 12
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["stepfusion", "sample"]
        parser.parse_args(words[2:])
    (named,) = (row[1] for row in rows("What is read") if row[0] == "bundled")
    assert tuple(sorted(re.findall(r"`([\w-]+)`", named))) == bundled_models()


@pytest.mark.parametrize(
    ("family", "row"),
    [("sd1", "Diffusion 1"), ("sd2", "Diffusion 2"), ("sdxl", "of SDXL"), ("sdxl-refiner", "refiner")],
)
def test_conditions_are_those_of_the_networks(family: str, row: str) -> None:
    with torch.device("meta"), Unfilled():
        network = UNet2DCondition.from_config(configs_of(family)["unet"])
    (cell,) = (cells[2] for cells in rows("What a network is conditioned on") if cells[0].endswith(row))
    stated = {name: tuple(json.loads(shape)) for name, shape in re.findall(r"`(\w+)` (\[[\d, ]+\])", cell)}
    assert stated == {one.name: one.shape for one in network.conditions}


def test_what_is_refused_is_refused(tmp_path: Path) -> None:
    parts = [re.search(r"part `(\w+)` \(`(\w+)`\)", row[1]) for row in rows("What is refused")]
    found = [match for match in parts if match is not None]
    assert len(found) == 5
    (tmp_path / "unet").mkdir()
    for match in found:
        index = {"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"], match[1]: ["library", match[2]]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(sf.CheckpointError, match=rf"part '{match[1]}' \({match[2]}\) is not implemented"):
            find_layout(tmp_path)
    for suffix in (".ckpt", ".pkl"):
        (tmp_path / f"model{suffix}").write_bytes(b"\x80")
        with pytest.raises(sf.CheckpointError, match="is a pickle, which can run code and is not opened"):
            load_model(tmp_path / f"model{suffix}")


@pytest.mark.parametrize("name", ["dora_scale", "hada_w1_a", "lokr_w1"])
def test_other_adapters_are_refused_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert f"`{name}`" in PAGE
    file = TinyFile(tmp_path, "sd1", monkeypatch)
    save_file({f"lora_unet_mid_block.{name}": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(sf.CheckpointError, match=f"has 'lora_unet_mid_block.{name}', which is not known"):
        sf.load_single_file(file.write(), lora=tmp_path / "lora.safetensors")


def test_the_readme_names_the_page() -> None:
    assert "[Models](docs/models.md)" in README
