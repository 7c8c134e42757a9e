"""Files of tensors that are read whole: LoRA weights, and single files of a pipeline. Only safetensors is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepfusion.errors import CheckpointError, first_line
from stepfusion.files.regular import open_regular


class TensorFile(NamedTuple):
    """What a safetensors file holds.

    Attributes:
        tensors: by name, on the CPU, in their own dtype; they do not depend on the file any more.
        metadata: of its header: texts by name.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(source: str | os.PathLike[str]) -> TensorFile:
    """Read a safetensors file. Nothing is downloaded, and no pickle is read.

    Args:
        source: the path of a file, whose name ends with ``.safetensors``.

    Raises:
        CheckpointError: it is missing, of another kind (``.bin``, ``.ckpt`` and ``.pt`` are pickles), or damaged.
    """
    path = Path(source)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not read: accepted are .safetensors files; .bin, .ckpt and .pt files are pickles, which can "
            "run code, and must be converted first"
        )
    try:
        open_regular(path, follow=True).close()
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no dict
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {first_line(error)[:200]}") from None
    return TensorFile(tensors, metadata)
