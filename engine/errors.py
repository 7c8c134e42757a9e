"""The errors that stepfusion raises beside ``ValueError`` and ``TypeError``."""

from stepfusion.kernels.backend import BackendError


class CheckpointError(ValueError):
    """A model directory cannot be used: a file, key, shape or config value is missing or wrong."""


class ExportError(RuntimeError):
    """A network cannot be exported, or an exported artefact cannot be used here."""


__all__ = ["BackendError", "CheckpointError", "ExportError"]
