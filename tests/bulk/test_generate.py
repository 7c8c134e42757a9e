"""``stepfusion generate``: what it writes, when it goes on, and when it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

import stepfusion as sf
from stepfusion import bulk
from stepfusion.bulk import shards
from stepfusion.bulk.job import read_job
from stepfusion.bulk.labels import read_labels
from stepfusion.bulk.manifest import Manifest, Record, read_records, write_sorted
from stepfusion.bulk.progress import Progress
from stepfusion.bulk.shard_reading import read_shard
from stepfusion.bulk.shards import FORMATS
from stepfusion.engine import Engine
from stepfusion.lanes.runner import Runner
from stepfusion_testing.bulk_jobs import TINY, finished, generate, tree
from stepfusion_testing.tiny_model import NULL_LABEL, save_tiny_model

WEIGHTS = Path("model/unet/diffusion_pytorch_model.safetensors")


def images(out: str = "out") -> NDArray[np.uint8]:
    """Every image of a directory, uint8 [N, H, W, C], from its shards in any format."""
    job, records = read_job(Path(out)), read_records(Path(out))
    units = [job.unit_at(number, read_labels(job, Path(out))) for number in range(job.units)]
    return np.stack(
        [image for unit in units for image in read_shard(job, Path(out), records[unit.number].shard, unit)]
    )


def engines_own(count: int = 22, unit: int = 8, first: int = 0, **arguments: Any) -> NDArray[np.uint8]:
    """The same images from :meth:`Engine.generate`, unit by unit."""
    engine = Engine.from_pretrained("model", device="cpu", batch=4)
    made = []
    for start in range(first, first + count, unit):
        part = range(start, min(start + unit, first + count))
        made += list(engine.generate(len(part), steps=2, indices=part, labels=[i % 3 for i in part], **arguments))
    return torch.cat(made).numpy()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_holds_the_engines_images(form: str) -> None:
    generate(f"{TINY} --out out --format {form} --npz")
    np.testing.assert_array_equal(images(), engines_own())
    with np.load("out/samples_22x8x8x1.npz") as samples:
        assert (samples["arr_0"].dtype, samples["arr_1"].dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(samples["arr_0"], engines_own())
        np.testing.assert_array_equal(samples["arr_1"], np.arange(22) % 3)


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_ancestral_euler_takes_eta(eta: float | None) -> None:
    option = "" if eta is None else f" --eta {eta}"
    generate(f"{TINY} --out out --sampler euler_ancestral{option}")
    np.testing.assert_array_equal(images(), engines_own(sampler="euler_ancestral", eta=eta))
    assert (
        json.loads(Path("out/job.json").read_text())["table"]
        == f"euler ancestral, eta {1 if eta is None else eta:g}, 2 steps"
    )


@pytest.mark.parametrize(
    ("options", "asked", "table"),
    [
        ("--steps 2 --spacing trailing", {"steps": 2, "spacing": "trailing"}, "2 steps, spacing trailing"),
        ("--steps 2 --spacing leading", {"steps": 2, "spacing": "leading"}, "2 steps"),  # the model's own
        ("--timesteps 2,1", {"timesteps": [50, 49, 0]}, "3 steps, timesteps 2,1"),
        ("--timesteps ddim4 --sampler ddpm", {"timesteps": "ddim4", "sampler": "ddpm"}, "4 steps, timesteps ddim4"),
    ],
)
def test_steps_are_where_they_are_asked_for(options: str, asked: dict[str, Any], table: str) -> None:
    generate(f"{TINY.replace('--steps 2', options)} --out out")
    engine = Engine.from_pretrained("model", device="cpu", batch=4)
    wanted = engine.generate(8, engine.table(**asked), labels=[i % 3 for i in range(8)])
    np.testing.assert_array_equal(images()[:8], torch.cat(list(wanted)).numpy())
    name = "ddpm" if "ddpm" in options else "ddim, eta 0"
    assert json.loads(Path("out/job.json").read_text())["table"] == f"{name}, {table}"
    generate(f"{TINY.replace('--steps 2', options)} --out out")


def test_a_tar_is_a_webdataset() -> None:
    generate(f"{TINY} --out out --seed 7 --first-index 100")
    with tarfile.open("out/images/000001.tar") as archive:
        members = archive.getmembers()
        names = [member.name for member in members[:4]]
        assert names == ["0000000108.png", "0000000108.cls", "0000000108.json", "0000000109.png"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        label, entry = (archive.extractfile(name) for name in names[1:3])
        assert label is not None
        assert entry is not None
        assert label.read() == b"0"
        assert json.load(entry) == {"seed": 7, "index": 108, "label": 0}
    np.testing.assert_array_equal(images(), engines_own(first=100, seed=7))


def test_a_folder_has_pictures_and_a_table_of_labels() -> None:
    generate(f"{TINY} --out out --format png")
    assert sorted(os.listdir("out/images")) == ["000000", "000001", "000002"]
    rows = Path("out/images/000002/metadata.csv").read_text().split()
    assert rows[:3] == ["file_name,label", "0000000016.png,1", "0000000017.png,2"]
    with Image.open("out/images/000002/0000000021.png") as picture:
        np.testing.assert_array_equal(np.array(picture), engines_own()[21, ..., 0])
    digest = subprocess.run(
        "sha256sum * | sha256sum", cwd="out/images/000001", shell=True, capture_output=True, text=True, check=True
    )
    assert digest.stdout.split()[0] == read_records(Path("out"))[1].sha256  # as docs/bulk.md says


def test_a_model_without_labels() -> None:
    save_tiny_model(Path("plain"), num_class_embeds=None)
    generate(f"{TINY.replace('model', 'plain')} --out out --npz")
    with np.load("out/samples_22x8x8x1.npz") as samples:
        assert samples.files == ["arr_0"]
    with tarfile.open("out/images/000000.tar") as archive:
        assert archive.getnames()[:3] == ["0000000000.png", "0000000000.json", "0000000001.png"]


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("", [0, 1, 2, 0, 1]),
        ("--labels dog,cat", [1, 0, 1, 0, 1]),
        ("--labels none", [NULL_LABEL] * 5),
        ("--labels dog,cat --first-index 1", [0, 1, 0, 1, 0]),  # by index: the images of an index never change label
        ("--labels-file names.txt", [2, 1, 0, 3, 0]),
        ("--labels-file numbers.npy", [2, 1, 0, 3, 0]),
    ],
)
def test_labels(option: str, wanted: list[int]) -> None:
    Path("names.txt").write_text("T-shirt/top\ndog\n0\nnone\nCat\n")
    np.save("numbers.npy", np.array([2, 1, 0, 3, 0], dtype=np.int32))
    generate(f"generate model --num 5 --unit 2 --steps 1 --out out --quiet --npz --format npz {option}")
    with np.load("out/samples_5x8x8x1.npz") as samples:
        assert samples["arr_1"].tolist() == wanted
        engine = Engine.from_pretrained("model", device="cpu")
        first = 1 if "first" in option else 0
        alone = next(engine.generate(2, steps=1, indices=[first, first + 1], labels=wanted[:2]))
        np.testing.assert_array_equal(samples["arr_0"][:2], alone.numpy())


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{TINY.replace('--quiet', '')} --out out")
    report = json.loads(Path("out/report.json").read_text())
    assert (report["images"], report["units"], report["images_made_now"], report["non_finite"]) == (22, 3, 22, [])
    assert report["images_per_second"] == pytest.approx(22 / report["seconds"], rel=0.01)
    assert report["engine"] == json.loads(Path("out/engine.json").read_text())
    output = capsys.readouterr()
    assert output.out.startswith("out: 22 images of 8x8x1 in 3 shards, all checked, 0 non-finite; 22 made now, ")
    assert output.err == ""
    generate(f"{TINY.replace('--quiet', '')} --out out")
    assert "0 non-finite; all were there" in capsys.readouterr().out


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("stepfusion.bulk.progress._SECONDS_BETWEEN_LINES", 0)
    generate(f"{TINY.replace('--quiet', '')} --out out")
    lines = [line for line in capsys.readouterr().err.splitlines() if "none finished" not in line]
    assert lines[0].startswith("stepfusion: 8 of 22 images, ")
    assert " images/s, " in lines[0]


def test_a_log_hears_of_a_long_unit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("stepfusion.bulk.progress._SECONDS_BETWEEN_LINES", 0.3)
    with Progress(20, 8, quiet=False):
        time.sleep(1.0)  # nothing is finished meanwhile
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert set(lines) == {"stepfusion: 8 of 20 images, none finished in the 00:00 of this run yet"}
    with Progress(20, 8, quiet=True):
        time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_invariant_images_do_not_depend_on_the_unit() -> None:
    generate(f"{TINY} --out a --invariant --format npz")
    generate(f"{TINY.replace('--unit 8', '--unit 5')} --out b --invariant --format npz")
    np.testing.assert_array_equal(images("a"), images("b"))


# Going on


def cut_short(units: int, form: str = "webdataset") -> None:
    """Leave a directory as a run leaves it that was killed after so many units."""
    generate(f"{TINY} --out out --format {form}")
    records = read_records(Path("out"))
    write_sorted(Path("out"), [record for record in records.values() if record.unit < units])
    Path("out/report.json").unlink()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that workers make from now on."""
    numbers: list[int] = []
    original = bulk.worker.Worker.make

    def make(self: bulk.worker.Worker, number: int) -> Record:
        numbers.append(number)
        return original(self, number)

    monkeypatch.setattr(bulk.worker.Worker, "make", make)
    return numbers


