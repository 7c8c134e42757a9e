"""The LoRA files that a model is read with: their weights are added to its own while it is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stepfusion import _checks
from stepfusion.errors import CheckpointError
from stepfusion.latents.lora import TEXT_PARTS, merge_lora, part_of
from stepfusion.latents.tensor_file import TensorFile, read_tensors

#: A file; several; or each with how strongly it is added, as pairs or by name.
Lora = (
    str
    | os.PathLike[str]
    | Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]]
    | Mapping[str | os.PathLike[str], float]
)


@dataclass(frozen=True)
class _File:
    path: Path
    scale: float
    texts: TensorFile  # for the text encoders
    others: TensorFile


class LoraFiles:
    """LoRA files in the order in which they are added; none by default.

    Raises:
        CheckpointError: a file is missing or damaged, or has a tensor of no known form.
        TypeError, ValueError: ``lora`` is none of the forms that are accepted.
    """

    def __init__(self, lora: Lora | None = None) -> None:
        self._files = [_read(path, scale) for path, scale in _pairs(lora)]

    def __len__(self) -> int:
        return len(self._files)

    def merged_texts(self, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The weights of the text encoders, "text_encoder" and "text_encoder_2", with those of the files added.

        What is changed becomes float32.

        Raises:
            CheckpointError: a file has weights that these have no place for.
        """
        merged = {part: dict(state) for part, state in states.items()}
        for file in self._files:
            wide = {part: {name: _wide(one) for name, one in state.items()} for part, state in merged.items()}
            merged = _merged(file, wide, file.texts)
        return merged

    def merged_network(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the network with those of the files added; errors as for the text encoders."""
        merged = dict(state)
        for file in self._files:
            merged = _merged(file, {"unet": merged}, file.others)["unet"]
        return merged


def _read(path: Path, scale: float) -> _File:
    found = read_tensors(path)
    try:
        texts = {key: tensor for key, tensor in found.tensors.items() if part_of(key) in TEXT_PARTS}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    others = {key: tensor for key, tensor in found.tensors.items() if key not in texts}
    return _File(path, scale, TensorFile(texts, found.metadata), TensorFile(others, found.metadata))


def _merged(
    file: _File, states: Mapping[str, Mapping[str, Tensor]], lora: TensorFile
) -> dict[str, dict[str, Tensor]]:
    try:
        return merge_lora(states, lora.tensors, scale=file.scale, metadata=lora.metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def _wide(tensor: Tensor) -> Tensor:
    """In float32, so that what is added is not rounded to the dtype of the file."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _pairs(lora: Lora | None) -> list[tuple[Path, float]]:
    """Files and scales, in order."""
    if lora is None:
        return []
    if isinstance(lora, str | os.PathLike):
        return [(Path(lora), 1.0)]
    if not isinstance(lora, Mapping | Sequence):
        raise TypeError(f"lora must be a path, several, or scales by path, got {type(lora).__name__}")
    pairs = []
    for one in lora.items() if isinstance(lora, Mapping) else lora:
        path, scale = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"lora must name files, each with a scale or without, got {one!r:.100}")
        pairs.append((Path(path), _checks.number("the scale of a LoRA", scale, -1e4, 1e4)))
    return pairs
