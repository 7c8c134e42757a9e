"""JSON files: bounded before they are parsed, strict when they are, and one sentence that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import Field

from stepfusion.files.json_files import MAX_DEPTH, FileModel, check_depth, read_json, read_typed


class Inner(FileModel):
    names: list[str]


class Job(FileModel):
    num: int = Field(ge=1)
    rate: float
    inner: Inner | None = None


GOOD = {"num": 3, "rate": 0.5, "inner": {"names": ["a"]}}


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(LookupError) as caught:
        read_typed(path, Job, LookupError, 1000)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.removeprefix(f"{path}: ")


def test_what_is_right_is_read(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(GOOD))
    assert read_typed(tmp_path / "job.json", Job, LookupError, 1000).inner == Inner(names=["a"])
    assert read_json(tmp_path / "job.json", LookupError, 1000) == GOOD


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num": "3"}, "num: Input should be a valid integer, got '3'"),
        ({"num": 3.0}, "num: Input should be a valid integer, got 3.0"),
        ({"num": True}, "num: Input should be a valid integer, got True"),
        ({"num": 0}, "num: Input should be greater than or equal to 1, got 0"),
        ({"num": None}, "num: Input should be a valid integer, got None"),
        ({"rate": "x" * 99}, f"rate: Input should be a valid number, got '{'x' * 56}..."),
        ({"rate": float("nan")}, "rate: Input should be a finite number, got nan"),
        ({"rate": float("inf")}, "rate: Input should be a finite number, got inf"),
        ({"inner": 5}, "inner: Input should be an object, got 5"),
        ({"inner": {"names": "abc"}}, "inner.names: Input should be a valid array, got 'abc'"),
        ({"inner": {"names": ["a", 5]}}, "inner.names.1: Input should be a valid string, got 5"),
        ({"inner": {}}, "inner.names: Field required"),
        ({"nmu": 1}, "nmu: Extra inputs are not permitted, got 1"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "job.json", json.dumps({**GOOD, **change}).encode()) == sentence


@pytest.mark.parametrize("data", [b"", b"[]", b"nul", b'{"num": ', b"\xff\xfe", b"5", b"{}{}"])
def test_what_is_no_object_is_refused(data: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path / "job.json", data)
    with pytest.raises(LookupError, match=r"job\.json"):
        read_json(tmp_path / "job.json", LookupError, 1000)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_deep_nesting_is_refused_before_it_is_parsed(opening: bytes, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_bytes(opening * 100_000)
    for read in (lambda: read_json(path, LookupError, 1 << 20), lambda: read_typed(path, Job, LookupError, 1 << 20)):
        with pytest.raises(LookupError, match=f"it is nested more than {MAX_DEPTH} deep"):
            read()


def test_depth_is_that_of_brackets_outside_strings() -> None:
    check_depth(b'{"a": "' + b"[" * 1000 + b'", "b": "\\"' + b"{" * 1000 + b'"}')
    check_depth(b"[]" * 1000)
    check_depth(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(ValueError, match="nested more than"):
        check_depth(b'"\\\\"' + b"[" * (MAX_DEPTH + 1))
    check_depth(b'"' + b'\\"' * 500_000 + b"[" * 100)  # a string that never ends takes no longer than another


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    assert refusal(tmp_path / "job.json", b" " * 1001) == f"{tmp_path / 'job.json'} is larger than 1000 bytes"
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(1 << 40)
    for read in (read_json, lambda path, error, most: read_typed(path, Job, error, most)):
        with pytest.raises(LookupError, match="is larger than 1000 bytes"):
            read(tmp_path / "sparse.json", LookupError, 1000)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
def test_links_and_pipes(tmp_path: Path) -> None:
    """A pipe is never waited for. A link is followed to a downloaded model's file, and not to one of ours."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").write_text(json.dumps(GOOD))
    (tmp_path / "link").symlink_to("real")
    assert read_json(tmp_path / "link", LookupError, 1000) == GOOD
    for name, what in (("pipe", "a pipe"), ("link", "a symbolic link")):
        with pytest.raises(LookupError, match=f"{name} cannot be read: it is {what}"):
            read_typed(tmp_path / name, Job, LookupError, 1000)
    with pytest.raises(LookupError, match="pipe cannot be read: it is a pipe"):
        read_json(tmp_path / "pipe", LookupError, 1000)
    with pytest.raises(LookupError, match="nowhere is missing"):
        read_typed(tmp_path / "nowhere", Job, LookupError, 1000)
