"""The fixed position embedding of image patches (Dosovitskiy et al. 2021; He et al. 2022, in two dimensions)."""

from __future__ import annotations

import torch
from torch import Tensor


def position_embedding(grid: int, width: int) -> Tensor:
    """Sines and cosines of column and row of every patch.

    ``[sin(c w_i), cos(c w_i), sin(r w_i), cos(r w_i)]`` with ``w_i = 10000 ** (-i / (width / 4))``, of the patch in
    row r and column c; computed in float64, rounded last. Always on the CPU, also while "meta" is the default device:
    nothing that is loaded later would fill it.

    Args:
        grid: patches along height and width. width: D, a multiple of 4.

    Returns:
        float32 [1, grid * grid, D], patches row by row.
    """
    place = torch.arange(grid, dtype=torch.float64, device="cpu")
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    phases = place[:, None] * frequencies  # [grid, D / 4]
    waves = torch.cat((phases.sin(), phases.cos()), dim=1)  # [grid, D / 2]
    columns = waves[None].expand(grid, -1, -1)
    rows = waves[:, None].expand(-1, grid, -1)
    return torch.cat((columns, rows), dim=2).reshape(1, grid * grid, width).to(torch.float32)
