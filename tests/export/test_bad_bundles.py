"""A bundle that was spoiled, by accident or on purpose, is refused in a sentence before anything in it is opened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import stepfusion as sf
from stepfusion.export.bundle import read_bundle, sha256, write_bundle
from stepfusion.export.load import load_network
from stepfusion.export.manifest import Manifest, Tensorspec
from stepfusion.export.spec_json import batch_from_json, model_to_json, spec_from_json
from stepfusion.kernels import COLUMNS
from stepfusion_testing.networks import tiny_unet


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change entries of the manifest; None removes one."""

    def spoil(directory: Path) -> None:
        path = directory / "manifest.json"
        given = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in given.items() if value is not None}))

    return spoil


def edit_files(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        edit(files=change(json.loads((directory / "manifest.json").read_text())["files"]))(directory)

    return spoil


def link(directory: Path) -> None:
    path = directory / "model.onnx"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def linked_folder(directory: Path) -> None:
    (directory.parent / "folder").mkdir()
    (directory / "folder").symlink_to(directory.parent / "folder")


def change_a_byte(directory: Path) -> None:
    data = bytearray((directory / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "model.onnx").write_bytes(data)


def truncate(directory: Path) -> None:
    os.truncate(directory / "model.onnx", 1000)


def rehash(name: str, data: bytes) -> Callable[[Path], None]:
    """Write a file together with its hash, as somebody who knows bundles would."""

    def spoil(directory: Path) -> None:
        (directory / name).write_bytes(data)
        edit_files(lambda files: {**files, name: sha256(directory / name)})(directory)

    return spoil


def edit_part(file: str, part: str) -> Callable[..., Callable[[Path], None]]:
    """What changes entries of an object in a file: the first input, the model, or the whole table."""

    def changing(**changes: Any) -> Callable[[Path], None]:
        def spoil(directory: Path) -> None:
            given = json.loads((directory / file).read_text())
            target = {"input": lambda: given["inputs"][0], "model": lambda: given["model"], "": lambda: given}[part]()
            target.update(changes)
            (directory / file).write_text(json.dumps(given))
            if file != "manifest.json":
                rehash(file, (directory / file).read_bytes())(directory)

        return spoil

    return changing


edit_input, edit_model = edit_part("manifest.json", "input"), edit_part("manifest.json", "model")
edit_table = edit_part("table.json", "")


def linked_manifest(directory: Path) -> None:
    (directory / "manifest.json").rename(directory.parent / "manifest.json")
    (directory / "manifest.json").symlink_to(directory.parent / "manifest.json")


DIGEST = "0" * 64
SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of the artefact": (
        change_a_byte,
        r"model.onnx has SHA-256 \w{64}; the manifest says \w{64}$",
    ),
    "a truncated artefact": (truncate, r"model.onnx has SHA-256 [0-9a-f]{64}; the manifest says"),
    "a hash": (
        edit_files(lambda files: {**files, "model.onnx": DIGEST}),
        rf"; the manifest says {DIGEST}$",
    ),
    "no hash": (
        edit_files(lambda files: {**files, "model.onnx": "x"}),
        r"files.model.onnx: String should match pattern .*, got 'x'$",
    ),
    "a missing artefact": (
        lambda d: (d / "model.onnx").unlink(),
        r"model.onnx is missing, and the manifest lists",
    ),
    "a missing manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest.json is missing$"),
    "a stray file": (lambda d: (d / "stray.py").write_text(""), r"stray.py is not in the manifest$"),
    "a link": (link, r"model.onnx is a symbolic link"),
    "a linked folder": (linked_folder, r"folder is a symbolic link"),
    "a name above": (
        edit_files(lambda files: {**files, "../secret": DIGEST}),
        r"lists the file '../secret', which is not a name inside the bundle$",
    ),
    "a name above, inside": (edit_files(lambda files: {**files, "a/../b": DIGEST}), r"lists the file 'a/../b'"),
    "an absolute name": (edit_files(lambda files: {**files, "/etc/passwd": DIGEST}), r"lists the file '/etc/passwd'"),
    "a Windows name": (edit_files(lambda files: {**files, "..\\b": DIGEST}), r"lists the file"),
    "the manifest itself": (edit_files(lambda files: {**files, "manifest.json": DIGEST}), r"'manifest.json'"),
    "an unprintable name": (edit_files(lambda files: {**files, "a\nb": DIGEST}), r"lists the file 'a\\nb'"),
    "another version": (
        edit(version="stepfusion bundle 1"),
        r"manifest.json: version: Input should be 'stepfusion bundle 2', got 'stepfusion bundle 1'$",
    ),
    "no version": (edit(version=None), r"manifest.json: version: Field required$"),
    "an unknown entry": (edit(extra=1), r"manifest.json: extra: Extra inputs are not permitted, got 1$"),
    "a missing entry": (edit(dtype=None), r"manifest.json: dtype: Field required$"),
    "a number as dtype": (edit(dtype=32), r"manifest.json: dtype: Input should be 'float32', .*, got 32$"),
    "an unknown dtype": (edit(dtype="float8"), r"manifest.json: dtype: Input should be 'float32', .*, got 'float8'$"),
    "another kind": (edit(kind="loop"), r"manifest.json: kind: Input should be 'network' or 'tick', got 'loop'$"),
    "files as a list": (edit(files=[]), r"manifest.json: files: Input should be an object, got \[\]$"),
    "inputs as a text": (edit(inputs="x"), r"manifest.json: inputs: Input should be a valid array, got 'x'$"),
    "an input of size 0": (
        edit_input(shape=[0]),
        r"manifest.json: inputs.0.shape.0.*greater than or equal to 1, got 0$",
    ),
    "an input of a half size": (edit_input(shape=[1.5]), r"manifest.json: inputs.0.shape.0.*, got 1.5$"),
    "an input of an unknown dtype": (
        edit_input(dtype="int128"),
        r"inputs.0.dtype: Input should be .*, got 'int128'$",
    ),
    "an integral image": (edit_input(dtype="int64"), r"has the first input x, int64 .*; accepted is x, floating, "),
    "an image of another shape": (
        edit_input(shape=["batch", 3, 8, 8]),
        r"accepted is x, floating, \[batch, \*\[1, 8, 8\]\]$",
    ),
    "a second dynamic size": (edit_input(shape=["batch", 1, "h", 8]), r"with x .*; a name may stand first alone$"),
    "an integral output": (
        edit(outputs=[{"name": "out", "dtype": "int64", "shape": ["batch", 1, 8, 8]}]),
        r"has 1 output\(s\), out int64 .*; accepted is one floating tensor",
    ),
    "two outputs": (
        edit(outputs=[{"name": name, "dtype": "float32", "shape": ["batch", 1, 8, 8]} for name in "ab"]),
        r"has 2 output\(s\), a float32 .*; accepted is one floating tensor",
    ),
    "inputs of one name": (
        edit(inputs=[{"name": "x", "dtype": "float32", "shape": ["batch", 1, 8, 8]}] * 2),
        r"has inputs x, x; accepted are different names$",
    ),
    "no name of the schedule": (
        edit_model(schedule={"betas": [0.5]}),
        r"manifest.json: model.schedule.name: Field required$",
    ),
    "betas beyond 1": (edit_model(schedule={"betas": [2.0], "name": "x"}), r"cannot be used: betas must lie in"),
    "betas as texts": (
        edit_model(schedule={"betas": ["0.5"], "name": "x"}),
        r"model.schedule.betas.0: .* number, got '0.5'",
    ),
    "labels for no classes": (
        edit_model(num_classes=None, null_label=1, class_names=None),
        r"cannot be used: null_label is 1, and the model takes no labels$",
    ),
    "names of other classes": (edit_model(class_names=["a"]), r"cannot be used: class_names must name each of the 4"),
    "names as a text": (
        edit_model(class_names="abc"),
        r"model.class_names: Input should be a valid array, got 'abc'$",
    ),
    "another prediction": (edit_model(prediction="score"), r"cannot be used: prediction must be one of"),
    "a shape of nothing": (edit_model(shape=[0]), r"accepted is x, floating, \[batch, \*\[0\]\]$"),
    "a batch that falls": (edit_model(batch=[2, 1, 4]), r"cannot be used: batch must have low <= best <= high"),
    "a batch of one number": (
        edit_model(batch=[1]),
        r"model.batch: List should have at least 3 items .*, got \[1\]$",
    ),
    "an option of no sampler": (edit_model(options={"clop": 1}), r"cannot be used: .*options.*'clop'"),
    "a clip that is a text": (edit_model(options={"clip": "x"}), r"cannot be used: clip must be .*, got 'x'$"),
    "a clip below zero": (edit_model(options={"clip": -1}), r"cannot be used: clip must be .*-1"),
    "a spacing that there is not": (edit_model(options={"spacing": "x"}), r"cannot be used: spacing must be .*'x'"),
    "an option that is a table": (edit_model(options={"clip": {"a": 1}}), r"manifest.json: model.options.clip"),
    "a truncated manifest": (lambda d: os.truncate(d / "manifest.json", 100), r"manifest.json: Invalid JSON: EOF"),
    "a manifest that is a list": (
        lambda d: (d / "manifest.json").write_text("[]"),
        r"Input should be an object, got \[\]$",
    ),
    "a manifest nested deep": (
        lambda d: (d / "manifest.json").write_text("[" * 100_000),
        r"manifest.json: it is nested more than \d+ deep$",
    ),
    "a manifest nested deep inside": (
        lambda d: (d / "manifest.json").write_text('{"version": ' + '{"a": ' * 5000 + "1" + "}" * 5001),
        r"manifest.json: it is nested more than \d+ deep$",
    ),
    "a manifest of 17 MB": (
        lambda d: os.truncate(d / "manifest.json", 17 << 20),
        r"manifest.json is larger than \d+ bytes$",
    ),
    "a manifest that is a link": (linked_manifest, r"manifest.json cannot be read: .* symbolic link"),
    "NaN in the table": (
        edit_table(coefficients=[[math.nan] * len(COLUMNS)] * 4),
        r"table.json: coefficients.0.0: .* finite number",
    ),
    "an empty table": (rehash("table.json", b"{}"), r"table.json: name: Field required$"),
    "a table nested deep": (rehash("table.json", b"[" * 100_000), r"table.json: it is nested more than \d+ deep$"),
    "a table of other columns": (
        edit_table(columns=["a"]),
        r"table.json cannot be used: columns are \['a'\]; accepted",
    ),
    "a short row": (
        edit_table(coefficients=[[0.0]]),
        rf"table.json cannot be used: row 0 of coefficients must have {len(COLUMNS)} entries, got 1$",
    ),
    "no rows": (
        edit_table(coefficients=[], timesteps=[], next_row=[]),
        r"table.json cannot be used: a table must have rows with timesteps in",
    ),
    "infinity where there is no clip": (
        edit_table(coefficients=[[None] * len(COLUMNS)] * 4),
        r"table.json cannot be used: coefficient x0_x of row 0 .* is inf",
    ),
    "a timestep beyond int64": (edit_table(timesteps=[1 << 70] * 4), r"table.json cannot be used: .*(int|too large)"),
    "a timestep beyond the schedule": (edit_table(timesteps=[1000] * 4), r"with timesteps in \[0, 999\]"),
    "a row beyond the table": (edit_table(next_row=[1, 2, 3, 9]), r"cannot be used: next_row must lie in \[-1, 3\]"),
    "a text as a row": (edit_table(next_row=["1", 2, 3, -1]), r"table.json: next_row.0: .* integer, got '1'$"),
    "rows that form a cycle": (edit_table(next_row=[1, 2, 3, 0]), r"table.json cannot be used: next_row must"),
    "rows that lead back": (edit_table(next_row=[1, 0, 3, -1]), r"table.json cannot be used: next_row must"),
    "a row that is left out": (edit_table(next_row=[2, 2, 3, -1]), r"table.json cannot be used: next_row must"),
    "an end too early": (edit_table(next_row=[1, -1, 3, -1]), r"table.json cannot be used: next_row must"),
    "a negative start": (edit_table(starts=[-1]), r"table.json cannot be used: starts must"),
    "a start beyond the table": (edit_table(starts=[0, 4]), r"table.json cannot be used: starts must"),
    "no start": (edit_table(starts=[]), r"table.json cannot be used: starts must"),
}


