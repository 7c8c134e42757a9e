"""Pictures to pixels: the one reader of picture files, for commands and for training.

A picture is read as it is seen: turned as its EXIF orientation says, without the colours that transparency hides, and
with 16-bit values rounded to 8 bits. What a file declares is checked before anything is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from stepfusion.files.images import CHANNELS, Pixels
from stepfusion.files.picture_modes import UnusableValuesError, pixels_of
from stepfusion.files.png_chunks import SIGNATURE, check_chunks
from stepfusion.files.regular import read_regular

FORMATS = "PNG, JPEG, WebP, BMP or TIFF"
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff"))
MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 29

_PLUGINS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # Pillow's names
_ORIENTATION = 0x0112  # of EXIF 2.3, table 4
_PAPER = 255  # what a transparent picture is seen on


class PictureError(ValueError):
    """A picture that is not read; the message is one sentence, which names it."""


def read_picture(path: str | Path, shape: Sequence[int]) -> Pixels:
    """Read a picture for images of ``shape`` (C, H, W), converted to their channels: grey, RGB or RGBA.

    Transparent parts are white, unless the images have an alpha channel of their own.

    Returns:
        uint8 [H, W, C].

    Raises:
        ValueError: the file is no sound picture, or of another size, or ``shape`` is not one of pictures.
    """
    _check_channels(shape)
    return decode_picture(path, _read(path), shape)[0]


def decode_picture(
    name: str | Path, data: bytes, shape: Sequence[int], *, formats: tuple[str, ...] = _PLUGINS
) -> tuple[Pixels, Pixels | None]:
    """The same of a file's bytes, and its alpha.

    Args:
        name: for messages.
        formats: Pillow's names of those that are read.

    Returns:
        uint8 [H, W, C], and uint8 [H, W]: 0 where nothing of the picture is seen; None if it has no alpha.

    Raises:
        ValueError: as :func:`read_picture`; or the bytes are of another format.
    """
    _check_channels(shape)
    channels, height, width = shape
    decoded = _decode(name, data, (width, height), formats)
    if decoded.shape[:2] != (height, width):
        raise _other_size(name, (decoded.shape[1], decoded.shape[0]), (width, height))
    return _convert(decoded, channels), decoded[..., -1] if decoded.shape[2] in (2, 4) else None


def pixels_of_picture(name: str, picture: Image.Image, shape: Sequence[int]) -> Pixels:
    """The same of a picture that Pillow holds, which stays as it is; `name` is for messages.

    Returns:
        uint8 [H, W, C].

    Raises:
        ValueError: as :func:`read_picture`.
    """
    _check_channels(shape)
    channels, height, width = shape
    _check_declared(name, picture, (width, height))
    try:
        picture.load()  # what is decoded later would be read from a file that may have been closed
        pixels = _turn(pixels_of(picture, io.BytesIO()), _orientation(picture))
    except UnusableValuesError as error:
        raise PictureError(f"{name} is stored {error}; accepted are unsigned integers of at most 16 bits") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise PictureError(f"{name} is not a sound picture: {str(error)[:200]}") from None
    if pixels.shape[:2] != (height, width):
        raise _other_size(name, (pixels.shape[1], pixels.shape[0]), (width, height))
    return _convert(pixels, channels)


def read_any_picture(path: str | Path) -> Pixels:
    """Read a picture of any size, uint8 [H, W, C]: C is 1 if it is grey, else 3. Transparent parts are white.

    Raises:
        ValueError: the file is no sound picture.
    """
    return decode_any_picture(path, _read(path))


def decode_any_picture(name: str | Path, data: bytes) -> Pixels:
    """The same of a file's bytes; `name` is for the message."""
    pixels = _decode(name, data, None)
    return _convert(pixels, 1 if pixels.shape[2] <= 2 else 3)


def _check_channels(shape: Sequence[int]) -> None:
    if shape[0] not in CHANNELS:
        raise ValueError(f"images must have 1, 3 or 4 channels to be read from a picture, got {shape[0]}")


def _read(path: str | Path) -> bytes:
    try:
        return read_regular(path, MAX_BYTES, follow=True)
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}") from None


def _decode(
    name: str | Path, data: bytes, size: tuple[int, int] | None, formats: tuple[str, ...] = _PLUGINS
) -> Pixels:
    """Grey, grey with alpha, RGB or RGBA, uint8 [H, W, C], as the picture is; `size` is (W, H), either way up."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of metadata that is not used
            if data.startswith(SIGNATURE):
                check_chunks(data)
            return _decode_checked(name, io.BytesIO(data), size, formats)
    except PictureError:
        raise
    except UnusableValuesError as error:
        raise PictureError(f"{name} is stored {error}; accepted are unsigned integers of at most 16 bits") from None
    except Exception as error:  # decoders meet damaged files with errors of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{name} is not a sound picture ({_accepted(formats)}): {reason[:200]}") from None


def _accepted(formats: tuple[str, ...]) -> str:
    return FORMATS if formats is _PLUGINS else " or ".join(formats)


def _decode_checked(
    name: str | Path, file: IO[bytes], size: tuple[int, int] | None, formats: tuple[str, ...]
) -> Pixels:
    try:
        picture = Image.open(file, formats=formats)
    except Image.DecompressionBombError:
        raise PictureError(f"{name} declares more than the {MAX_PIXELS} pixels that a picture may have") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a sound picture ({_accepted(formats)})") from None
    with picture:
        _check_declared(name, picture, size)
        pixels = pixels_of(picture, file)
        return _turn(pixels, _orientation(picture))


def _check_declared(name: str | Path, picture: Image.Image, size: tuple[int, int] | None) -> None:
    """Refuse, before anything is decoded, pictures of another size, too large ones, and several in one file."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        given = f"declares {width} x {height} pixels"
        raise PictureError(f"{name} {given}, more than the {MAX_PIXELS} that a picture may have")
    if size is not None and sorted(picture.size) != sorted(size):
        raise _other_size(name, picture.size, size)
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a camera's JPEG, which brings previews of itself
        raise PictureError(f"{name} holds {frames} pictures; accepted is a file of one")


def _other_size(name: str | Path, size: tuple[int, int], wanted: tuple[int, int]) -> PictureError:
    return PictureError(f"{name} is {size[0]} x {size[1]} pixels, and images are {wanted[0]} x {wanted[1]}")


def _orientation(picture: Image.Image) -> int:
    """How the picture is to be turned, from 1 to 8; it may stand behind the pixels, and is looked for after them."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a sound picture, which viewers show as it is
        return 1


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels [H, W, C] as they are seen."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels)


def _convert(pixels: Pixels, channels: int) -> Pixels:
    """Grey, grey with alpha, RGB or RGBA [H, W, .] as images of ``channels``."""
    colours, alpha = (pixels[..., :-1], pixels[..., -1:]) if pixels.shape[2] in (2, 4) else (pixels, None)
    if alpha is not None and channels != 4:
        seen = colours.astype(np.uint16) * alpha + _PAPER * (255 - alpha.astype(np.uint16))
        colours = ((seen + 127) // 255).astype(np.uint8)
    if channels == 1 and colours.shape[2] == 3:
        return np.array(Image.fromarray(np.ascontiguousarray(colours)).convert("L"))[..., None]
    if channels > 1:
        colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
    if channels == 4:
        opaque = np.full_like(colours[..., :1], 255)
        return np.concatenate((colours, opaque if alpha is None else alpha), axis=2)
    return np.array(colours)
