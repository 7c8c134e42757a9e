"""What a name, a directory or a file gives: a network, and the spec of its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepfusion.checkpoints.guided_diffusion import GuidedDiffusionModel, their_shapes
from stepfusion.checkpoints.load import load_model
from stepfusion.checkpoints.save_directory import save_pretrained
from stepfusion.engine import Engine
from stepfusion.errors import CheckpointError
from stepfusion.networks import ADMUNet, ADMUNetConfig
from stepfusion_testing.tiny_model import CLASS_NAMES, NULL_LABEL, save_tiny_model, tiny_network


def test_the_spec_is_what_an_engine_knows(tmp_path: Path) -> None:
    for source in ("fashion-mnist", "garments-16", save_tiny_model(tmp_path / "model")):
        loaded = load_model(source)
        spec, engine = loaded.spec, Engine.from_pretrained(loaded, device="cpu")
        assert spec is loaded.spec
        for name in ("schedule", "prediction", "shape", "num_classes", "null_label", "class_names", "options"):
            assert getattr(spec, name) == getattr(engine, name), name
        assert spec.context_size == getattr(loaded.network, "context_size", None)
        table, same = spec.table("ddpm", 7), engine.table("ddpm", 7)
        assert (table.digest, repr(table)) == (same.digest, repr(same))


def test_the_spec_of_a_directory_names_its_classes(tmp_path: Path) -> None:
    spec = load_model(save_tiny_model(tmp_path / "m")).spec
    known = (spec.class_names, spec.null_label, spec.num_classes, spec.shape)
    assert known == (
        CLASS_NAMES,
        NULL_LABEL,
        4,
        (1, 8, 8),
    )


def test_the_spec_of_a_guided_diffusion_file(tmp_path: Path) -> None:
    flags = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "learn_sigma": True}
    network = ADMUNet(ADMUNetConfig(**flags, channel_mult=(1, 2), attention_resolutions=()))
    torch.save({name: torch.zeros(shape) for name, shape in their_shapes(network).items()}, tmp_path / "m.pt")
    described = {**flags, "channel_mult": "1,2", "attention_resolutions": ""}
    (tmp_path / "m.json").write_text(json.dumps(described))
    loaded = load_model(tmp_path / "m.pt")
    assert isinstance(loaded, GuidedDiffusionModel)
    assert loaded.spec.shape == (3, 8, 8)
    assert loaded.spec.options["variance"] == "learned_range"
    assert (loaded.spec.num_classes, loaded.spec.class_names, loaded.spec.null_label) == (None, None, None)


def test_a_caller_may_know_better(tmp_path: Path) -> None:
    network = tiny_network(sample_size=None)
    save_pretrained(tmp_path / "model", network, {})
    loaded = load_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^shape is needed, e\.g\. \(3, 32, 32\)"):
        _ = loaded.spec
    spec = loaded.spec_with(shape=(1, 16, 24), prediction="sample")
    assert (spec.shape, spec.prediction) == ((1, 16, 24), "sample")


def test_a_setting_that_is_not_supported_is_named(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model", tiny_network(), {"timestep_spacing": "even"})
    with pytest.raises(CheckpointError, match=r"^scheduler config: timestep_spacing must be one of"):
        _ = load_model(tmp_path / "model").spec
