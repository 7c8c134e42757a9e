"""The conditions of a prompt, whole: what text encoders make of it, and the sizes that SDXL is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfusion.latents.text import TextEncoder
from stepfusion.latents.time_ids import refiner_ids, size_ids

_REFINER_IDS = 5
_NEGATIVE_SCORE = 2.5  # aesthetic score of what an image is not to be like, as diffusers has it


class PromptConditions:
    """Makes the conditions of a prompt, or of no prompt: what an engine's ``prompts`` is.

    Args:
        text: the text encoders.
        ids: entries of the network's ``time_ids``, 6 or 5; None if it has none.
        height, width: of the images, in pixels, which ``time_ids`` say.
    """

    def __init__(self, text: TextEncoder, ids: int | None, height: int, width: int) -> None:
        self.text = text
        self._size = ids, height, width
        self._positive, self._negative = dict[str, Tensor](), dict[str, Tensor]()
        if ids == _REFINER_IDS:
            self._positive["time_ids"] = refiner_ids(height, width)
            self._negative["time_ids"] = refiner_ids(height, width, aesthetic_score=_NEGATIVE_SCORE)
        elif ids is not None:
            self._positive["time_ids"] = self._negative["time_ids"] = size_ids(height, width)

    def to(self, device: torch.device | str) -> PromptConditions:
        """The same with its text encoders on a device: this one if they are there already."""
        text = self.text.to(device)
        return self if text is self.text else PromptConditions(text, *self._size)

    @property
    def explanation(self) -> str:
        """What encodes prompts, for people."""
        return self.text.explanation

    def __call__(self, prompt: str | None) -> dict[str, Tensor]:
        """The conditions of what an image is to show, by name: float32 on the CPU, where any stream may read them."""
        return self._made(prompt, self._positive)

    def negative(self, prompt: str | None) -> dict[str, Tensor]:
        """Those of what it is not to show, or of no prompt: of SDXL's refiner with a low aesthetic score."""
        return self._made(prompt, self._negative)

    def _made(self, prompt: str | None, sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = self.text.null() if prompt is None else self.text.encode(prompt)
        return {**made, **{name: value.clone() for name, value in sizes.items()}}


@dataclass(frozen=True)
class NoPrompts:
    """What stands in the place of :class:`PromptConditions` where a model takes texts, and they cannot be encoded.

    Attributes:
        missing: why, and what to do about it: a clause that ends a sentence.
    """

    missing: str

    def __call__(self, prompt: str | None) -> dict[str, Tensor]:
        """ValueError, saying what is missing."""
        raise ValueError(f"prompts cannot be encoded: {self.missing}")
