"""Images in folders: a folder of pictures, a folder of class folders, or what ``stepfusion generate`` wrote."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stepfusion.files.picture_reader import FORMATS, SUFFIXES
from stepfusion.files.regular import read_regular

LABELS_FILE = "metadata.csv"

_UNREAD = {".gif", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".ico", ".tga", ".exr"}
_UNREAD |= {".hdr", ".ppm", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".nef", ".arw"}
# What operating systems, archives and network drives leave beside files, in lower case; a leading dot tells the rest.
_LITTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin", "lost+found"}
_LITTER |= {"system volume information"}
_MAX_LABELS_BYTES = 1 << 28


@dataclass
class FoundPictures:
    """Pictures, each with its label, and what stood beside them.

    Attributes:
        files: the pictures.
        labels: one for each, or None if nothing says any.
        class_names: one for each label, or None if nothing names them.
        left_out: files that are no pictures, which a user may want to know of.
    """

    files: list[Path] = field(default_factory=list)
    labels: list[int] | None = None
    class_names: tuple[str, ...] | None = None
    left_out: list[Path] = field(default_factory=list)


def find_pictures(path: Path) -> FoundPictures:
    """Find the pictures of a folder: those in its class folders and below them, or else those that stand in it.

    Each sub-folder is a class, in the order of the sorted names. Pictures that stand in the folder itself have the
    labels of ``metadata.csv`` there (columns ``file_name`` and ``label``), or none. There may be no picture at all.

    Raises:
        ValueError: a class folder holds no picture, pictures stand beside class folders or a level too deep, or one
            is of a format that is not read; the sentence names it.
    """
    folders = sorted(child for child in _entries(path) if child.is_dir())
    loose = _pictures_in(path, deep=False)
    classes = {folder.name: _pictures_in(folder, above=(path.resolve(),)) for folder in folders}
    if loose.files or not classes:
        return _flat(path, loose, classes)
    _refuse_empty(path, classes)
    _refuse_deeper_classes(path, classes)
    found = FoundPictures(labels=[], class_names=tuple(classes), left_out=loose.left_out)
    for label, one in enumerate(classes.values()):
        found.files += one.files
        found.left_out += one.left_out
        found.labels = [*(found.labels or []), *[label] * len(one.files)]
    return found


def read_labels(folder: Path, files: list[Path]) -> list[int] | None:
    """The labels that ``metadata.csv`` in `folder` gives to pictures there; None without such a file.

    Raises:
        ValueError: the file lacks its columns, a picture, or a label that is an integer from 0 on.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    try:
        text = read_regular(path, _MAX_LABELS_BYTES, follow=True).decode()
        rows = {row["file_name"]: int(row["label"]) for row in csv.DictReader(io.StringIO(text, newline=""))}
        labels = [rows[file.name] for file in files]
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}; it needs file_name and label of every picture") from None
    except (OSError, csv.Error, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not give a label to every picture: {error}") from None
    if min(labels, default=0) < 0:
        raise ValueError(f"{path} has the label {min(labels)}; accepted are integers from 0 on")
    return labels


def _flat(path: Path, loose: FoundPictures, classes: dict[str, FoundPictures]) -> FoundPictures:
    """Pictures that stand in the folder itself; none may stand in a folder beside them."""
    for name, one in classes.items():
        if one.files:
            raise ValueError(
                f"{path} holds {loose.files[0].name} beside the folder {name}, which holds pictures too: put every "
                "picture into the folder of its class, or none"
            )
        loose.left_out += one.left_out
    labels = read_labels(path, loose.files)
    if labels is not None:
        loose.labels = labels
        loose.left_out = [file for file in loose.left_out if file != path / LABELS_FILE]
    return loose


def _refuse_empty(path: Path, classes: dict[str, FoundPictures]) -> None:
    for name, one in classes.items():
        if not one.files:
            raise ValueError(f"{path / name} is the folder of a class, and holds no picture ({FORMATS})")


def _refuse_deeper_classes(path: Path, classes: dict[str, FoundPictures]) -> None:
    """Class folders that hold nothing but folders are more likely "train" and "test" than classes."""
    deep = [file for name, one in classes.items() for file in one.files if file.parent != path / name]
    if len(deep) == sum(len(one.files) for one in classes.values()):
        folder = path / next(iter(classes))
        raise ValueError(
            f"{path} holds no picture in its folders, but in theirs, as {deep[0].relative_to(path)}: name the folder "
            f"that holds the class folders, as {folder}"
        )


def _pictures_in(folder: Path, *, deep: bool = True, above: tuple[Path, ...] = ()) -> FoundPictures:
    """The pictures of a folder, and of the folders in it if `deep`, in the order of their names."""
    found = FoundPictures()
    above = (*above, folder.resolve())
    for path in sorted(_entries(folder)):
        if path.is_dir():
            if deep:
                _refuse_circle(path, above)
                inner = _pictures_in(path, above=above)
                found.files += inner.files
                found.left_out += inner.left_out
        elif path.suffix.lower() in SUFFIXES:
            found.files.append(path)
        elif path.suffix.lower() in _UNREAD:
            raise ValueError(f"{path} is of a format that is not read; accepted are {FORMATS}")
        else:
            found.left_out.append(path)
    return found


def _refuse_circle(path: Path, above: tuple[Path, ...]) -> None:
    if path.is_symlink() and path.resolve() in above:
        raise ValueError(f"{path} is a link to a folder that holds it")


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder, but for the litter of systems."""
    return (child for child in folder.iterdir() if not _is_litter(child.name))


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER
