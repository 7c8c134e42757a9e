"""Samplers compared by evaluations: what fits a budget, what is measured, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion.bench import sampler_quality
from stepfusion.bench.sampler_quality import Frechet, Quality, as_markdown, fitting_table, main, measure


class Exact(nn.Module):
    """The eps of data N(0.3, 0.4^2) on a linear schedule of 40 timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = sf.NoiseSchedule.linear(40)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = torch.from_numpy(self.schedule.alphas_cumprod.copy()).float()[t].view(-1, 1, 1, 1)
        mean = 0.3 + abar.sqrt() * 0.16 / (abar * 0.16 + 1 - abar) * (x - abar.sqrt() * 0.3)
        return self.scale * (x - abar.sqrt() * mean) / (1 - abar).sqrt()


@pytest.fixture(scope="module")
def engine() -> sf.Engine:
    network = Exact()
    return sf.Engine(network, network.schedule, shape=(1, 4, 4), device="cpu", dtype="float32", batch=4)


def quality(sampler: str, evaluations: int, distance: float | None) -> Quality:
    return Quality(
        model="model",
        images=4,
        samples=None,
        sampler=sampler,
        table=sampler,
        allowed=8,
        evaluations=evaluations,
        distance=distance,
        frechet=None,
    )


def test_a_budget_is_of_evaluations(engine: sf.Engine) -> None:
    one, two = fitting_table(engine, "ddim", 8), fitting_table(engine, "heun", 8)
    assert one is not None
    assert two is not None
    assert (len(one), len(two)) == (8, 7)  # two evaluations a step, one in the last
    assert fitting_table(engine, "heun", 1) is not None


def test_more_evaluations_go_nearer_and_noise_has_no_distance(engine: sf.Engine) -> None:
    found = {(q.sampler, q.allowed): q for q in measure(engine, (4, 20), 4, None, 1)}
    assert found["ddim", 20].distance < found["ddim", 4].distance  # type: ignore[operator]
    assert found["ddpm", 20].distance is None
    assert {q.frechet for q in found.values()} == {None}
    assert not {"lcm", "tcd", "consistency"} & {sampler for sampler, _ in found}
    assert all(q.evaluations <= q.allowed for q in found.values())


def test_the_best_of_each_column_is_marked() -> None:
    found = [
        quality("a", 8, 0.5),
        quality("b", 7, 0.25),
        quality("c", 8, None),
    ]
    assert as_markdown(found, "distance") == "| sampler | 8 |\n| --- | --- |\n| `a` | 0.5 |\n| `b` | **0.25** |\n"


def test_the_page_of_samplers_has_the_committed_figures() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "bench" / "results" / "samplers" / "samplers.jsonl").read_text(encoding="utf-8").splitlines()
    found = [Quality.model_validate_json(line) for line in lines]
    assert as_markdown(found, "distance") in (root / "docs" / "samplers.md").read_text(encoding="utf-8")
    at = {(q.sampler, q.allowed): q.distance for q in found}
    assert at["unipc", 15] < at["ddim", 30]  # type: ignore[operator]


def test_the_page_has_the_frechet_distances_and_says_what_they_say() -> None:
    root = Path(__file__).parents[2]
    lines = (
        (root / "bench" / "results" / "samplers-frechet" / "samplers.jsonl").read_text(encoding="utf-8").splitlines()
    )
    found = [Quality.model_validate_json(line) for line in lines]
    assert {(q.images, q.samples) for q in found} == {(32, 1000)}
    assert as_markdown(found, "frechet") in (root / "docs" / "samplers.md").read_text(encoding="utf-8")
    at = {(q.sampler, q.allowed): q.frechet or 0.0 for q in found}
    assert f"(Frechet distance {at['unipc', 8]:.2f})" in (root / "README.md").read_text(encoding="utf-8")
    assert f"{at['unipc', 8]:.2f}" == f"{at['ddim', 30]:.2f}"
    for allowed in {q.allowed for q in found} - {8}:
        assert min(at, key=lambda one: (one[1] != allowed, at[one])) == ("dpmpp_2m_sde", allowed)


def test_the_command_writes_lines_a_table_and_a_picture(
    tmp_path: Path, engine: sf.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sampler_quality.Engine, "from_pretrained", lambda *_, **__: engine)
    assert main(["model", "--evaluations", "4", "6", "--images", "2", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "samplers.jsonl").read_text().splitlines()]
    assert {line["allowed"] for line in lines} == {4, 6}
    assert (tmp_path / "out" / "samplers.md").read_text().startswith("distance\n\n| sampler | 4 | 6 |\n")
    assert (tmp_path / "out" / "samplers.png").read_bytes().startswith(b"\x89PNG")


def test_a_command_that_was_stopped_goes_on(
    tmp_path: Path, engine: sf.Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sampler_quality.Engine, "from_pretrained", lambda *_, **__: engine)
    command = ["model", "--evaluations", "4", "6", "--images", "2", "--out", str(tmp_path)]
    main(command)
    rows = tmp_path / "samplers.jsonl"
    whole, table = rows.read_bytes(), (tmp_path / "samplers.md").read_bytes()
    rows.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]) + b'{"model": "mod')  # killed in a line
    capsys.readouterr()
    main(command)
    assert len(capsys.readouterr().out.splitlines()) == len(whole.splitlines()) - 5
    assert rows.read_bytes() == whole
    assert (tmp_path / "samplers.md").read_bytes() == table
    with pytest.raises(ValueError, match="has rows of another model, or of other numbers of images"):
        main([*command[:-3], "3", *command[-2:]])


def test_the_frechet_distance_is_of_more_images(engine: sf.Engine) -> None:
    given: list[torch.Tensor] = []

    def distance(images: torch.Tensor) -> float:
        given.append(images)
        return float(len(given))

    few, many = (list(measure(engine, (4,), 2, Frechet(samples, distance), 1)) for samples in (1, 6))
    assert {len(images) for images in given} == {1, 6}
    assert [q.distance for q in few] == [q.distance for q in many]
    assert [q.frechet for q in few] == list(range(1, len(few) + 1))
