"""docs/migrating.md: both sides of every row are run, and differ by no more than the row says."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion_testing.snippets import ROOT, run_python, snippets

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PAGE = "docs/migrating.md"
pytestmark = pytest.mark.filterwarnings(  # of diffusers' schedulers, with NumPy 2
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__ must accept:DeprecationWarning"
)


def rows() -> list[tuple[str, str, float]]:
    """Theirs, ours, and the largest difference, of every row that states one."""
    found = []
    for line in (ROOT / PAGE).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 3:
            found.append((cells[0].strip("`"), cells[1].strip("`"), float(cells[2])))
    return found


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's Python leaves, around small models."""
    from stepfusion_testing.page_stages import STAGES

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("models"))
        with STAGES[PAGE].set_up() as (given, _):
            found = {"numpy": np, **given}
            for snippet in snippets(PAGE):
                run_python(snippet.text, found, str(snippet))
    for name in ("their_ddim", "their_ddpm", "their_sd", "their_dit"):
        found[name].set_progress_bar_config(disable=True)
    return found


def as_array(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)


@pytest.mark.parametrize(("theirs", "ours", "difference"), rows(), ids=[theirs[:70] for theirs, _, _ in rows()])
def test_a_row_is_true(theirs: str, ours: str, difference: float, names: dict[str, Any]) -> None:
    with torch.no_grad():
        wanted, got = (as_array(eval(code, dict(names))) for code in (theirs, ours))
    assert got.shape == wanted.shape
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=difference)


def test_the_page_has_its_rows() -> None:
    assert len(rows()) >= 35


def test_the_default_differs_by_as_much_as_the_page_says(names: dict[str, Any]) -> None:
    engine, drawn = names["our_pixels"], names["drawn"]
    with torch.no_grad():
        new = engine.sample(steps=20, **drawn(engine, 8))
        old = engine.sample(table=names["old"], **drawn(engine, 8))
    assert 0.46 < (new - old).abs().max() <= 2.0


@pytest.mark.soak
def test_and_with_the_bundled_model() -> None:
    engine = sf.Engine.from_pretrained("fashion-mnist", device="cpu")
    labels = [image % 10 for image in range(16)]
    tables = engine.table("ddim", 50), engine.table("ddim", 50, compat="diffusers")
    new, old = (engine.sample(16, table, labels=labels) for table in tables)
    text = " ".join((ROOT / PAGE).read_text(encoding="utf-8").split())
    stated = re.search(r"by (0\.\d+) at most, of a range of 2, .* and by (0\.\d+) in the root mean square", text)
    assert stated is not None
    assert float((new - old).abs().max()) == pytest.approx(float(stated[1]), abs=0.05)
    assert float((new - old).square().mean().sqrt()) == pytest.approx(float(stated[2]), abs=0.002)
