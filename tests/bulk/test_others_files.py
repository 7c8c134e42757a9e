"""Files of others in the directory of a job: they are not followed, not waited for, not changed and not removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stepfusion.bulk.manifest import read_records, write_sorted
from stepfusion.bulk.shards import FORMATS
from stepfusion_testing.bulk_jobs import TINY, generate, tree

pytestmark = pytest.mark.skipif(os.name != "posix", reason="makes links and pipes")

LABELLED = f"{TINY} --npz --labels-file labels.txt"
HEX = "0123456789abcdef" * 2

Change = Callable[[Path], None]
Made = Callable[..., None]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs that were made once, by their formats."""
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
def made(templates: Path, outside: Path) -> Made:
    """Makes a finished job in the directory ``out``, of which the last unit is missing in the manifest."""

    def make(form: str = "webdataset", units: int = 2) -> None:
        if not (templates / form).exists():
            generate(f"{LABELLED} --out out --format {form}")
            shutil.move("out", templates / form)
        shutil.copytree(templates / form, "out")
        records = read_records(Path("out"))
        write_sorted(Path("out"), [record for record in records.values() if record.unit < units])

    return make


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """What waits for a pipe fails."""

    def fail(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outside(place: Path) -> Path:
    """A directory of somebody else, with a file, and a file."""
    Path("labels.txt").write_text("0\n" * 22)
    (place / "theirs").mkdir()
    (place / "theirs" / "thesis.txt").write_text("years of work\n")
    (place / "theirs.txt").write_text("more of it\n")
    return place / "theirs"


def snapshot(place: Path) -> dict[str, tuple[str, object]]:
    """Everything below a folder, as it is: kinds, contents of regular files, and where links point."""
    found: dict[str, tuple[str, object]] = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            content: object = path.read_bytes() if stat.S_ISREG(mode) else None
            if stat.S_ISLNK(mode):
                content = os.readlink(path)
            found[str(path.relative_to(place))] = (stat.filemode(mode), content)
    return found


def replace_by_link(to: Path) -> Change:
    """Put a link in the place of a file or folder."""

    def change(path: Path) -> None:
        remove(path)
        path.symlink_to(to)

    return change


def replace_by_pipe(path: Path) -> None:
    """Put a pipe, which nobody writes to, in the place of a file or folder."""
    remove(path)
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    """Put a folder with a file in the place of a file."""
    remove(path)
    path.mkdir()
    (path / "thesis.txt").write_text("years of work\n")


def replace_by_file(path: Path) -> None:
    """Put a file in the place of a folder."""
    remove(path)
    path.write_text("years of work\n")


def remove(path: Path) -> None:
    """Remove a file or folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def refused(capsys: pytest.CaptureFixture[str], place: Path, form: str, *names: str) -> str:
    """Going on is refused in one sentence that names these, and nothing at all has changed; returns the sentence."""
    before = snapshot(place)
    capsys.readouterr()
    generate(f"{LABELLED} --out out --format {form}", status=1)
    error = capsys.readouterr().err
    assert error.startswith("stepfusion: ")
    assert error.count("\n") == 1
    assert all(name in error for name in names), error
    assert snapshot(place) == before
    return error


FILES = [
    "job.json", "engine.json", "labels.npy", "manifest.jsonl", "manifest-1.jsonl", "report.json", ".lock",
    ".finish.lock", "samples_22x8x8x1.npz", f".manifest.jsonl.{HEX}.tmp", "images/000001.tar", "images/000002.tar",
    f"images/.000002.tar.{HEX}.tmp",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_job_whose_file_was_replaced_is_refused(
    name: str, kind: str, made: Made, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made()
    change = {
        "link": replace_by_link(outside.with_suffix(".txt")),
        "dangling link": replace_by_link(outside / "nothing"),
        "pipe": replace_by_pipe,
        "folder": replace_by_folder,
    }[kind]
    path = Path("out", name)
    change(path)
    refused(capsys, outside.parent, "webdataset", path.name, {"dangling link": "link"}.get(kind, kind))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("unit", ["000001", "000002"], ids=["finished", "missing"])
def test_a_shard_that_is_a_link_is_refused(
    form: str, unit: str, made: Made, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a shard as a link to another folder was emptied, and pictures were written into it."""
    made(form)
    shard = Path("out/images", f"{unit}{FORMATS[form].suffix}")
    replace_by_link(outside if form == "png" else outside.with_suffix(".txt"))(shard)
    error = refused(capsys, outside.parent, form, shard.name)
    assert "is a symbolic link" in error


def test_images_elsewhere_are_refused(made: Made, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made()
    shutil.copytree("out/images", outside / "images")
    replace_by_link(outside / "images")(Path("out/images"))
    refused(capsys, outside.parent, "webdataset", "images is a symbolic link, and a job has a folder there")


def test_a_file_in_place_of_a_folder_is_refused(
    made: Made, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made("png")
    replace_by_file(Path("out/images/000001"))
    refused(capsys, outside.parent, "png", "000001 is a file, and a job has a folder there")


@pytest.mark.parametrize("unit", ["000001", "000002"], ids=["finished", "missing"])
@pytest.mark.parametrize("kind", ["file", "link", "pipe", "folder"])
def test_what_lies_in_the_folder_of_a_shard_is_kept(
    unit: str, kind: str, made: Made, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder would be made again, for its size is another, and everything in it would be lost."""
    made("png")
    put = {
        "file": replace_by_file,
        "link": replace_by_link(outside),
        "pipe": replace_by_pipe,
        "folder": replace_by_folder,
    }[kind]
    put(Path("out/images", unit, "notes.txt"))
    Path("out/images", unit, "metadata.csv").unlink()
    before = snapshot(outside.parent)
    generate(f"{LABELLED} --out out --format png", status=1)
    assert "notes.txt is " in capsys.readouterr().err
    assert snapshot(outside.parent) == before


def test_a_picture_that_is_a_link_is_refused(made: Made, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("png")
    replace_by_link(outside.with_suffix(".txt"))(Path("out/images/000001/0000000009.png"))
    refused(capsys, outside.parent, "png", "0000000009.png is a symbolic link")


@pytest.mark.parametrize(
    "name",
    [f".thesis.txt.{HEX}.tmp", f"images/.thesis.{HEX}.tmp", f".images.{HEX}.tmp", "manifest-old.jsonl",
     "manifest-02.jsonl.bak", "manifest.jsonl~", ".thesis", f"images/.000002.tar.{HEX}.tmp.txt"],
)  # fmt: skip
def test_files_under_names_that_are_not_ours_are_kept(name: str, made: Made, outside: Path) -> None:
    """Half-written files were removed whatever they were to become, and parts of manifests whatever their number."""
    made()
    Path("out", name).write_text("years of work\n")
    generate(f"{LABELLED} --out out")
    assert Path("out", name).read_text() == "years of work\n"


def test_what_a_killed_run_left_is_removed(made: Made, outside: Path) -> None:
    """The control of the tests above."""
    made()
    left = [Path("out", name) for name in (f".manifest.jsonl.{HEX}.tmp", f"images/.000002.tar.{HEX}.tmp")]
    for path in left:
        path.write_text("half of it")
    generate(f"{LABELLED} --out out")
    assert not any(path.exists() for path in left)


def test_another_name_of_the_manifest_keeps_its_content(outside: Path) -> None:
    """As in a backup that was made of hard links."""
    generate(f"{TINY} --out whole")
    generate(f"{TINY} --out out")
    records = read_records(Path("out"))
    write_sorted(Path("out"), [records[0]])
    os.link("out/manifest.jsonl", "backup.jsonl")
    before = Path("backup.jsonl").read_bytes()
    generate(f"{TINY} --out out")
    assert Path("backup.jsonl").read_bytes() == before
    assert tree("out") == tree("whole")


def test_a_lock_with_something_in_it_is_not_ours(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/.lock").write_text("years of work\n")
    refused(capsys, outside.parent, "webdataset", "out/.lock is not empty")


@pytest.mark.parametrize("content", ["{}", '{"job": "another program"}', "[1]", "not JSON", ""])
def test_the_job_of_another_program_is_left_alone(
    content: str, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even a lock is made beside it."""
    Path("out").mkdir()
    Path("out/job.json").write_text(content)
    refused(capsys, outside.parent, "webdataset", "out/job.json")


# Checking


def unsound(capsys: pytest.CaptureFixture[str], place: Path, *words: str) -> None:
    """``--verify`` says what is wrong in one line with these words, and changes nothing."""
    before = snapshot(place)
    capsys.readouterr()
    generate("generate --verify out", status=1)
    error = capsys.readouterr().err
    assert error.startswith("stepfusion: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert snapshot(place) == before


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_shard_that_is_no_file_is_not_sound(
    form: str, kind: str, made: Made, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Links to shards that are sound, too: they are elsewhere, and may change."""
    made(form, 3)
    shard = Path("out/images", f"000001{FORMATS[form].suffix}")
    elsewhere = outside / shard.name
    shutil.move(shard, elsewhere)
    (replace_by_link(elsewhere) if kind == "link" else replace_by_pipe)(shard)
    what = "a symbolic link" if kind == "link" else "a pipe"
    unsound(capsys, outside.parent, f"unit 1 cannot be read: {shard} is {what}, and a job has a f")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_picture_that_is_no_file_is_not_sound(
    kind: str, made: Made, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made("png", 3)
    picture = Path("out/images/000001/0000000009.png")
    shutil.move(picture, outside / "picture.png")
    (replace_by_link(outside / "picture.png") if kind == "link" else replace_by_pipe)(picture)
    what = "a symbolic link" if kind == "link" else "a pipe"
    unsound(capsys, outside.parent, f"unit 1 cannot be read: {picture} is {what}, and a job has a file there")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["manifest.jsonl", "job.json", "engine.json", "report.json", "labels.npy"])
def test_records_that_are_no_files_are_not_read(
    name: str, kind: str, made: Made, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(units=3)
    path = Path("out", name)
    shutil.move(path, outside / name)
    {"link": replace_by_link(outside / name), "pipe": replace_by_pipe, "folder": replace_by_folder}[kind](path)
    unsound(capsys, outside.parent, f"out/{name}", {"link": "symbolic link"}.get(kind, kind))


def test_images_elsewhere_are_not_sound(made: Made, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(units=3)
    shutil.move("out/images", outside / "images")
    replace_by_link(outside / "images")(Path("out/images"))
    unsound(capsys, outside.parent, "symbolic link")


def test_a_directory_that_is_named_by_a_link_is_the_users_choice(place: Path) -> None:
    """Links on the way to the directory are followed, as those are that name a larger disk."""
    (place / "disk").mkdir()
    Path("out").symlink_to(place / "disk")
    generate(f"{TINY} --out out")
    generate(f"{TINY} --out out")
    generate("generate --verify out --quiet")
    assert json.loads((place / "disk" / "report.json").read_text())["images"] == 22
