"""The texts that a PNG file carries beside its pixels (PNG specification, 11.3.3)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping

from PIL.PngImagePlugin import PngInfo

from stepfusion.files.png_chunks import SIGNATURE, check_chunks

_HEAD = struct.Struct(">I4s")
_MOST_BYTES = 1 << 16  # of one text
_LONGEST_KEYWORD = 79


def png_info(texts: Mapping[str, str]) -> PngInfo:
    """Texts for Pillow's writer: tEXt chunks, or iTXt where Latin-1 has no such character; never compressed."""
    info = PngInfo()
    for keyword, text in texts.items():
        if len(text.encode()) <= _MOST_BYTES:
            info.add_text(keyword, text)
    return info


def read_texts(data: bytes) -> dict[str, str]:
    """The texts of a PNG file that are not compressed, in their order; of one keyword the last.

    Raises:
        ValueError: the bytes are no PNG file, or a damaged one.
    """
    if not data.startswith(SIGNATURE):
        raise ValueError("it is not a PNG file")
    check_chunks(data)
    found = {}
    for kind, content in _chunks(data):
        if kind in (b"tEXt", b"iTXt") and len(content) <= _MOST_BYTES + 2 * _LONGEST_KEYWORD:
            keyword, separator, rest = content.partition(b"\0")
            text = rest.decode("latin-1") if kind == b"tEXt" else _international(rest)
            if separator and text is not None:
                found[keyword.decode("latin-1")] = text
    return found


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The sound chunks of a file that :func:`check_chunks` found whole."""
    place = len(SIGNATURE)
    kind = b""
    while kind != b"IEND":
        length, kind = _HEAD.unpack_from(data, place)
        end = place + _HEAD.size + length
        if zlib.crc32(memoryview(data)[place + 4 : end]) == int.from_bytes(data[end : end + 4], "big"):
            yield kind, data[place + _HEAD.size : end]
        place = end + 4


def _international(rest: bytes) -> str | None:
    """The text of an iTXt chunk after its keyword; None if it is compressed or damaged."""
    parts = rest[2:].split(b"\0", 2)
    if rest[:1] != b"\0" or len(parts) < 3:
        return None
    try:
        return parts[2].decode()
    except UnicodeDecodeError:
        return None