@pytest.mark.parametrize("what", SPOILERS)
def test_a_spoiled_bundle_is_refused_before_anything_is_loaded(
    what: str, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the artefact was opened")

    monkeypatch.setattr("stepfusion.export.load.OnnxRuntimeNetwork", forbidden)
    spoil, message = SPOILERS[what]
    spoil(bundle_copy)
    with pytest.raises(sf.ExportError, match=message):
        load_network(bundle_copy)


def test_the_untouched_copy_is_loaded(bundle_copy: Path) -> None:
    assert load_network(bundle_copy).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"betas": [2.0], "name": "x"}}, r"cannot be used: betas must lie in"),
        ({"prediction": "score"}, r"cannot be used: prediction must be one of"),
        ({"shape": [0]}, r"cannot be used: shape must be in"),
    ],
)
def test_entries_that_make_no_spec_are_refused(engine: sf.Engine, change: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.ExportError, match=message):
        spec_from_json({**model_to_json(engine), **change})
    model = model_to_json(engine)
    del model[next(iter(change))]
    with pytest.raises(sf.ExportError, match=f"lacks '{next(iter(change))}'"):
        spec_from_json(model)


@pytest.mark.parametrize(
    ("batch", "message"), [([2, 1, 4], r"cannot be used: batch must have low"), ([1], r"cannot be used: ")]
)
def test_entries_that_make_no_batch_are_refused(engine: sf.Engine, batch: list[int], message: str) -> None:
    with pytest.raises(sf.ExportError, match=message):
        batch_from_json({**model_to_json(engine), "batch": batch})
    with pytest.raises(sf.ExportError, match="lacks 'batch'"):
        batch_from_json({})


