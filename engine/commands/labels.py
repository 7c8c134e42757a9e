"""The classes that a command line names."""

from __future__ import annotations

from stepfusion.engine import Engine


def chosen_labels(engine: Engine, text: str | None, count: int) -> list[int] | None:
    """The labels that the command line names, repeated to ``count``."""
    classes = read_classes(engine, text)
    return None if classes is None else [classes[i % len(classes)] for i in range(count)]


def read_classes(engine: Engine, text: str | None) -> list[int] | None:
    """The labels that ``--labels`` names, all classes without it; None for a model without labels."""
    if engine.num_classes is None:
        if text is not None:
            raise ValueError("--labels was given, and this model takes none")
        return None
    if text is None:
        return [label for label in range(engine.num_classes) if label != engine.null_label]
    return [read_label(engine, part.strip(), "--labels") for part in text.split(",")]


def read_label(engine: Engine, text: str, option: str) -> int:
    """The number of the class that ``text`` names, in any case, or is; ``option`` is for the message."""
    names = [name.lower() for name in engine.class_names or ()]
    if text.lower() in names:
        return names.index(text.lower())
    if text.lower() == "none" and engine.null_label is not None:
        return engine.null_label
    last = (engine.num_classes or 0) - 1
    if text.isascii() and text.isdecimal() and int(text) <= last:
        return int(text)
    accepted = [f"numbers from 0 to {last}"]
    accepted += [", ".join(engine.class_names)] if engine.class_names else []
    accepted += ["none"] if engine.null_label is not None else []
    raise ValueError(f"{option} must be among {'; '.join(accepted)}, got {text!r}")
