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
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from stepfusion.errors import ExportError
from stepfusion.export.batch import Batch
from stepfusion.export.guide import guide
from stepfusion.export.manifest import MANIFEST, Manifest, manifest_to_json, read_manifest
from stepfusion.export.spec_json import batch_from_json, spec_from_json
from stepfusion.export.table_json import read_table, table_to_json
from stepfusion.files.atomic import atomic_directory, write_synced
from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.table import StepTable

TABLE, README = "table.json", "README.md"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its manifest, its directory, its sampler's table, if it has one, and what is known of the
    model: its spec, and the batch sizes that were exported, if the manifest names them.
    """

    manifest: Manifest
    path: Path
    table: StepTable | None
    spec: ModelSpec
    batch: Batch | None

    def __repr__(self) -> str:
        return f"Bundle({self.manifest.format}, {self.manifest.kind}, {self.path}, {self.spec!r})"


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
) -> Bundle:
    """Write a bundle, whole or not at all, and return it. Every file is hashed once.

    Args:
        out: must not exist; its parent does.
        manifest: without ``files``, which are filled in.
        build: writes the artefact into the folder it is given, beside ``out``; the folder becomes ``out`` only when
            everything in it is on disk and hashed, and the manifest and the table were read back. Text that it
            returns goes into README.md.
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
            write_synced(folder / TABLE, table_to_json(table))
        write_synced(folder / README, guide(manifest, table, notes).encode())
        names = sorted(_names_in(folder))
        for name in names:
            _sync(folder / name)
        complete = replace(manifest, files={name: sha256(folder / name) for name in names})
        write_synced(folder / MANIFEST, manifest_to_json(complete))
        if read_manifest(folder / MANIFEST) != complete:
            raise ExportError(f"{MANIFEST} reads back as another manifest: a value in it is not plain JSON")
        written = _described(folder, complete)
    return replace(written, path=Path(out))


def read_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Verify a bundle. Nothing is deserialised but its JSON, and no file is left unread.

    Raises:
        ExportError: a file is missing, too many, altered or a link; a name leaves the directory; the manifest is of
            another version or not one. The sentence names the file, what was found and what was expected.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ExportError(f"{path} is {'not a directory' if path.exists() else 'missing'}; a bundle is a directory")
    manifest = read_manifest(path / MANIFEST)
    _check_files(path, manifest)
    return _described(path, manifest)


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


def _described(folder: Path, manifest: Manifest) -> Bundle:
    """The bundle in a folder whose files are as the manifest says; ExportError if they describe no model or table."""
    spec, batch = spec_from_json(manifest.model), batch_from_json(manifest.model)
    table = read_table(folder / TABLE, spec.schedule) if TABLE in manifest.files else None
    return Bundle(manifest, folder, table, spec, batch)


def _check_files(path: Path, manifest: Manifest) -> None:
    """Refuse a directory that does not hold the files of its manifest and no others, each with its hash."""
    found, listed = set(_names_in(path)), {*manifest.files, MANIFEST}
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
