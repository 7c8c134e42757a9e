"""What ``stepfusion.json`` adds to a diffusers directory: the names of the labels, and the null label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from stepfusion.checkpoints.json_file import read_model
from stepfusion.errors import CheckpointError
from stepfusion.files.strict_model import StrictModel

LABELS_FILE = "stepfusion.json"


class LabelsFile(StrictModel):
    """The object in ``stepfusion.json``."""

    class_names: list[str] | None = None
    null_label: int | None = None


@dataclass(frozen=True)
class LabelMetadata:
    """The names of a network's labels, the null label left out, and the null label; None for what there is not."""

    class_names: tuple[str, ...] | None
    null_label: int | None


def read_labels(path: Path, classes: int | None) -> LabelMetadata:
    """What the file says of the labels of a network with so many classes; CheckpointError if it does not fit."""
    read = read_model(path, LabelsFile)
    return check_labels({"class_names": read.class_names, "null_label": read.null_label}, classes, str(path))


def check_labels(given: Mapping[str, Any], classes: int | None, where: str) -> LabelMetadata:
    """Compare class names and null label with the number of classes; CheckpointError if they do not fit."""
    names, null_label = given.get("class_names"), given.get("null_label")
    if names is None and null_label is None:
        return LabelMetadata(None, None)
    if classes is None:
        raise CheckpointError(f"{where}: class_names or null_label is given, but the network has no class embedding")
    is_label = isinstance(null_label, int) and not isinstance(null_label, bool) and 0 <= null_label < classes
    if null_label is not None and not is_label:
        raise CheckpointError(
            f"{where}: null_label is {short(null_label)}; accepted are integers from 0 to {classes - 1}"
        )
    if names is None:
        return LabelMetadata(None, null_label)
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise CheckpointError(f"{where}: class_names is not a list of non-empty strings")
    wanted = classes - 1 if null_label == classes - 1 else classes
    if len(names) != wanted:
        raise CheckpointError(f"{where}: class_names has {len(names)} entries; accepted are {wanted}")
    return LabelMetadata(tuple(names), null_label)
