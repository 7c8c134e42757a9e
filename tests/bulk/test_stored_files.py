"""JSON by hand: what a job keeps is read strictly, within limits, and what is wrong is one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfusion import bulk
from stepfusion.bulk.job import read_job
from stepfusion.bulk.labels import read_labels
from stepfusion.bulk.manifest import Record
from stepfusion.bulk.messages import failure_message, finished_message, read_message
from stepfusion.bulk.report import read_report
from stepfusion.bulk.settings import read_settings
from stepfusion.errors import BulkError, NonFiniteError
from stepfusion_testing.bulk_jobs import TINY, generate, tree

BIG = 10**15
SHA = "0" * 64
REMOVED = object()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that is made once."""
    return tmp_path_factory.mktemp("template") / "out"


@pytest.fixture(autouse=True)
def _made(place: Path, template: Path) -> None:
    """A finished job in the directory ``out``."""
    if not template.exists():
        generate(f"{TINY} --out out")
        shutil.move("out", template)
    shutil.copytree(template, "out")


def edit(name: str, entry: str, value: object) -> None:
    """Set or remove an entry of a JSON file; names of entries within entries have dots between them."""
    path = Path("out", name)
    content = json.loads(path.read_text())
    *outer, last = entry.split(".")
    inner = content
    for part in outer:
        inner = inner[part]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(content))


def refused(capsys: pytest.CaptureFixture[str], words: str, command: str) -> None:
    """A command ends with one line that has these words; nothing has changed."""
    before = tree()
    capsys.readouterr()
    generate(command, status=1)
    error = capsys.readouterr().err
    assert error.startswith("stepfusion: ")
    assert error.count("\n") == 1
    assert words in error
    assert len(error) < 600
    assert tree() == before


COMMANDS = pytest.mark.parametrize("command", ["generate --verify out", f"{TINY} --out out"], ids=["verify", "go on"])


@COMMANDS
@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("num", "22", "num: Input should be a valid integer, got '22'"),
        ("num", 22.0, "num: Input should be a valid integer, got 22.0"),
        ("num", True, "num: Input should be a valid integer, got True"),
        ("num", 0, "num must be in [1, 4294967296], got 0"),
        ("num", -22, "num must be in [1, 4294967296], got -22"),
        ("num", BIG, f"num must be in [1, 4294967296], got {BIG}"),
        ("num", 1 << 32, "unit must be in [4295, 4294967296], got 8"),
        ("unit", 0, "unit must be in [1, 4294967296], got 0"),
        ("unit", "many", "unit: Input should be a valid integer, got 'many'"),
        ("first_index", -1, "first_index must be in [0, 4294967274], got -1"),
        ("first_index", (1 << 32) - 21, "first_index must be in [0, 4294967274], got 4294967275"),
        ("seed", -1, "seed must be in [0, 18446744073709551615], got -1"),
        ("seed", 1 << 64, "seed must be in [0, 18446744073709551615], got 18446744073709551616"),
        ("shape", 5, "shape: Input should be a valid array, got 5"),
        ("shape", [1, 8], "shape must be channels, height and width of an image, got [1, 8]"),
        ("shape", [1, 8, "8"], "shape.2: Input should be a valid integer, got '8'"),
        ("shape", [1, 0, 8], "shape must be in [1, 67108864], got 0"),
        ("shape", [4, 1 << 20, 1 << 20], "shape must have at most 67108864 values, got [4, 1048576, 1048576]"),
        ("classes", 3, "classes: Input should be a valid array, got 3"),
        ("classes", [], "classes must not be empty"),
        ("classes", [0, -1], "classes must be in [0, 2147483648], got -1"),
        ("classes", [0, None], "classes.1: Input should be a valid integer, got None"),
        ("labels_sha256", SHA, "classes and labels_sha256 exclude each other, got both"),
        ("guidance", "2", "guidance: Input should be a valid number, got '2'"),
        ("guidance", float("nan"), "guidance: Input should be a finite number, got nan"),
        ("guidance", float("-inf"), "guidance: Input should be a finite number, got -inf"),
        ("format", "gif", "format must be one of 'webdataset', 'png', 'npz', got 'gif'"),
        ("format", None, "format: Input should be a valid string, got None"),
        ("model", "sha", "model must be a SHA-256 in 64 hexadecimal digits, got 'sha'"),
        ("model", 5, "model: Input should be a valid string, got 5"),
        ("table_sha256", SHA.replace("0", "G"), "table_sha256 must be a SHA-256 in 64 hexadecimal digits"),
        ("table", ["ddim"], "table: Input should be a valid string, got ['ddim']"),
        ("version", "stepfusion bulk 2", "out/job.json is not of 'stepfusion bulk 1'"),
        ("version", 1, "version: Input should be a valid string, got 1"),
        ("version", REMOVED, "version: Field required"),
        ("unit", REMOVED, "unit: Field required"),
        ("colour", 1, "colour: Extra inputs are not permitted, got 1"),
    ],
)  # fmt: skip
def test_an_entry_of_a_job(entry: str, value: object, words: str, command: str, capsys: Any) -> None:
    edit("job.json", entry, value)
    refused(capsys, words, command)