# Any value of another type, anywhere

VALUES = (None, True, 1.5, -1, 10**30, "x", "", [], [[]], {}, {"a": []})


def places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value, of lists no more than the first entry."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from places(entry, *path, key)
    if isinstance(value, list) and value:
        yield from places(value[0], *path, 0)


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """A copy of a JSON value with another value in one place."""
    made = json.loads(json.dumps(value))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = by
    return made


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle that is read in no time."""
    engine = sf.Engine(
        tiny_unet(), sf.NoiseSchedule.cosine(8), null_label=3, class_names=("a", "b", "c"), options={"clip": 2.0}
    )
    image = ("batch", *engine.shape)
    tensors = (Tensorspec("x", "float32", image), Tensorspec("timesteps", "int64", ("batch",)))
    made = Manifest(
        "onnx", "network", "any", "float32", tensors, tensors[:1], {"torch": "2"}, model_to_json(engine), {}
    )
    write_bundle(tmp_path / "small", made, lambda folder: None, table=engine.table(steps=2))
    return tmp_path / "small"


@pytest.mark.parametrize("file", ["manifest.json", "table.json"])
def test_any_value_of_another_type_is_refused_in_a_sentence_or_does_no_harm(file: str, small: Path) -> None:
    original = (small / file).read_text()
    given = json.loads(original)
    refused: list[str] = []
    accepted = 0
    for path in places(given):
        for value in VALUES:
            (small / file).write_text(json.dumps(replaced(given, path, value)))
            if file != "manifest.json":
                rehash(file, (small / file).read_bytes())(small)
            try:
                bundle = read_bundle(small)
            except sf.ExportError as error:
                refused.append(str(error))
                continue
            accepted += 1
            assert bundle.spec.table("ddim", 2) is not None
            assert bundle.table is not None
            assert bundle.table.steps() == len(bundle.table)
    assert len(refused) > accepted > 0
    assert [said for said in refused if "\n" in said or len(said) > 500] == []
