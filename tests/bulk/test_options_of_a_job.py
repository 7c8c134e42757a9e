"""Going on with a job: what is given must be what it was begun with, and what is not given stays what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from stepfusion import bulk
from stepfusion.bulk.manifest import read_records, write_sorted
from stepfusion.errors import BulkError
from stepfusion_testing.bulk_jobs import begun_by_another_version, generate, tree

SHORT = "generate model --num 22 --unit 8 --steps 2 --quiet --out out"
BEGUN = f"{SHORT} --dtype bfloat16 --batch 4 --threads 1 --backend reference --network eager --invariant"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that is made once, with every option given."""
    return tmp_path_factory.mktemp("template") / "out"


@pytest.fixture
def begun(template: Path, missing: int) -> dict[str, bytes]:
    """A job in the directory ``out`` of which so many units are missing; returns the bytes of the whole."""
    if not template.exists():
        generate(BEGUN)
        shutil.move("out", template)
    shutil.copytree(template, "out")
    whole = tree()
    records = read_records(Path("out"))
    write_sorted(Path("out"), [record for record in records.values() if record.unit < 3 - missing])
    return whole


MISSING = pytest.mark.parametrize("missing", [0, 1], ids=["whole", "going on"])


@MISSING
@pytest.mark.parametrize(
    ("options", "differences"),
    [
        ("--dtype float32", "dtype was 'bfloat16' and is 'float32'"),
        ("--batch 8", "batch was 4 and is 8"),
        ("--threads 2", "threads was 1 and is 2"),
        ("--network compile", "network was 'eager' and is 'compile'"),
        ("--dtype float16 --batch 2", "batch was 4 and is 2; dtype was 'bfloat16' and is 'float16'"),
    ],
)
def test_another_option_is_refused(
    options: str, differences: str, begun: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not images are missing: it was refused only if some were."""
    before = tree()
    generate(f"{SHORT} {options}", status=1)
    place = Path("out").absolute()
    assert capsys.readouterr().err == (
        f"stepfusion: {place} was started with other settings: {differences}."
        " Use another directory, or those settings\n"
    )
    assert tree() == before


@MISSING
@pytest.mark.parametrize(
    "options", ["", "--dtype bfloat16", "--batch 4", "--invariant --threads 1", "--backend reference --network eager"]
)
def test_what_is_not_given_stays_what_it_was(options: str, begun: dict[str, bytes]) -> None:
    torch.set_num_threads(2)
    generate(f"{SHORT} {options}")
    assert tree() == begun


@MISSING
def test_the_same_in_several_processes(begun: dict[str, bytes]) -> None:
    generate(f"{SHORT} --devices cpu,cpu")
    assert tree() == begun


@MISSING
def test_the_environment_is_an_option_too(
    begun: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPFUSION_BACKEND", "triton")
    generate(SHORT, status=1)
    assert "backend was 'reference' and is 'triton'" in capsys.readouterr().err


def test_an_invariant_job_is_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{SHORT} --batch 4")
    generate(f"{SHORT} --invariant", status=1)
    assert "invariant was False and is True" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [0, 1])
def test_other_versions_matter_where_images_are_made(
    missing: int, begun: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    begun_by_another_version()
    generate(SHORT, status=missing)
    error = capsys.readouterr().err
    assert ("the version of stepfusion was '0.0.9' and is " in error) == bool(missing)


@pytest.mark.parametrize("missing", [0, 1])
def test_another_kind_of_device_is_refused(
    missing: int, begun: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads(Path("out/engine.json").read_text())
    Path("out/engine.json").write_text(json.dumps({**settings, "device": "NVIDIA H200", "network": "graph"}))
    generate(SHORT, status=missing)
    assert ("started with other settings: device was 'NVIDIA H200' and is 'cpu " in capsys.readouterr().err) == bool(
        missing
    )


@pytest.mark.parametrize("missing", [0, 1])
def test_a_job_without_its_settings_does_not_go_on(
    missing: int, begun: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """The images that are there would be followed by images of other bits, without a word."""
    Path("out/engine.json").unlink()
    before = tree()
    generate(SHORT, status=1)
    assert f"{Path('out').absolute() / 'engine.json'} is missing" in capsys.readouterr().err
    assert tree() == before


@pytest.mark.parametrize("missing", [1])
def test_the_same_rule_in_python(begun: dict[str, bytes]) -> None:
    job, out = bulk.job.read_job(Path("out")), Path("out").absolute()
    request = bulk.TableRequest(steps=2)
    other = bulk.WorkerConfig(job, out, "model", request, bulk.ExecutionOptions(dtype=torch.float32))
    with pytest.raises(BulkError, match="dtype was 'bfloat16' and is 'float32'"):
        bulk.run(other, bulk.Placement(("cpu",)), quiet=True)
    same = bulk.WorkerConfig(job, out, "model", request, bulk.ExecutionOptions(dtype=torch.bfloat16))
    assert bulk.run(same, bulk.Placement(("cpu",)), quiet=True) is not None
    assert tree() == begun