@pytest.mark.parametrize("form", FORMATS)
def test_only_what_is_missing_is_made(form: str, made: list[int]) -> None:
    cut_short(1, form)
    whole = tree("out")
    made.clear()
    generate(f"{TINY} --out out --format {form}")
    assert made == [1, 2]
    assert {name: data for name, data in tree().items() if "manifest" not in name} == {
        name: data for name, data in whole.items() if "manifest" not in name
    }
    generate(f"{TINY} --out out --format {form}")
    assert made == [1, 2]


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (b"", [1, 2]),
        (b'{"unit": 1, "fir', [1, 2]),  # torn
        (b"\xff\x00garbage\n", [1, 2]),
    ],
    ids=["none", "torn", "garbage"],
)
def test_a_torn_line_is_no_line(damage: bytes, again: list[int], made: list[int]) -> None:
    generate(f"{TINY} --out whole")
    cut_short(1)
    with open("out/manifest.jsonl", "ab") as file:
        file.write(damage)
    made.clear()
    generate(f"{TINY} --out out")
    assert made == again
    assert tree("out") == tree("whole")


def test_a_line_whose_digits_changed_is_no_line(made: list[int]) -> None:
    generate(f"{TINY} --out out")
    manifest = Path("out/manifest.jsonl")
    manifest.write_bytes(manifest.read_bytes().replace(b'"first": 8', b'"first": 9'))
    made.clear()
    generate(f"{TINY} --out out")
    assert made == [1]


def test_a_torn_line_is_cut_off_before_the_next(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(b'{"unit": 0')
    record = Record(1, 8, 8, "000001.tar", 5, "0" * 64, (9,))
    Manifest(tmp_path).append(record)
    assert read_records(tmp_path) == {1: record}
    assert (tmp_path / "manifest.jsonl").read_bytes().startswith(b'{"unit": 1')


@pytest.mark.parametrize("form", FORMATS)
def test_a_lost_shard_is_made_again(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{TINY} --out out --format {form}")
    before = tree()
    lost = Path("out/images", f"000001{FORMATS[form].suffix}")
    if lost.is_dir():
        (lost / "0000000009.png").unlink()
    else:
        os.truncate(lost, 100)
    generate(f"{TINY} --out out --format {form}")
    assert tree() == before
    assert f"the shard {lost.name} is gone or cut off: made again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 1", "seed was 0 and is 1"),
        ("--num 23", "num was 22 and is 23"),
        ("--unit 9", "unit was 8 and is 9"),
        ("--guidance 2", "guidance was None and is 2.0"),
        ("--format npz", "format was 'webdataset' and is 'npz'"),
        ("--labels cat", "classes was (0, 1, 2) and is (0,)"),
        ("--first-index 1", "first_index was 0 and is 1"),
        ("--steps 3", "table was 'ddim, eta 0, 2 steps' and is 'ddim, eta 0, 3 steps'; table_sha256 was "),
        (
            "--spacing trailing",
            "table was 'ddim, eta 0, 2 steps' and is 'ddim, eta 0, 2 steps, spacing trailing'; table_sha256 was ",
        ),
        (
            "--sampler euler_ancestral --eta 0",
            "table was 'ddim, eta 0, 2 steps' and is 'euler ancestral, eta 0, 2 steps'",
        ),
        ("--batch 8", "batch was 4 and is 8"),
        ("--dtype bfloat16", "dtype was 'float32' and is 'bfloat16'"),
        ("--invariant", "invariant was False and is True"),
        ("--threads 2", "threads was 1 and is 2"),
        ("--seed 1 --dtype bfloat16 --num 21", "num was 22 and is 21; seed was 0 and is 1. Use"),
    ],
)
def test_another_job_is_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    cut_short(2)
    before = tree()
    generate(f"{TINY} --out out {options}", status=1)
    error = capsys.readouterr().err
    assert error.startswith(f"stepfusion: {Path('out').absolute()} was started with other settings: ")
    assert message in error
    assert tree() == before