@COMMANDS
@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("batch", "4", "batch: Input should be a valid integer, got '4'"),
        ("batch", 0, "batch must be in [1, 1048576], got 0"),
        ("threads", -1, "threads must be in [1, 1048576], got -1"),
        ("threads", 1.5, "threads: Input should be a valid integer, got 1.5"),
        ("invariant", 0, "invariant: Input should be a valid boolean, got 0"),
        ("device", None, "device: Input should be a valid string, got None"),
        ("versions", ["2.13"], "versions: Input should be an object, got ['2.13']"),
        ("versions.torch", 2.13, "versions.torch: Input should be a valid string, got 2.13"),
        ("dtype", REMOVED, "dtype: Field required"),
        ("colour", 1, "colour: Extra inputs are not permitted, got 1"),
    ],
)
def test_an_entry_of_the_settings(entry: str, value: object, words: str, command: str, capsys: Any) -> None:
    edit("engine.json", entry, value)
    refused(capsys, words, command)


@COMMANDS
@pytest.mark.parametrize("name", ["job.json", "engine.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Invalid JSON"),
        (b"nonsense", "Invalid JSON"),
        (b"\xff\xfe{}", "Invalid JSON"),
        (b"[1]", "Input should be an object, got [1]"),
        (b'"text"', "Input should be an object, got 'text'"),
        (b"[" * 100_000, "it is nested more than 64 deep"),
        (b'{"version": ' * 65 + b"1" + b"}" * 65, "it is nested more than 64 deep"),
        (b'{"version": ' * 20 + b"1" + b"}" * 20, "version: Input should be a valid string"),
        (b'{"num": ' + b"9" * 5000 + b"}", "Invalid JSON"),
        (b" " * ((16 << 20) + 1), "bytes"),
    ],
    ids=["empty", "nonsense", "UTF-16", "list", "text", "deep list", "deep objects", "object", "digits", "large"],
)
def test_what_is_no_such_json(content: bytes, words: str, name: str, command: str, capsys: Any) -> None:
    if name == "engine.json" and words.startswith("version"):
        words = "Field required"
    Path("out", name).write_bytes(content)
    refused(capsys, words, command)


def test_an_absurd_job_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A job of 10**15 units, in a process that may not have the memory to list them."""
    edit("job.json", "num", BIG)
    edit("job.json", "unit", 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(capsys, "num must be in", "generate --verify out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * kilobytes(1 << 10)


def kilobytes(count: int) -> int:
    """So many kilobytes in the unit in which this system tells a process's memory."""
    return count << 10 if sys.platform == "darwin" else count


