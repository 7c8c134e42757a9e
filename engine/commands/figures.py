"""Figures of the commands: a table of pictures with names on its rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stepfusion.files.images import Pixels, grid

_MARGIN, _GAP = 4, 2
_TEXT = 14  # pixels of a line: at 10, the default, a space is too narrow to be seen
_PAPER, _INK = (24, 24, 24), (225, 225, 225)
_MAX_PIXELS = 1 << 28


def figure(cells: Sequence[Pixels], rows: Sequence[str], columns: Sequence[str] = (), *, scale: int = 1) -> Pixels:
    """Pictures uint8 [H, W, C] of one size, row by row, ``scale`` times as large, beside and under their names.

    Args:
        cells: as many in each row, grey or RGB.
        rows: one name each, possibly empty.
        columns: one name each, of one line or several; or none at all.

    Returns:
        uint8 [.., .., 3].

    Raises:
        ValueError: the names do not fit the cells, or the figure would be too large.
    """
    wide = len(columns) or len(cells) // max(1, len(rows))
    if not cells or len(cells) != len(rows) * wide:
        raise ValueError(f"a figure of {len(rows)} rows and {wide} columns needs as many cells, got {len(cells)}")
    height, width = cells[0].shape[0] * scale, cells[0].shape[1] * scale
    if height * width * len(cells) > _MAX_PIXELS:
        raise ValueError(f"a figure has at most {_MAX_PIXELS} pixels, and this one would have more: lower --scale")
    colours = np.stack([cell if cell.shape[2] == 3 else cell.repeat(3, 2) for cell in cells])
    table = Image.fromarray(grid(colours, columns=wide, scale=scale, gap=_GAP))
    font = ImageFont.load_default(_TEXT)
    line = round(font.getbbox("Hg")[3]) + _MARGIN
    left = round(max(font.getlength(name) for name in rows)) + 2 * _MARGIN if any(rows) else 0
    top = _MARGIN + line * max(name.count("\n") + 1 for name in columns) if columns else 0
    sheet = Image.new("RGB", (left + table.width, top + table.height), _PAPER)
    sheet.paste(table, (left, top))
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(rows):
        middle = top + _GAP + i * (height + _GAP) + height // 2
        draw.text((left - _MARGIN, middle), name, fill=_INK, font=font, anchor="rm")
    for i, name in enumerate(columns):
        centre = left + _GAP + i * (width + _GAP) + width // 2
        for k, text in enumerate(name.split("\n")):
            draw.text((centre, _MARGIN + k * line), text, fill=_INK, font=font, anchor="mt")
    return np.asarray(sheet)


def strip(pixels: Pixels) -> Pixels:
    """Images uint8 [n, H, W, C] beside each other, uint8 [H, n W, C]."""
    return np.concatenate(list(pixels), axis=1)
