"""A bundle: the directory that an export writes, and that is verified whole before anything in it is opened.

::

    DIR/manifest.json    what it is: format, kind, device, dtype, inputs, outputs, versions, model, hash of each file
    DIR/table.json       a sampler's rows, exactly (optional)
    DIR/README.md        how to run it
    DIR/...              the artefact

The hashes find damage and mixed-up files. They are no signature: who can change an artefact can change the manifest
too, and a compiled artefact is a program. Load bundles of people you trust.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from stepfusion.errors import ExportError
from stepfusion.export.guide import guide
from stepfusion.files.atomic import atomic_directory, read_json, write_synced
from stepfusion.kernels import COLUMNS
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

VERSION = "stepfusion bundle 2"  # 1 had tables of 9 columns
MANIFEST, TABLE, README = "manifest.json", "table.json", "README.md"
KINDS = ("network", "tick")
ANY_DEVICE = "any"

_MAX_JSON_BYTES = 16 << 20
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIMENSION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

#: Entries of ``versions`` that must be the same where an artefact runs; the others say where it came from.
_BINDING = {
    "tensorrt": ("tensorrt", "platform", "compute_capability"),
    "tensorrt-rtx": ("tensorrt-rtx", "platform", "compute_capability"),
    "torch-tensorrt": ("torch", "torch-tensorrt", "platform", "compute_capability"),
    "aoti": ("torch", "platform", "compute_capability"),
}


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
        versions: of the packages it was made with, and where it depends on them: "platform" as :func:`here` says, and
            "compute_capability", those of the GPUs that it runs on, separated by blanks.
        model: what the engine must know of the network, as :func:`stepfusion.export.facts.model_facts` says it.
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


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its manifest, its directory, and its sampler's table, if it has one."""

    manifest: Manifest
    path: Path
    table: StepTable | None


def check_out(out: Path) -> None:
    """Refuse a place where no bundle can be written.

    Raises:
        ExportError: it exists, or its parent does not.
    """
    if os.path.lexists(out):
        raise ExportError(f"out must be a directory that does not exist yet, and {out} exists")
    if not out.resolve().parent.is_dir():
        raise ExportError(f"out is {out}, and {out.resolve().parent} is not a directory")


def write_bundle(
    out: Path, manifest: Manifest, build: Callable[[Path], str | None], *, table: StepTable | None = None
) -> None:
    """Write a bundle, whole or not at all.

    Args:
        out: must not exist; its parent does.
        manifest: without ``files``, which are filled in.
        build: writes the artefact into the folder it is given, beside ``out``; the folder becomes ``out`` only when
            everything in it was written, hashed and read back. Text that it returns goes into README.md.
        table: the sampler's rows that go with it.

    Raises:
        ExportError: ``out`` exists, or what was written is not what was meant. Whatever ``build`` raises.
    """
    check_out(out)
    with atomic_directory(out) as folder:
        notes = build(folder)
        reserved = [name for name in (MANIFEST, TABLE, README) if (folder / name).exists()]
        if reserved:
            raise ExportError(
                f"the {manifest.format} export wrote {reserved[0]}, which is a name of the bundle's own"
            )
        if table is not None:
            write_synced(folder / TABLE, _table_json(table))
        write_synced(folder / README, guide(manifest, table, notes).encode())
        names = sorted(_names_in(folder))
        for name in names:
            _sync(folder / name)
        complete = replace(manifest, files={name: sha256(folder / name) for name in names})
        write_synced(folder / MANIFEST, _to_json({"version": VERSION, **asdict(complete)}))
        written = read_bundle(folder)
        if written.manifest != complete:
            raise ExportError(f"{MANIFEST} reads back as another manifest: a value in it is not plain JSON")


def read_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Verify a bundle. Nothing is deserialised but its JSON, and no file is left unread.

    Raises:
        ExportError: a file is missing, too many, altered or a link; a name leaves the directory; the manifest is of
            another version or not one. The sentence names the file, what was found and what was expected.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ExportError(f"{path} is {'not a directory' if path.exists() else 'missing'}; a bundle is a directory")
    manifest = _read_manifest(path / MANIFEST)
    found = set(_names_in(path))
    listed = {*manifest.files, MANIFEST}
    for what, names in (
        ("is missing, and the manifest lists it", listed - found),
        ("is not in the manifest", found - listed),
    ):
        if names:
            raise ExportError(f"{path / min(names)} {what}")
    for name, expected in manifest.files.items():
        actual = sha256(path / name)
        if actual != expected:
            raise ExportError(f"{path / name} has SHA-256 {actual}; the manifest says {expected}")
    table = _read_table(path / TABLE, manifest) if TABLE in manifest.files else None
    return Bundle(manifest, path, table)


