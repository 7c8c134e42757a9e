"""The conditions of a prompt, whole: what text encoders make of it, and the sizes that SDXL is told."""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion.latents.text import TextEncoder
from stepfusion.latents.time_ids import refiner_ids, size_ids

_REFINER_IDS = 5
_NO_PROMPTS_SCORE = 2.5  # aesthetic score of no prompt, as diffusers has it


class PromptConditions:
    """Makes the conditions of a prompt, or of no prompt: what an engine's ``prompts`` is.

    Args:
        text: the text encoders.
        ids: entries of the network's ``time_ids``, 6 or 5; None if it has none.
        height, width: of the images, in pixels, which ``time_ids`` say.
    """

    def __init__(self, text: TextEncoder, ids: int | None, height: int, width: int) -> None:
        self.text = text
        self._sizes: tuple[Tensor, Tensor] | None = None
        if ids == _REFINER_IDS:
            no_prompts = refiner_ids(height, width, aesthetic_score=_NO_PROMPTS_SCORE)
            self._sizes = refiner_ids(height, width), no_prompts
        elif ids is not None:
            self._sizes = size_ids(height, width), size_ids(height, width)

    def __call__(self, prompt: str | None) -> dict[str, Tensor]:
        """The conditions by name, float32 on the CPU, where any thread's stream may read them."""
        made = self.text.null() if prompt is None else self.text.encode(prompt)
        if self._sizes is not None:
            made["time_ids"] = self._sizes[prompt is None]
        return {name: value.to(torch.device("cpu"), torch.float32) for name, value in made.items()}
