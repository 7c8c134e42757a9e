"""The manifest of a bundle: what the artefact is, what it takes and returns, and the hash of every file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stepfusion.errors import ExportError
from stepfusion.files.atomic import read_json

VERSION = "stepfusion bundle 2"  # 1 had tables of 9 columns
MANIFEST = "manifest.json"
KINDS = ("network", "tick")
ANY_DEVICE = "any"

_MAX_JSON_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIMENSION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


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
        kind: "network" (x, timesteps[, labels] -> out) or "tick" (one step of a sampler, the network inside).
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


def manifest_to_json(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    return to_json({"version": VERSION, **asdict(manifest)})


def to_json(value: object) -> bytes:
    """A value as the files of a bundle hold it. ValueError if it is not finite."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_bundle_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file of a bundle; ExportError if it is none, or a link."""
    if path.is_symlink():
        raise ExportError(f"{path} is a symbolic link; a bundle holds files only")
    return read_json(path, ExportError, _MAX_JSON_BYTES)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, every value of the type it must have; ExportError names the file and the entry."""
    given = read_bundle_json(path)
    if given.get("version") != VERSION:
        raise ExportError(f"{path} is of version {given.get('version')!r}; this stepfusion reads {VERSION!r}")
    fields = {*Manifest.__dataclass_fields__, "version"}
    for what, names in (("lacks", fields - set(given)), ("has the unknown entry", set(given) - fields)):
        if names:
            raise ExportError(f"{path} {what} {min(names)!r}")
    texts = {name: _text(path, name, given[name]) for name in ("format", "kind", "device", "dtype")}
    if texts["kind"] not in KINDS:
        raise ExportError(f"{path} has kind = {texts['kind']!r}; accepted are {', '.join(map(repr, KINDS))}")
    files = _texts(path, "files", given["files"])
    for name, digest in files.items():
        _check_name(path, name)
        if not _SHA256.fullmatch(digest):
            raise ExportError(f"{path} gives {name} the hash {digest!r}; accepted are 64 hexadecimal digits")
    if not isinstance(given["model"], dict):
        raise ExportError(f"{path} has model = {given['model']!r}; accepted is an object")
    return Manifest(
        **texts,
        inputs=_specs(path, "inputs", given["inputs"]),
        outputs=_specs(path, "outputs", given["outputs"]),
        versions=_texts(path, "versions", given["versions"]),
        model=given["model"],
        files=files,
    )


def _text(path: Path, name: str, value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ExportError(f"{path} has {name} = {value!r}; accepted is text")
    return value


def _texts(path: Path, name: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ExportError(f"{path} has {name} = {value!r}; accepted is an object of texts")
    return {_text(path, name, key): _text(path, f"{name}[{key!r}]", entry) for key, entry in value.items()}


def _specs(path: Path, name: str, value: object) -> tuple[Tensorspec, ...]:
    if not isinstance(value, list) or not value:
        raise ExportError(f"{path} has {name} = {value!r}; accepted is a list of tensors")
    return tuple(_spec(path, f"{name}[{i}]", entry) for i, entry in enumerate(value))


def _spec(path: Path, name: str, value: object) -> Tensorspec:
    known = isinstance(value, dict) and set(value) == {"name", "dtype", "shape"}
    if not isinstance(value, dict) or not known or not isinstance(value["shape"], list):
        raise ExportError(f"{path} has {name} = {value!r}; accepted is an object of name, dtype and shape")
    for size in value["shape"]:
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if not whole and not (isinstance(size, str) and _DIMENSION.fullmatch(size)):
            raise ExportError(f"{path} has {name} with the size {size!r}; accepted is a positive number or a name")
    return Tensorspec(
        _text(path, f"{name}.name", value["name"]), _text(path, f"{name}.dtype", value["dtype"]), (*value["shape"],)
    )


def _check_name(manifest: Path, name: str) -> None:
    """Refuse a name that is not that of a file below the bundle's directory."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and path.as_posix() == name and ".." not in path.parts
    if not plain or any(mark in name for mark in "\\:") or name in (".", MANIFEST):
        raise ExportError(f"{manifest} lists the file {name!r}, which is not a name inside the bundle")