@pytest.mark.parametrize(
    ("begun", "options", "message"),
    [
        (
            "--spacing trailing",
            "",
            "table was 'ddim, eta 0, 2 steps, spacing trailing' and is 'ddim, eta 0, 2 steps'; ",
        ),
        (
            "--spacing trailing",
            "--spacing karras",
            "spacing trailing' and is 'ddim, eta 0, 2 steps, spacing karras'; ",
        ),
        (
            "--timesteps 2,1",
            "--timesteps 1,2",
            "3 steps, timesteps 2,1' and is 'ddim, eta 0, 3 steps, timesteps 1,2'; ",
        ),
    ],
)
def test_other_timesteps_are_refused(
    begun: str, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = TINY.replace(" --steps 2", "") if "timesteps" in begun else TINY
    generate(f"{command} --out out {begun}")
    before = tree()
    generate(f"{command} --out out {options}", status=1)
    error = capsys.readouterr().err
    assert " was started with other settings: table was 'ddim, eta 0, " in error
    assert f"{message}table_sha256 was " in error
    assert tree() == before


def test_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    cut_short(2)
    weights = load_file(WEIGHTS)
    weights["conv_in.bias"][0] += 1e-6
    save_file(weights, WEIGHTS)
    generate(f"{TINY} --out out", status=1)
    assert " was started with other settings: model was " in capsys.readouterr().err


def test_other_versions_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(2)
    monkeypatch.setattr(sf, "__version__", "9.9")
    generate(f"{TINY} --out out", status=1)
    assert "the version of stepfusion was '0.1.0' and is '9.9'" in capsys.readouterr().err


def test_batch_and_threads_stay_what_they_were(made: list[int]) -> None:
    cut_short(1)
    whole = tree()
    torch.set_num_threads(2)
    generate("generate model --num 22 --unit 8 --steps 2 --quiet --out out")
    assert torch.get_num_threads() == 1
    assert {name: tree()[name] for name in ("images/000002.tar", "engine.json")} == {
        name: whole[name] for name in ("images/000002.tar", "engine.json")
    }


def test_the_layout_of_the_model_directory_does_not_count() -> None:
    cut_short(2)
    flat = Path("flat")
    flat.mkdir()
    for path in (
        *Path("model/unet").iterdir(),
        Path("model/scheduler/scheduler_config.json"),
        Path("model/stepfusion.json"),
    ):
        (flat / path.name).write_bytes(path.read_bytes())
    generate(f"{TINY.replace('model', 'flat')} --out out")


# Damage that sizes do not show


@pytest.mark.parametrize("form", FORMATS)
def test_a_changed_byte_is_found_and_made_good(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{TINY} --out out --format {form}")
    whole = tree()
    generate("generate --verify out --quiet")
    shard = Path("out/images", f"000001{FORMATS[form].suffix}")
    file = shard / "0000000009.png" if shard.is_dir() else shard
    data = bytearray(file.read_bytes())
    data[-1 if shard.is_dir() else 300] ^= 1
    file.write_bytes(data)
    generate("generate --verify out", status=1)
    changed = f"unit 1 has another hash or size than in the manifest: {shard} was changed"
    assert f"out is not complete and sound: {changed}; " in capsys.readouterr().err
    generate(f"{TINY} --out out --format {form}", status=1)
    assert "unit 1 has another hash" in capsys.readouterr().err
    generate(f"{TINY} --out out --format {form}")
    assert tree() == whole


def test_verify_finds_what_is_missing_or_strange(capsys: pytest.CaptureFixture[str]) -> None:
    cut_short(1)
    Path("out/images/notes.txt").write_text("mine")
    generate("generate --verify out", status=1)
    error = capsys.readouterr().err
    assert "unit 1 is not in the manifest; unit 2 is not in the manifest; out/images/000001.tar is not in" in error
    assert "and 2 more faults" in error


def test_verify_reads_the_images_and_not_only_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that hashes as recorded, and holds the images of another unit."""
    generate(f"{TINY} --out out")
    records = read_records(Path("out"))
    Path("out/images/000001.tar").write_bytes(Path("out/images/000000.tar").read_bytes())
    digest, size = shards.shard_digest(Path("out"), "000001.tar")
    records[1] = Record(1, 8, 8, "000001.tar", size, digest)
    write_sorted(Path("out"), records.values())
    generate("generate --verify out", status=1)
    assert "unit 1 has other indices than the job: " in capsys.readouterr().err


# Faults


@pytest.fixture
def broken_class() -> None:
    """The model with a label that makes every image of it infinite."""
    weights = load_file(WEIGHTS)
    weights["class_embedding.weight"][1] = 1e38
    save_file(weights, WEIGHTS)


@pytest.mark.usefixtures("broken_class")
def test_a_non_finite_image_is_never_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    Path("labels.txt").write_text("0\n" * 13 + "1\n" + "0\n" * 8)
    generate(f"{TINY} --out out --labels-file labels.txt", status=1)
    error = capsys.readouterr().err
    assert "(seed 0, index 13) became non-finite at step 1 of 2" in error
    assert finished() == 1
    assert os.listdir("out/images") == ["000000.tar"]


@pytest.mark.usefixtures("broken_class")
def test_non_finite_images_are_left_out_where_asked_for() -> None:
    labels = [0] * 22
    Path("good.txt").write_text("\n".join(map(str, labels)))
    generate(f"{TINY} --out good --labels-file good.txt --format npz --npz")
    labels[8] = labels[13] = 1
    Path("labels.txt").write_text("\n".join(map(str, labels)))
    generate(f"{TINY} --out out --labels-file labels.txt --leave-out-nonfinite --format npz --npz")
    assert json.loads(Path("out/report.json").read_text())["non_finite"] == [8, 13]
    kept = [i for i in range(22) if i not in (8, 13)]
    with np.load("good/samples_22x8x8x1.npz") as good, np.load("out/samples_20x8x8x1.npz") as samples:
        np.testing.assert_array_equal(samples["arr_0"], good["arr_0"][kept])
    with np.load("out/images/000001.npz") as shard:
        assert shard["indices"].tolist() == [9, 10, 11, 12, 14, 15]
    generate("generate --verify out --quiet")


@pytest.mark.usefixtures("broken_class")
def test_a_unit_of_non_finite_images_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{TINY} --out out --labels 1 --leave-out-nonfinite", status=1)
    assert "8 images of unit 0 are not finite: image " in capsys.readouterr().err


def test_a_smaller_batch_after_out_of_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, ticks = Runner.tick, 0

    def tick(self: Runner, *arguments: Any, **options: Any) -> Any:
        nonlocal ticks
        ticks += 1
        if ticks == 9:  # in the third batch: of unit 1
            raise torch.OutOfMemoryError("no more")
        return original(self, *arguments, **options)

    generate(f"{TINY} --out whole")
    monkeypatch.setattr(Runner, "tick", tick)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        generate(f"{TINY} --out out", status=1)
    assert "out of memory with 4 lanes at a time, with which the job was begun" in capsys.readouterr().err
    assert finished() >= 1
    generate(f"{TINY} --out out")
    assert tree("out") == tree("whole")


def test_a_line_is_written_when_its_shard_is_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may reorder is synced in between: the file, its name, then the line."""
    seen: list[str] = []

    def spy(name: str, path: Any) -> None:
        if "/images/" in str(path) or str(path).endswith(".tar") or "manifest" in str(path):
            seen.append(f"{name} {'manifest' if 'manifest' in str(path) else 'shard'}")

    fsync, replace, append = os.fsync, os.replace, Manifest.append

    def synced(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        spy("directory of" if path.endswith("/images") else "fsync", f"{path}/")
        fsync(descriptor)

    def replaced(source: Any, target: Any, **folders: Any) -> None:
        spy("rename", target)
        replace(source, target, **folders)

    def appended(self: Manifest, record: Record) -> None:
        seen.append("append")
        append(self, record)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Manifest, "append", appended)
    generate(f"{TINY} --out out")
    unit = ["fsync shard", "rename shard", "directory of shard", "append", "fsync manifest"]
    assert seen[:15] == unit * 3
