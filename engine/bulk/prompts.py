"""The prompts of a job, one for each image: read from a user's file, and kept in prompts.txt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stepfusion.bulk.job import JOB, PROMPTS, Job
from stepfusion.errors import BulkError
from stepfusion.files.atomic import atomic_write_below
from stepfusion.files.regular import read_regular

MOST_PROMPTS = 1_000_000
LONGEST_PROMPT = 10_000  # characters
_MAX_BYTES = 1 << 30


def read_prompts_file(path: Path, *, name: str = "prompts") -> list[str]:
    """The prompts of a user's file: UTF-8 text, one on a line; an empty line is the empty prompt.

    Args:
        path: the file. A byte order mark and the carriage returns of Windows are no part of the prompts.
        name: of the argument, for messages.

    Raises:
        ValueError: the file is missing, empty, too large or no such text, or a prompt is too long.
    """
    if not path.is_file():
        raise ValueError(f"{name} {path} is missing, or no file")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{name} {path} is larger than {_MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name} {path} is not UTF-8 text: line {line} has another byte") from None
    prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not any(prompts):
        raise ValueError(f"{name} {path} has no prompt: it is empty")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"{name} {path} must have at most {MOST_PROMPTS} lines, got {len(prompts)}")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > LONGEST_PROMPT:
            most = f"at most {LONGEST_PROMPT} characters"
            raise ValueError(f"{name} {path} must have {most} on a line, got {len(prompt)} on line {number}")
        if "\0" in prompt:
            raise ValueError(f"{name} {path} must not have a NUL character, got one on line {number}")
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts.txt of prompts."""
    return hashlib.sha256(_content(prompts)).hexdigest()


def write_prompts(prompts: Sequence[str], out: Path) -> None:
    """Write prompts to prompts.txt, unless that is what it holds."""
    data = _content(prompts)
    with suppress(FileNotFoundError):
        if read_regular(out / PROMPTS, _MAX_BYTES) == data:
            return
    atomic_write_below(out, PROMPTS, data)


def read_prompts(job: Job, out: Path) -> list[str] | None:
    """The prompts of prompts.txt; None if the job has none. BulkError if the file is damaged."""
    if job.prompts_sha256 is None:
        return None
    try:
        data = read_regular(out / PROMPTS, _MAX_BYTES)
    except OSError as error:
        raise BulkError(f"{out / PROMPTS} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != job.prompts_sha256:
        raise BulkError(f"{out / PROMPTS} is damaged: its hash is not the one in {JOB}")
    prompts = data.decode().removesuffix("\n").split("\n")
    if len(prompts) != job.num:
        raise BulkError(f"{out / PROMPTS} does not hold {job.num} prompts")
    return prompts


def _content(prompts: Sequence[str]) -> bytes:
    """prompts.txt of prompts."""
    return "".join(f"{prompt}\n" for prompt in prompts).encode()
