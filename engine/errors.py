"""The errors that stepfusion raises beside ``ValueError`` and ``TypeError``."""

from stepfusion.kernels.backend import BackendError


class CheckpointError(ValueError):
    """A model directory cannot be used: a file, key, shape or config value is missing or wrong."""


class ExportError(RuntimeError):
    """A network cannot be exported, or an exported artefact cannot be used here."""


class BulkError(RuntimeError):
    """A bulk job cannot begin or go on in its directory, or the images there are not what its manifest says."""


class NonFiniteError(ArithmeticError):
    """An image became NaN or infinite; the message names it and the step. ``image`` is its place in the request."""

    image: int | None = None


class SamplingCancelled(RuntimeError):
    """Sampling was stopped by a callback before it was done."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line: its kind, and the first line of its message."""
    try:
        lines = str(error).strip().splitlines() or ["no message"]
    except BaseException:  # which its own __str__ raised; whoever is to be told of the error must be told
        lines = ["its message cannot be read"]
    return f"{type(error).__name__}: {lines[0]}"


__all__ = [
    "BackendError",
    "BulkError",
    "CheckpointError",
    "ExportError",
    "NonFiniteError",
    "SamplingCancelled",
    "first_line",
]
