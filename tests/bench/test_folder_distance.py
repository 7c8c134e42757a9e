"""Distances of folders: what the libraries are asked, what is refused, and the real ones where they are installed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stepfusion.bench import folder_distance as module
from stepfusion.bench import quality
from stepfusion.bench.folder_distance import folder_distance
from stepfusion.files.images import save_png

ANSWERS = {
    "frechet_inception_distance": np.float64(12.5),
    "kernel_inception_distance_mean": 0.25,
    "kernel_inception_distance_std": 0.5,
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders, of three and of four images."""
    random = np.random.default_rng(0)
    for name, count in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        for i in range(count):
            save_png(tmp_path / name / f"{i}.png", random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return tmp_path / "a", tmp_path / "b"


def stand_in(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[dict[str, Any]]:
    """Modules that answer in the libraries' stead, and only those: what they were asked."""
    asked: list[dict[str, Any]] = []

    def answer(*folders: str, **options: Any) -> dict[str, Any]:
        asked.append({"folders": folders, **options})
        return ANSWERS

    def number(*folders: str, **options: Any) -> float:
        asked.append({"folders": folders, **options})
        return 7.0 + len(asked)

    fidelity, fid = ModuleType("torch_fidelity"), ModuleType("cleanfid.fid")
    fidelity.calculate_metrics = answer
    fid.compute_fid = fid.compute_kid = number
    monkeypatch.setitem(sys.modules, "torch_fidelity", fidelity)
    monkeypatch.setitem(sys.modules, "cleanfid", ModuleType("cleanfid"))
    monkeypatch.setitem(sys.modules, "cleanfid.fid", fid)
    reason = {name: None if name in names else "not installed" for name in ("torch_fidelity", "cleanfid")}
    monkeypatch.setattr(module, "why_not", reason.get)
    monkeypatch.setattr(module, "need", sys.modules.get)
    return asked


def test_torch_fidelity_goes_first(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, "torch_fidelity", "cleanfid")
    result = folder_distance(*folders, device="cpu")
    numbers = {"frechet": 12.5, "kernel": 0.25, "kernel_std": 0.5}
    assert result == {"library": "torch-fidelity", "images": [3, 4], **numbers}
    assert (asked[0]["input1"], asked[0]["input2"]) == tuple(map(str, folders))
    assert (asked[0]["cuda"], asked[0]["fid"], asked[0]["kid"], asked[0]["kid_subset_size"]) == (False, True, True, 3)


@pytest.mark.parametrize("library", ["auto", "clean-fid"])
def test_clean_fid(library: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, "cleanfid")
    assert folder_distance(*folders, library, "cpu") == {
        "library": "clean-fid",
        "images": [3, 4],
        "frechet": 8.0,
        "kernel": 9.0,
    }
    assert all(options["folders"] == tuple(map(str, folders)) and options["mode"] == "clean" for options in asked)


def test_the_command_prints_json(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "torch_fidelity")
    assert quality.main(["folders", *map(str, folders), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["frechet"] == 12.5


def test_what_is_missing_is_named(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = stand_in(monkeypatch, "cleanfid")
    with pytest.raises(ImportError, match="torch-fidelity is needed and not installed: pip install torch-fidelity"):
        folder_distance(*folders, "torch-fidelity")
    stand_in(monkeypatch)
    assert quality.main(["folders", *map(str, folders)]) == 2
    assert capsys.readouterr().err == (
        "quality: torch-fidelity or clean-fid is needed and not installed: pip install torch-fidelity\n"
    )
    assert not asked


def test_bad_folders_are_refused_before_any_work(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stand_in(monkeypatch, "torch_fidelity")
    (tmp_path / "one").mkdir()
    (folders[0] / "0.png").rename(tmp_path / "one" / "0.png")
    with pytest.raises(ValueError, match=r"b must hold at least two PNG or JPEG images, and .*one holds 1"):
        folder_distance(folders[1], tmp_path / "one")
    with pytest.raises(ValueError, match=r"a must be a folder of images, got .*nowhere"):
        folder_distance(tmp_path / "nowhere", folders[1])
    with pytest.raises(ValueError, match="library must be one of 'auto', 'torch-fidelity', 'clean-fid', got 'fid'"):
        folder_distance(*folders, "fid")
    assert not asked


@pytest.mark.parametrize("library", ["torch-fidelity", "clean-fid"])
def test_the_real_library_finds_a_folder_equal_to_itself(library: str, folders: tuple[Path, Path]) -> None:
    if find_spec(module.LIBRARIES[library][0]) is None:
        pytest.skip(f"{library} is not installed")
    try:
        same = folder_distance(folders[0], folders[0], library, "cpu")
    except OSError as error:
        pytest.skip(f"the Inception weights cannot be downloaded here: {error}")
    assert abs(same["frechet"]) < 1e-3 < folder_distance(*folders, library, "cpu")["frechet"]
