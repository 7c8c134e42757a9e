"""The checksums of a PNG file, which decoders do not all look at: a damaged pixel is noticed, and not shown."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_HEAD = struct.Struct(">I4s")
_TELLING = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # chunks that say what is seen (PNG specification, 4.1)
_END = b"IEND"


def check_chunks(data: bytes) -> None:
    """ValueError if a chunk that says what is seen is damaged, or the file ends before its last chunk."""
    place = len(SIGNATURE)
    while place + _HEAD.size <= len(data):
        length, kind = _HEAD.unpack_from(data, place)
        end = place + _HEAD.size + length
        stored = data[end : end + 4]
        if len(stored) < 4:
            break
        if kind in _TELLING and zlib.crc32(memoryview(data)[place + 4 : end]) != int.from_bytes(stored, "big"):
            raise ValueError(f"its {kind.decode()} chunk at byte {place} is damaged")
        if kind == _END:
            return
        place = end + 4
    raise ValueError("it is cut short")