def test_the_largest_job_costs_little(capsys: pytest.CaptureFixture[str]) -> None:
    """One unit of 2**32 images that says of itself that it is there; and a million units that are not."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for unit, words in (
        (1 << 32, "unit 0 has 30720 bytes in the manifest, which cannot hold its images"),
        (4295, "unit 0 has other indices than the job: out/images/000000.tar; unit 1 is not in the manifest; "),
    ):
        edit("job.json", "num", 1 << 32)
        edit("job.json", "unit", unit)
        Path("out/manifest.jsonl").write_bytes(signed({**line(0), "count": unit}))
        refused(capsys, words, "generate --verify out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * kilobytes(1 << 10)


def test_a_long_list_of_wrong_entries_costs_one_error() -> None:
    """Every entry that is wrong would make an error of its own, of half a kilobyte."""
    edit("job.json", "classes", [0.5])
    content = Path("out/job.json").read_bytes()
    Path("out/job.json").write_bytes(content.replace(b"0.5", b",".join([b"0.5"] * (3 << 20))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BulkError, match=r"classes\.0: Input should be a valid integer, got 0\.5"):
        read_job(Path("out"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * kilobytes(1 << 10)


# Lines of the manifest


def line(number: int) -> dict[str, Any]:
    """The entries of a line, without its digest."""
    entries: dict[str, Any] = json.loads(Path("out/manifest.jsonl").read_text().splitlines()[number])
    del entries["line_sha256"]
    return entries


def signed(entries: object) -> bytes:
    """A line whose digest is right, whatever it holds."""
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]
    value = {**entries, "line_sha256": digest} if isinstance(entries, dict) else entries
    return json.dumps(value).encode() + b"\n"


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("unit", "1"),
        ("unit", 1.0),
        ("unit", -1),
        ("unit", BIG),
        ("first", None),
        ("first", -8),
        ("count", 0),
        ("count", [8]),
        ("shard", "../../labels.npy"),
        ("shard", "/etc/passwd"),
        ("shard", "000001.tar\n"),
        ("shard", 1),
        ("bytes", -1),
        ("bytes", 1 << 70),
        ("sha256", "sha"),
        ("sha256", None),
        ("left_out", 8),
        ("left_out", ["8"]),
        ("left_out", list(range(8, 25))),
        ("left_out", {"8": 8}),
        ("colour", 1),
        ("sha256", REMOVED),
        ("unit", REMOVED),
        ("count", "8" * 5000),
    ],
)
def test_a_line_of_another_form_is_no_line(entry: str, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Though its digest is right: its unit is made again, and comes out the same."""
    before = tree()
    lines = Path("out/manifest.jsonl").read_bytes().splitlines(keepends=True)
    entries = line(1)
    if value is REMOVED:
        del entries[entry]
    else:
        entries[entry] = value
    Path("out/manifest.jsonl").write_bytes(lines[0] + signed(entries) + lines[2])
    refused(capsys, "unit 1 is not in the manifest", "generate --verify out")
    generate(f"{TINY} --out out")
    assert tree() == before


@pytest.mark.parametrize(
    "content",
    [b"5\n", b"[]\n", b"null\n", b"[" * 3000 + b"\n", b"{" * 5000 + b"\n", b"\n", b"\xff\n", b"x" * 1_000_000,
     b'{"unit": 1, "line_sha256": 5}\n'],
    ids=["number", "list", "null", "deep", "long", "empty", "bytes", "endless", "short"],
)  # fmt: skip
def test_what_is_no_line_does_not_hide_others(content: bytes) -> None:
    whole = Path("out/manifest.jsonl").read_bytes()
    Path("out/manifest.jsonl").write_bytes(content.rstrip(b"\n") + b"\n" + whole)
    generate("generate --verify out --quiet")
    generate(f"{TINY} --out out")
    assert Path("out/manifest.jsonl").read_bytes() == whole


def test_a_line_of_other_images_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path("out/manifest.jsonl").read_bytes().splitlines(keepends=True)
    for changes, words in (
        ({"first": 9}, "unit 1 has other indices in the manifest than in the job"),
        ({"count": 7}, "unit 1 has other indices in the manifest than in the job"),
        ({"left_out": [8]}, "unit 1 has other indices in the manifest than in the job"),
        ({"left_out": [8], "count": 7, "first": 9}, "unit 1 has other indices than the job"),
        ({"shard": "000002.tar"}, "unit 1 has the shard 000002.tar, which is not its name"),
        ({"unit": 7}, "unit 1 is not in the manifest; unit 7 is in the manifest, and the job has units 0 to 2"),
        ({"bytes": 1 << 40}, "unit 1 has 1099511627776 bytes in the manifest, which cannot hold its images"),
        ({"bytes": 7}, "unit 1 has 7 bytes in the manifest, which cannot hold its images"),
    ):
        Path("out/manifest.jsonl").write_bytes(lines[0] + signed({**line(1), **changes}) + lines[2])
        refused(capsys, words, "generate --verify out")
        Path("out/manifest.jsonl").write_bytes(b"".join(lines))


