"""Where the noise of a batch comes from."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NoiseSource(NamedTuple):
    """Noise as it is given, [B, ...], or what draws it, ``seeds`` and ``indices``, int64 [B]; or neither."""

    noise: torch.Tensor | None = None
    seeds: torch.Tensor | None = None
    indices: torch.Tensor | None = None

    def repeated(self) -> NoiseSource:
        """The first image's noise for every image."""
        return NoiseSource(*(None if value is None else value[:1].expand_as(value) for value in self))
