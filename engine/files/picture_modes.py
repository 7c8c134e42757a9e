"""What Pillow decodes, in the four kinds that a picture can be: grey or coloured, with or without alpha.

Asked for 8 bits, Pillow clips 16-bit grey at 255, and cuts 16-bit colours to their upper bytes. Here every 16-bit
value v becomes round(v / 257), so that 0 is black, 65535 is white, and no value is further off than half a level.
"""

from __future__ import annotations

import re
import sys
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepfusion.files.images import Pixels

_GREY = ("1", "L", "LA", "La")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_SIXTEEN = re.compile(r"(?P<bands>LA|RGB|RGBA|RGBX);16(?P<order>[BLN])")
_OTHER_ORDER = {"B": "L", "L": "B", "N": "L" if sys.byteorder == "big" else "B"}


class UnusableValuesError(ValueError):
    """Values of which nothing says how bright they are; the message says how they are stored."""


def pixels_of(picture: Image.Image, file: IO[bytes]) -> Pixels:
    """Decode an opened picture; `file` is where it was opened.

    Returns:
        uint8 [H, W, C]: grey, grey with alpha, RGB or RGBA, with C of 1, 2, 3 or 4.

    Raises:
        UnusableValuesError: nothing says which value is white. Errors of Pillow's: the picture is damaged.
    """
    raw = _raw_mode(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return _grey_of_16_bits(picture, raw)
    if picture.mode in ("I", "F"):
        raise UnusableValuesError("with values that are signed, fractional or of 32 bits")
    sixteen = _SIXTEEN.fullmatch(raw)
    if sixteen is not None:
        return _colours_of_16_bits(picture, file, sixteen["bands"], sixteen["order"])
    grey, alpha = _is_grey(picture), picture.mode in _WITH_ALPHA or "transparency" in picture.info
    pixels = np.array(picture.convert("RGBA" if alpha else "L" if grey else "RGB"))
    if grey and alpha:
        return pixels[..., 2:]
    return pixels.reshape(*pixels.shape[:2], -1)


def _raw_mode(picture: Image.Image) -> str:
    """Pillow's name of how the pixels stand in the file, before they are decoded."""
    tiles: list[Any] = getattr(picture, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    return str(arguments if isinstance(arguments, str) else next(iter(arguments or [""])))


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode not in ("P", "PA"):
        return picture.mode in _GREY
    palette = np.array(picture.getpalette() or [], dtype=np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _grey_of_16_bits(picture: Image.Image, raw: str) -> Pixels:
    if not raw.startswith("I;16") or raw.endswith("S"):
        raise UnusableValuesError(f"with values of the kind {raw!r}")
    return _rounded(np.asarray(picture)[..., None], picture.info.get("transparency"))


def _colours_of_16_bits(picture: Image.Image, file: IO[bytes], bands: str, order: str) -> Pixels:
    """Decode twice, once for the upper and once for the lower bytes of the values."""
    if bands == "LA":  # as four bytes a pixel: both of the grey, both of the alpha
        parts = _decode_as(file, "RGBA")
        values = parts[..., ::2].astype(np.uint16) << 8 | parts[..., 1::2]
        return _rounded(values, None)
    upper = _decode_as(file, f"{bands};16{order}")
    lower = _decode_as(file, f"{bands};16{_OTHER_ORDER[order]}")
    values = (upper.astype(np.uint16) << 8 | lower)[..., : 3 if bands == "RGBX" else None]
    return _rounded(values, picture.info.get("transparency"))


def _decode_as(file: IO[bytes], raw: str) -> Pixels:
    """The bytes that Pillow takes of each pixel if it is told that the pixels stand in the file as ``raw``."""
    file.seek(0)
    with Image.open(file) as picture:
        tiles: list[Any] = [(*tile[:3], _with_raw_mode(tile[3], raw)) for tile in picture.tile]
        picture.tile = tiles
        return np.array(picture)


def _with_raw_mode(arguments: Any, raw: str) -> Any:
    return raw if isinstance(arguments, str) else (raw, *arguments[1:])


def _rounded(values: NDArray[Any], hidden: Any) -> Pixels:
    """Values of 16 bits [H, W, C] as 8 bits; with alpha, if pixels of the colour ``hidden`` are transparent."""
    pixels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 257 is odd: no tie
    if hidden is None:
        return pixels
    alpha = np.where((values == np.asarray(hidden)).all(axis=2, keepdims=True), 0, 255).astype(np.uint8)
    return np.concatenate((pixels, alpha), axis=2)
