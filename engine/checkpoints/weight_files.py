"""The files of a diffusers directory that hold a network's weights, under the names of today and of 2022."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepfusion.checkpoints.archive import stored_in_archive
from stepfusion.checkpoints.weights import Stored, check_state, first_line
from stepfusion.errors import CheckpointError

_WEIGHTS = "diffusion_pytorch_model"
WEIGHT_FILES = tuple(f"{_WEIGHTS}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"))
_LEGACY_KEY = re.compile(r"(?P<block>.*attentions\.\d+)\.(?P<name>query|key|value|proj_attn)\.(?P<kind>weight|bias)")
_LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def find_weights(folder: Path) -> Path:
    """The file with a network's weights, safetensors first; CheckpointError if there is none that can be read."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / f"{WEIGHT_FILES[0]}.index.json").exists():
        raise CheckpointError(f"{folder} has weights in several files, which is not implemented; save them as one")
    raise CheckpointError(f"{folder} has no weights; accepted are {', '.join(WEIGHT_FILES)}")


def read_weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the state of `network` (on the meta device), after checking all that the file declares.

    What is floating point becomes float32; a counter, as batch normalisation has, stays int64.
    """
    if path.suffix == ".bin":
        return _fit(stored_in_archive(path), network, path)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {}
            for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                header = file.get_slice(key)
                stored[key] = Stored(tuple(header.get_shape()), header.get_dtype(), _reader(file, key))
            return _fit(stored, network, path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {first_line(error)}") from None


def _reader(file: Any, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor: Tensor = file.get_tensor(key)
        return tensor

    return read


def _fit(stored: Mapping[str, Stored], network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The stored tensors as the state of `network`, under the names of today."""
    state = network.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    integers = {key for key, value in state.items() if not value.is_floating_point()}
    return check_state(_modern_names(stored, path), shapes, path, integers=integers)


def _modern_names(stored: Mapping[str, Stored], path: Path) -> dict[str, Stored]:
    """Rename the attention weights of directories from 2022: query, key, value and proj_attn."""
    renamed: dict[str, Stored] = {}
    for key, value in stored.items():
        legacy = _LEGACY_KEY.fullmatch(key)
        name = f"{legacy['block']}.{_LEGACY_NAMES[legacy['name']]}.{legacy['kind']}" if legacy else key
        if name in renamed:
            raise CheckpointError(f"{path} has {name} twice, under its old name and its new one")
        renamed[name] = value
    return renamed
