"""The README's Python runs as it stands, with fewer steps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfusion_testing.networks import smooth

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def quick(code: str) -> str:
    """The same calls with 4 images at the most, and 3 steps."""
    code = re.sub(r"steps=\d+", "steps=3", code).replace("sample(64", "sample(4").replace("range(64)", "range(4)")
    return code.replace('engine.table("ddpm")', 'engine.table("ddpm", 3)').replace("generate(200", "generate(5")


@pytest.mark.slow
def test_the_page_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"my_network": smooth}
    exec(quick(BLOCKS[0]), names)
    # image 3 of seed 7, alone, as the page says; another bucket, so to rounding
    torch.testing.assert_close(names["again"][0], names["images"][3], rtol=0, atol=1e-3)
    assert names["restored"].shape == names["images"].shape
    assert [path.name for path in tmp_path.iterdir()] == ["clothes"]
    assert len(list((tmp_path / "clothes").iterdir())) == 4


def test_the_literatures_methods() -> None:
    images = torch.zeros(2, 3, 4, 4)
    names: dict[str, Any] = dict.fromkeys(("x_start", "noise", "z"), images)
    import stepfusion as sf

    names |= {"sf": sf, "schedule": sf.NoiseSchedule.linear(), "model": smooth, "t": torch.tensor([3, 999])}
    exec(BLOCKS[1], names)
    assert set(names["step"]) == {"sample", "pred_xstart"}
    assert names["loss"].ndim == 0


@pytest.mark.slow
def test_other_paths() -> None:
    import stepfusion as sf

    def network(x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return 0.1 * x

    names: dict[str, Any] = {"sf": sf, "raw_network": network, "velocity": network}
    exec(BLOCKS[2].replace("32, 32", "4, 4"), names)
    assert names["churned"].shape == (4, 3, 4, 4)
    assert names["images"].isfinite().all()
