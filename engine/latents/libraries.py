"""The libraries that have the networks around a denoiser: imported when one is built, named if missing."""

from __future__ import annotations

import importlib
from typing import Any

from stepfusion.errors import CheckpointError, first_line


def library(name: str, purpose: str) -> Any:
    """The module of a library of the extra ``[latent]``.

    Args:
        name: "diffusers" or "transformers".
        purpose: what needs it, as the beginning of a sentence: "an autoencoder".

    Raises:
        CheckpointError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"{purpose} needs the package {name!r}: pip install stepfusion[latent] ({first_line(error)})"
        ) from None
