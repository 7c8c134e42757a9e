"""Files of tensors are safetensors, whole, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stepfusion.errors import CheckpointError
from stepfusion.latents.tensor_file import read_tensors


def test_tensors_and_metadata_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.float16), "c": torch.tensor(3)}
    save_file(tensors, path, metadata={"note": "text"})
    file = read_tensors(str(path))
    path.write_bytes(bytes(path.stat().st_size))
    assert file.metadata == {"note": "text"}
    assert file.tensors.keys() == tensors.keys()
    assert all(torch.equal(file.tensors[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.pt", "model"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not read: accepted are .safetensors files"):
        read_tensors(tmp_path / name)


def test_what_is_no_whole_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="is missing"):
        read_tensors(path)
    save_file({"a": torch.randn(30)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        read_tensors(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"is not a complete safetensors file: .* it is a folder"):
        read_tensors(path)