def check_runs_here(manifest: Manifest, *, device: str | torch.device, dtype: str | torch.dtype) -> None:
    """Compare what an artefact needs with what is here.

    Raises:
        ExportError: it is for another kind of device, dtype, GPU, platform or version; the sentence names both.
    """
    where = torch.device(device)
    if manifest.device not in (where.type, ANY_DEVICE):
        raise ExportError(f"the {manifest.format} bundle was made for {manifest.device}, and device is {where}")
    wanted = str(dtype).removeprefix("torch.")
    if manifest.dtype != wanted:
        raise ExportError(f"the {manifest.format} bundle has a {manifest.dtype} network, and dtype is {wanted}")
    for name in _BINDING.get(manifest.format, ()):
        if name not in manifest.versions:
            continue
        made, found = manifest.versions[name], here(name, where)
        accepted = made.split() if name == "compute_capability" else [made.partition("+")[0]]
        if found.partition("+")[0] not in accepted:
            what = name.replace("_", " ")
            raise ExportError(f"the {manifest.format} bundle was made for {what} {made}, and {what} here is {found}")


def here(name: str, device: torch.device | None = None) -> str:
    """The version of a package here; for "platform" the system and processor, for "compute_capability" the GPU's.

    "not installed" or "none" where there is none.
    """
    if name == "platform":
        return f"{platform.system().lower()}-{platform.machine().lower()}"
    if name == "compute_capability":
        if device is None or device.type != "cuda" or not torch.cuda.is_available():
            return "none"
        return "{}.{}".format(*torch.cuda.get_device_capability(device))
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass  # installed under another name, as tensorrt-cu13 is
    try:
        return str(import_module(name.replace("-", "_")).__version__)
    except (ImportError, OSError):
        return "not installed"


def versions(*packages: str) -> dict[str, str]:
    """The versions of stepfusion, torch and these packages, and the platform."""
    return {name: here(name) for name in ("stepfusion", "torch", *packages, "platform")}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


# Files


def _names_in(folder: Path) -> Iterator[str]:
    """The names of all files in a folder and below, as the manifest spells them."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            if path.is_symlink():
                raise ExportError(f"{path} is a symbolic link; a bundle holds files only")
            if name in files and not path.is_file():
                raise ExportError(f"{path} is not a file; a bundle holds files only")
        for name in files:
            yield Path(root, name).relative_to(folder).as_posix()


def _sync(path: Path) -> None:
    """Wait until a file that somebody else wrote is on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _to_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON of a file that is no link."""
    if path.is_symlink():
        raise ExportError(f"{path} is a symbolic link; a bundle holds files only")
    return read_json(path, ExportError, _MAX_JSON_BYTES)


# The manifest


def _read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle, every value of the type it must have."""
    given = _read_json(path)
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


# The table


def _table_json(table: StepTable) -> bytes:
    """A table as JSON: float64 in the shortest digits that give the same bits back; null is "no clip" (infinity)."""
    rows = [[None if math.isinf(value) else value for value in row] for row in table.coefficients.tolist()]
    return _to_json(
        {
            "name": table.name,
            "prediction": table.prediction,
            "learned_variance": table.learned_variance,
            "columns": list(COLUMNS),
            "starts": list(table.starts),
            "timesteps": table.timesteps.tolist(),
            "next_row": table.next_row.tolist(),
            "coefficients": rows,
        }
    )


def _read_table(path: Path, manifest: Manifest) -> StepTable:
    given = _read_json(path)
    betas: Mapping[str, Any] = manifest.model.get("schedule") or {}
    try:
        if given["columns"] != list(COLUMNS):
            raise ValueError(f"columns are {given['columns']}; accepted are {list(COLUMNS)}")
        coefficients = [[math.inf if value is None else value for value in row] for row in given["coefficients"]]
        return StepTable(
            given["name"],
            given["prediction"],
            NoiseSchedule(betas["betas"], name=betas["name"]),
            np.array(coefficients, dtype=np.float64),
            np.array(given["timesteps"], dtype=np.int64),
            np.array(given["next_row"], dtype=np.int64),
            tuple(given["starts"]),
            given["learned_variance"],
        )
    except KeyError as error:
        raise ExportError(f"{path} cannot be read: {error} is missing") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