# The report, labels, and messages


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("images", "22", "images: Input should be a valid integer, got '22'"),
        ("non_finite", [1, None], "non_finite.1: Input should be a valid integer, got None"),
        ("seconds", float("inf"), "seconds: Input should be a finite number, got inf"),
        ("engine.batch", None, "engine.batch: Input should be a valid integer, got None"),
        ("engine.batch", 0, "batch must be in [1, 1048576], got 0"),
        ("engine.colour", 1, "engine.colour"),
        ("shape", REMOVED, "shape: Field required"),
        ("samples", {"file": 1, "sha256": SHA}, "samples.file: Input should be a valid string, got 1"),
    ],
)
def test_a_report_by_hand_is_a_fault(
    entry: str, value: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit("report.json", entry, value)
    refused(capsys, words, "generate --verify out")
    generate(f"{TINY} --out out")
    generate("generate --verify out --quiet")


def test_what_is_written_can_be_read() -> None:
    generate(f"{TINY} --out out --npz")
    report = read_report(Path("out"))
    assert report.to_dict() == json.loads(Path("out/report.json").read_text())
    assert report.engine == read_settings(Path("out"))
    assert report.samples is not None
    assert report.samples.sha256 == hashlib.sha256(Path("out", report.samples.file).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-8], "does not hold 5 labels"),
        (lambda data: data.replace(b"(5,)", b"(9,)"), "does not hold 5 labels"),
        (lambda data: data.replace(b"<i8", b"<f8"), "does not hold 5 labels"),
        (lambda data: b"\x93NUMPY\x01\x00" + data[8:].replace(b"(5,)", b"(1" + b"0" * 15 + b",)"), "bytes"),
        (lambda data: data[:-8] + b"\xff" * 8, "has the label -1"),
        (lambda data: b"", "does not hold 5 labels"),
    ],
)
def test_labels_by_hand(change: Callable[[bytes], bytes], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels whose hash is the job's, and which are not what a job writes."""
    shutil.rmtree("out")
    np.save("labels.npy", np.array([2, 1, 0, 3, 0]))
    generate("generate model --num 5 --unit 2 --steps 1 --out out --quiet --labels-file labels.npy")
    data = change(Path("out/labels.npy").read_bytes())
    Path("out/labels.npy").write_bytes(data)
    edit("job.json", "labels_sha256", hashlib.sha256(data).hexdigest())
    refused(capsys, words, "generate --verify out")
    with pytest.raises(BulkError, match=r"out/labels\.npy"):
        read_labels(read_job(Path("out")), Path("out"))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"[]", "the message of worker 0: Input should be an object"),
        (b'{"record": 5}', "record"),
        (b'{"record": {"unit": "1"}}', "record"),
        (b'{"error": 5, "non_finite": false}', "error: Input should be a valid string, got 5"),
        (b'{"error": "it broke", "non_finite": false}', "worker 0: it broke"),
        (b"{}", "worker 0: None"),
    ],
)
def test_messages_of_workers(message: bytes, words: str) -> None:
    with pytest.raises(BulkError, match=words):
        read_message(message, "worker 0")


def test_messages_come_back() -> None:
    record = Record(1, 8, 7, "000001.tar", 20480, SHA, (9,))
    assert read_message(finished_message(record), "worker 0") == record
    with pytest.raises(NonFiniteError, match="worker 0: image 3"):
        read_message(failure_message(NonFiniteError("image 3")), "worker 0")
    with pytest.raises(BulkError, match="worker 0: OSError: disk"):
        read_message(failure_message(OSError("disk")), "worker 0")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num": 0}, ValueError, "num must be in"),
        ({"num": 2.0}, TypeError, "num must be an integer, got 2.0"),
        ({"unit": 0}, ValueError, "unit must be in"),
        ({"shape": (8, 8)}, ValueError, "shape must be channels, height and width"),
        ({"classes": ()}, ValueError, "classes must not be empty"),
        ({"guidance": float("nan")}, ValueError, "guidance must be a finite number"),
        ({"model": "x"}, ValueError, "model must be a SHA-256"),
    ],
)
def test_a_job_in_python(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    """The same checks for those who make a job themselves."""
    job = bulk.verify(Path("out"))
    with pytest.raises(error, match=words):
        dataclasses.replace(job, **changes)
