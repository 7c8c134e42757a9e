"""The classes that a command line names."""

from __future__ import annotations

from stepfusion.engine import Engine
from stepfusion.model_spec import ModelSpec


def chosen_labels(engine: Engine, text: str | None, count: int) -> list[int] | None:
    """The labels that the command line names, repeated to ``count``."""
    classes = read_classes(engine, text)
    return None if classes is None else [classes[i % len(classes)] for i in range(count)]


def read_classes(model: Engine | ModelSpec, text: str | None) -> list[int] | None:
    """The labels that ``--labels`` names, all classes without it; None for a model without labels."""
    if model.num_classes is None:
        if text is not None:
            raise ValueError("--labels was given, and this model takes none")
        return None
    if text is None:
        return [label for label in range(model.num_classes) if label != model.null_label]
    return [read_label(model, part.strip(), "--labels") for part in text.split(",")]


def read_label(model: Engine | ModelSpec, text: str, option: str) -> int:
    """The number of the class that ``text`` names, in any case, or is; ``option`` is for the message."""
    names = [name.lower() for name in model.class_names or ()]
    if text.lower() in names:
        return names.index(text.lower())
    if text.lower() == "none" and model.null_label is not None:
        return model.null_label
    last = (model.num_classes or 0) - 1
    if text.isascii() and text.isdecimal() and int(text) <= last:
        return int(text)
    accepted = [f"numbers from 0 to {last}"]
    accepted += [", ".join(model.class_names)] if model.class_names else []
    accepted += ["none"] if model.null_label is not None else []
    raise ValueError(f"{option} must be among {'; '.join(accepted)}, got {text!r}")
