"""The manifest of a bundle: what the artefact is, what it takes and returns, and the hash of every file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, StringConstraints

from stepfusion.errors import ExportError
from stepfusion.export.spec_json import ModelEntries
from stepfusion.files.json_files import FileModel, read_typed

_Version: TypeAlias = Literal["stepfusion bundle 2"]
VERSION: _Version = "stepfusion bundle 2"  # 1 had tables of 9 columns
MANIFEST = "manifest.json"
KINDS = ("network", "tick")
ANY_DEVICE = "any"
MAX_JSON_BYTES = 16 << 20
#: The inputs of each kind that are no conditions.
INPUTS = {
    "network": ("x", "timesteps", "labels"),
    "tick": (
        *("x", "row", "coefficients", "timesteps", "seed", "index", "labels", "guidance"),
        *("told", "in_scale", "history"),
    ),
}
NULL = "null_"  #: before the name of a condition: what stands for none, in a guided tick
_MOST_TENSORS = 64
_LARGEST_SIZE = 1 << 31


@dataclass(frozen=True)
class Tensorspec:
    """One input or output: its name, dtype ("float32", "int64", ...) and shape; a name, as "batch", is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        format: "onnx", "openvino", "torch-tensorrt", "tensorrt", "tensorrt-rtx", "aoti" or "triton-server".
        kind: "network" (x, timesteps[, labels], conditions by name -> out) or "tick" (one step of a sampler, the
            network inside; :class:`stepfusion.export.tick.Tick`).
        device: the kind of device it runs on: "cpu", "cuda", or "any".
        dtype: of the network: "float32", "float16" or "bfloat16".
        inputs, outputs: in the order of the call.
        versions: of the packages it was made with, and if it depends on them: "platform" as
            :func:`stepfusion.export.environment.here` says, and "compute_capability", those of the GPUs that it runs
            on, separated by blanks.
        model: the model's spec and more, as :func:`stepfusion.export.spec_json.model_to_json` writes it.
        files: relative name -> SHA-256, of every file but the manifest.
    """

    format: str
    kind: str
    device: str
    dtype: str
    inputs: tuple[Tensorspec, ...]
    outputs: tuple[Tensorspec, ...]
    versions: dict[str, str]
    model: dict[str, Any]
    files: dict[str, str]


Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
_Size: TypeAlias = Annotated[int, Field(ge=1, le=_LARGEST_SIZE)]
_Dimension: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
_Digest: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _TensorEntry(FileModel):
    name: Text
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: list[_Size | _Dimension]

    def spec(self) -> Tensorspec:
        return Tensorspec(self.name, self.dtype, tuple(self.shape))


_TensorEntries: TypeAlias = Annotated[list[_TensorEntry], Field(min_length=1, max_length=_MOST_TENSORS)]


class _ManifestFile(FileModel):
    """What ``manifest.json`` must hold; the version comes first, so that it is what an error names first."""

    version: _Version
    format: Text
    kind: Literal["network", "tick"]
    device: Text
    dtype: Literal["float32", "float16", "bfloat16"]
    inputs: _TensorEntries
    outputs: _TensorEntries
    versions: dict[Text, Text]
    model: ModelEntries
    files: dict[Text, _Digest]


def manifest_to_json(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    return to_json({"version": VERSION, **asdict(manifest)})


def to_json(value: object) -> bytes:
    """A value as the files of a bundle hold it. ValueError if it is not finite."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, every value of the type it must have; ExportError names the file and the entry."""
    given = read_typed(path, _ManifestFile, ExportError, MAX_JSON_BYTES)
    for name in given.files:
        _check_name(path, name)
    _check_tensors(path, given)
    return Manifest(
        format=given.format,
        kind=given.kind,
        device=given.device,
        dtype=given.dtype,
        inputs=tuple(entry.spec() for entry in given.inputs),
        outputs=tuple(entry.spec() for entry in given.outputs),
        versions=dict(given.versions),
        model=given.model.model_dump(exclude_unset=True),
        files=dict(given.files),
    )


def _check_tensors(path: Path, given: _ManifestFile) -> None:
    """Refuse tensors that no artefact of ours has: loading and calling one counts on this form."""
    for what, entries in (("inputs", given.inputs), ("outputs", given.outputs)):
        for entry in entries:
            if any(isinstance(size, str) for size in entry.shape[1:]):
                raise ExportError(f"{path} has {what} with {entry.name} {entry.shape}; a name may stand first alone")
    names = [entry.name for entry in given.inputs]
    if len(set(names)) < len(names):
        raise ExportError(f"{path} has inputs {', '.join(names)}; accepted are different names")
    x, image = given.inputs[0], given.model.shape
    if x.name != "x" or x.dtype == "int64" or x.shape[1:] != image:
        raise ExportError(
            f"{path} has the first input {x.name}, {x.dtype} {x.shape}; accepted is x, floating, [batch, *{image}]"
        )
    _check_history(path, given)
    out, expected = given.outputs[0], 1 + len(_histories(given))
    if len(given.outputs) != expected or out.dtype == "int64" or len(out.shape) != len(x.shape):
        raise ExportError(
            f"{path} has {len(given.outputs)} output(s), {out.name} {out.dtype} {out.shape}; accepted is one "
            "floating tensor with as many dimensions as x"
        )
    _check_conditions(path, given)


def _check_history(path: Path, given: _ManifestFile) -> None:
    """Refuse a tick's history that is no batch of images in float32, or that it does not return as it takes it."""
    for history in _histories(given):
        if history.dtype != "float32" or history.shape[2:] != given.model.shape:
            raise ExportError(
                f"{path} has the input history, {history.dtype} {history.shape}; accepted is float32, "
                f"[batch, entries, *{given.model.shape}]"
            )
        returned = [(entry.dtype, entry.shape) for entry in given.outputs[1:]]
        if returned != [(history.dtype, history.shape)]:
            raise ExportError(f"{path} has after the first output {returned}; accepted is one like the input history")


def _check_conditions(path: Path, given: _ManifestFile) -> None:
    """Refuse inputs that are neither those of every network or tick nor the model's conditions, in their order."""
    found = [entry for entry in given.inputs if entry.name not in INPUTS[given.kind]]
    prefixes = ("", NULL) if "guidance" in [entry.name for entry in given.inputs] else ("",)
    accepted = [(prefix + one.name, one.integer, one.shape) for prefix in prefixes for one in given.model.conditions]
    if [(entry.name, entry.dtype == "int64", entry.shape[1:]) for entry in found] != accepted:
        inputs = ", ".join(f"{entry.name} {entry.dtype} {entry.shape}" for entry in found)
        conditions = ", ".join(
            f"{name} {'int64' if whole else 'floating'} {shape}" for name, whole, shape in accepted
        )
        raise ExportError(
            f"{path} has inputs for conditions: {inputs or 'none'}; those of its model are {conditions or 'none'}, "
            "[batch, ...] each"
        )


def _histories(given: _ManifestFile) -> list[_TensorEntry]:
    """The input that a tick keeps things in from row to row, if it has one."""
    return [entry for entry in given.inputs if entry.name == "history" and given.kind == "tick"]


def _check_name(manifest: Path, name: str) -> None:
    """Refuse a name that is not that of a file below the bundle's directory."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and path.as_posix() == name and ".." not in path.parts and name.isprintable()
    if not plain or any(mark in name for mark in "\\:") or name in (".", MANIFEST):
        raise ExportError(f"{manifest} lists the file {name!r}, which is not a name inside the bundle")
