"""How long a fresh process takes to its first image: caches empty, or filled by ``stepfusion warm``."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepfusion.bench.measure import summarise
from stepfusion.bench.models import PUBLISHED
from stepfusion.bench.options import Options
from stepfusion.bench.rows import Row

PART = "start"
_LANES = "8"
_PATIENCE = 600.0  # seconds for one process
_POLL = 0.02
_COMPILING = re.compile(r"^stepfusion: (?:compiling|compiled anew)", re.MULTILINE)
_BUNDLE = """
import sys
import stepfusion as sf

engine = sf.Engine.from_exported(sys.argv[1], device=sys.argv[2])
pixels = engine.to_uint8(engine.sample(1, steps=int(sys.argv[3]), seed=0, progress=False)).cpu()
sys.stdout.buffer.write(pixels.numpy().tobytes())
"""


class StartError(RuntimeError):
    """A process gave no image, or another one than before."""


Start = Callable[[Mapping[str, str]], tuple[float, bytes, str]]  # environment -> seconds, the image, what was said


def start_rows(options: Options) -> Iterator[Row]:
    """Cold and warm first images of ``sample``, of ``serve`` and of an exported bundle."""
    steps, rounds = options.steps or (2 if options.tiny else 10), options.rounds or (1 if options.tiny else 3)
    for model in options.models or ("fashion-mnist",):
        if model in PUBLISHED:
            raise ValueError(f"--model of start must be a bundled model or a model directory, got {model!r}")
        with tempfile.TemporaryDirectory(prefix="stepfusion-start-") as folder:
            yield from _model_rows(Path(folder), model, str(options.device), steps, rounds)


def _model_rows(folder: Path, model: str, device: str, steps: int, rounds: int) -> Iterator[Row]:
    cache, bundle = folder / "cache", folder / "bundle"
    starts: dict[str, Start] = {
        "sample": lambda environment: _sample(folder, model, device, steps, environment),
        "serve": lambda environment: _serve(model, device, steps, environment),
    }
    warmed = [["warm", model, "--batch", "1", "--lanes", _LANES, "--device", device]]
    if device == "cpu" and all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        _run(["export", model, "--format", "onnx", "--out", str(bundle), "--quiet"], os.environ)
        warmed.append(["warm", str(bundle), "--device", device])
        starts["exported bundle"] = lambda environment: _from_bundle(bundle, device, steps, environment)
    for words in warmed:
        _run([*words, "--out", str(cache), "--quiet"], os.environ)
    for name, start in starts.items():
        yield from _rows(name, start, cache, rounds, model, device, steps)


def _rows(name: str, start: Start, cache: Path, rounds: int, model: str, device: str, steps: int) -> Iterator[Row]:
    """Rounds of a cold and a warm start each, after one warm start that reads the disk."""
    cold, warm = [], []
    about: dict[str, Any] = {"device": device.partition(":")[0], "model": model, "batch": 1, "steps": steps}
    op = f"first image: {name}"
    try:
        with _caches(cache) as environment:
            _, image, _ = start(environment)
        for _ in range(rounds):
            with _caches(None) as environment:
                seconds, made, said = start(environment)
                _check(image, made, "with empty caches")
                cold.append((seconds, len(_COMPILING.findall(said))))
            with _caches(cache) as environment:
                seconds, made, said = start(environment)
                _check(image, made, "with warm caches")
                if _COMPILING.search(said):
                    raise StartError(f"a process with warm caches compiled: {said.strip().splitlines()[0]}")
                warm.append(seconds)
    except (StartError, subprocess.SubprocessError, OSError) as error:
        yield Row(PART, op, "stepfusion", error=str(error).splitlines()[0], **about)
        return
    compiled = f"empty caches; compiled {max(count for _, count in cold)} libraries or networks"
    yield Row(PART, op, "cold", notes=compiled, **about, **vars(summarise([(s, None) for s, _ in cold])))
    notes = "caches of stepfusion warm; compiled nothing"
    yield Row(PART, op, "warm", notes=notes, **about, **vars(summarise([(s, None) for s in warm])))


def _check(expected: bytes, actual: bytes, when: str) -> None:
    if hashlib.sha256(expected).digest() != hashlib.sha256(actual).digest():
        raise StartError(f"a process {when} made another image")


@contextmanager
def _caches(cache: Path | None) -> Iterator[dict[str, str]]:
    """An environment in which caches are those of a folder, or empty; Inductor's and Triton's, too."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    with tempfile.TemporaryDirectory(prefix="stepfusion-cold-") as empty:
        yield {**kept, "PYTHONSAFEPATH": "1", "STEPFUSION_CACHE": str(cache or empty)}


def _command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "stepfusion.commands.main", *words]


def _run(words: list[str], environment: Mapping[str, str]) -> str:
    """Run a command of stepfusion to its end; what it said on stderr. StartError if it failed."""
    return _finished(_command(*words), environment)[1]


def _finished(command: list[str], environment: Mapping[str, str]) -> tuple[bytes, str]:
    done = subprocess.run(command, env=environment, capture_output=True, timeout=_PATIENCE, check=False)
    said = done.stderr.decode(errors="replace")
    if done.returncode != 0:
        raise StartError(f"a process failed: {said.strip()[-200:]}")
    return done.stdout, said


def _sample(
    folder: Path, model: str, device: str, steps: int, environment: Mapping[str, str]
) -> tuple[float, bytes, str]:
    out = folder / "first.png"
    out.unlink(missing_ok=True)
    words = ["sample", model, "-n", "1", "--steps", str(steps), "--device", device, "--out", str(out), "--quiet"]
    started = time.perf_counter()
    said = _run([*words, "--no-metadata"], environment)
    return time.perf_counter() - started, out.read_bytes(), said


def _from_bundle(bundle: Path, device: str, steps: int, environment: Mapping[str, str]) -> tuple[float, bytes, str]:
    started = time.perf_counter()
    image, said = _finished([sys.executable, "-c", _BUNDLE, str(bundle), device, str(steps)], environment)
    return time.perf_counter() - started, image, said


def _serve(model: str, device: str, steps: int, environment: Mapping[str, str]) -> tuple[float, bytes, str]:
    """From the start of a server to the first image that it sends."""
    words = ["serve", model, "--local", "--port", "0", "--device", device, "--lanes", _LANES, "--no-metadata"]
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            _command(*words, "--log-level", "error"), env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().rpartition(" at ")[2].strip()
            if not address:
                raise StartError("the server ended before it listened")
            image = _first_answer(process, f"{address}/v1/generate", {"steps": steps, "seed": 0}, started)
            seconds = time.perf_counter() - started
        finally:
            process.terminate()
            process.communicate(timeout=60)
            log.seek(0)
            said = log.read()
    return seconds, image, said


def _first_answer(process: subprocess.Popen[str], url: str, body: Mapping[str, object], started: float) -> bytes:
    """The answer to a request that is sent again for as long as the server is not ready."""
    headers = {"Content-Type": "application/json", "Accept": "image/png"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    while process.poll() is None and time.perf_counter() < started + _PATIENCE:
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                image: bytes = answer.read()
                return image
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise StartError(f"the server answered {error.code}: {error.read()[:100]!r}") from error
        except OSError:
            pass  # nobody listens yet
        time.sleep(_POLL)
    raise StartError("the server ended, or did not become ready")
