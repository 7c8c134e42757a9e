"""Files of ``torch.save``: read by PyTorch's restricted unpickler, which runs no code of theirs."""

import pickle
import zipfile
from pathlib import Path
from reprlib import repr as short

import torch
from torch import Tensor

from stepfusion.checkpoints.weights import DTYPES, Stored, first_line
from stepfusion.errors import CheckpointError


def stored_in_archive(path: Path) -> dict[str, Stored]:
    """Open a state dict saved by ``torch.save``, memory-mapped, with PyTorch's restricted unpickler."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a torch.save archive (a zip file); other pickles are never opened")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds pickled code, which is never run; save a safetensors file") from None
    except Exception as error:  # a damaged archive fails in the zip reader, the unpickler or a tensor constructor
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; accepted is a state dict")
    codes = {dtype: code for code, dtype in DTYPES.items()}
    stored = {}
    for key, value in state.items():
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not is_plain:
            raise CheckpointError(
                f"{path}: {short(key)} is not a name with a dense tensor, but {type(value).__name__}"
            )
        stored[key] = Stored(tuple(value.shape), codes.get(value.dtype, str(value.dtype)), value.detach)
    return stored
