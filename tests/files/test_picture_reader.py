"""Pictures are read as they are seen, however they are stored; what is damaged or too large is refused by name."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stepfusion.files.images import Pixels
from stepfusion.files.picture_reader import MAX_PIXELS, PictureError, read_any_picture, read_picture

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (6, 5), dtype=np.uint8)
WHITE = 255


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: NDArray[np.integer], colour_type: int, extra: bytes = b"", filter_type: int = 0) -> bytes:
    """A PNG of values [H, W, C] of their own depth, which Pillow cannot write for every colour type."""
    height, width, _ = values.shape
    depth = 8 * values.dtype.itemsize
    rows = [row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values]
    if filter_type == 2:  # "up": every byte is the difference from the one above
        rows = [
            bytes((b - a) % 256 for a, b in zip(above, row, strict=True))
            for above, row in zip([bytes(len(rows[0])), *rows[:-1]], rows, strict=True)
        ]
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(bytes([filter_type]) + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(path: Path, picture: Image.Image | bytes, **options: object) -> Path:
    if isinstance(picture, bytes):
        path.write_bytes(picture)
    else:
        picture.save(path, **options)
    return path


def read_as(path: Path, channels: int) -> Pixels:
    height, width = read_any_picture(path).shape[:2]
    return read_picture(path, (channels, height, width))


def refusal(path: Path) -> str:
    sentences = set()
    for read in (read_any_picture, lambda path: read_picture(path, (3, 6, 5))):
        with pytest.raises(ValueError) as caught:
            read(path)
        sentences.add(str(caught.value))
    (sentence,) = sentences
    assert "\n" not in sentence
    assert sentence.startswith(str(path))
    return sentence.removeprefix(str(path))


# 16 bits


@pytest.mark.parametrize("filter_type", [0, 2])
@pytest.mark.parametrize(
    ("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"]
)
def test_16_bits_are_rounded(colour_type: int, channels: int, filter_type: int, tmp_path: Path) -> None:
    """round(v / 257): 0 is black and 65535 is white."""
    values = RANDOM.integers(0, 65536, (40, 30, channels), dtype=np.uint16)
    values[0, :6, :1] = np.array([0, 128, 129, 255, 256, 65535])[:, None]
    if channels in (2, 4):
        values[..., -1] = 65535
    path = saved(tmp_path / "a.png", png(values, colour_type, filter_type=filter_type))
    expected = np.round(values / 257).astype(np.uint8)[..., : 1 if channels <= 2 else 3]
    np.testing.assert_array_equal(read_any_picture(path), expected)
    np.testing.assert_array_equal(read_picture(path, (expected.shape[2], 40, 30)), expected)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_tiff(order: str, tmp_path: Path) -> None:
    values = RANDOM.integers(0, 65536, (6, 5), dtype=np.uint16)
    path = saved(tmp_path / "a.tif", Image.fromarray(values.astype(order)))
    np.testing.assert_array_equal(read_any_picture(path)[..., 0], np.round(values / 257))


def test_pillows_way_is_another(tmp_path: Path) -> None:
    """Negative control: what the reader must not do."""
    values = RANDOM.integers(0, 65536, (40, 30, 1), dtype=np.uint16)
    with Image.open(saved(tmp_path / "a.png", png(values, 0))) as picture:
        assert (np.asarray(picture.convert("L")) == 255).mean() > 0.9
    colours = np.repeat(values, 3, axis=2)
    with Image.open(saved(tmp_path / "b.png", png(colours, 2))) as picture:
        assert (np.asarray(picture) != np.round(colours / 257)).mean() > 0.1


def test_values_without_a_white_are_refused(tmp_path: Path) -> None:
    for kind in (np.int32, np.float32):
        path = saved(tmp_path / "a.tif", Image.fromarray(RANDOM.integers(0, 99, (6, 5)).astype(kind)))
        assert refusal(path) == (
            " is stored with values that are signed, fractional or of 32 bits; accepted are unsigned integers of at "
            "most 16 bits"
        )


# Orientation

#: What the orientations of EXIF mean: how to turn what is stored.
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpg" else {}
    path = saved(tmp_path / f"a.{kind}", Image.fromarray(COLOUR), exif=exif, **options)
    with Image.open(saved(tmp_path / f"plain.{kind}", Image.fromarray(COLOUR), **options)) as picture:
        plain = np.asarray(picture)
    expected = TURNED[orientation](plain)  # not by ImageOps, which turns a TIFF twice in Pillow 10.0
    assert expected.shape == ((6, 5, 3) if orientation < 5 else (5, 6, 3))
    np.testing.assert_array_equal(read_any_picture(path), expected)
    np.testing.assert_array_equal(read_picture(path, (3, *expected.shape[:2])), expected)
    with pytest.raises(ValueError, match="pixels, and images are"):
        read_picture(path, (3, *expected.shape[1::-1]))


def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path) -> None:
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path / "a.png", Image.fromarray(COLOUR), exif=exif)
        np.testing.assert_array_equal(read_any_picture(path), COLOUR)
    path = saved(tmp_path / "a.png", png(COLOUR, 2, chunk(b"eXIf", b"MM\x00\x2a\x00\x00\xff\xff damaged")))
    np.testing.assert_array_equal(read_any_picture(path), COLOUR)


# Transparency


def test_colour_under_full_transparency_stays_hidden(tmp_path: Path) -> None:
    values = np.dstack((COLOUR, np.full((6, 5), 255, dtype=np.uint8)))
    values[2:4, 1:3, 3] = 0
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    expected = COLOUR.copy()
    expected[2:4, 1:3] = WHITE
    np.testing.assert_array_equal(read_any_picture(path), expected)
    np.testing.assert_array_equal(read_as(path, 3), expected)
    np.testing.assert_array_equal(read_as(path, 1)[..., 0], np.asarray(Image.fromarray(expected).convert("L")))
    np.testing.assert_array_equal(read_as(path, 4), values)  # images with an alpha channel hide it themselves


def test_half_transparency_is_seen_on_white(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    share = values[..., 3:] / 255
    expected = np.round(values[..., :3] * share + WHITE * (1 - share))
    assert np.abs(read_any_picture(path) - expected).max() <= 0.51
    with Image.open(path) as picture:
        white = Image.new("RGBA", picture.size, "white")
        np.testing.assert_allclose(
            read_any_picture(path), Image.alpha_composite(white, picture).convert("RGB"), atol=1
        )


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_grey_with_alpha_is_one_channel(depth: type[np.integer], tmp_path: Path) -> None:
    top = np.iinfo(depth).max
    values = np.dstack((GREY, np.full_like(GREY, 255))).astype(depth) * (top // 255)
    values[0, 0, 1] = 0
    path = saved(tmp_path / "a.png", png(values, 4))
    expected = GREY[..., None].copy()
    expected[0, 0] = WHITE
    np.testing.assert_array_equal(read_any_picture(path), expected)
    np.testing.assert_array_equal(read_as(path, 3), expected.repeat(3, 2))
    np.testing.assert_array_equal(read_as(path, 4)[0, 1], [*[GREY[0, 1]] * 3, 255])


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_one_colour_that_is_transparent(
    colour_type: int, channels: int, depth: type[np.integer], tmp_path: Path
) -> None:
    values = RANDOM.integers(0, 200, (6, 5, channels)).astype(depth)
    values[1, 2] = 201
    hidden = chunk(b"tRNS", struct.pack(f">{channels}H", *[201] * channels))
    path = saved(tmp_path / "a.png", png(values, colour_type, hidden))
    expected = np.round(values / (np.iinfo(depth).max / 255)).astype(np.uint8)
    expected[1, 2] = WHITE
    np.testing.assert_array_equal(read_any_picture(path), expected)


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    for palette, channels in (([10, 10, 10, 90, 90, 90], 1), ([10, 20, 30, 200, 0, 0], 3)):
        picture = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8), mode="P")
        picture.putpalette(palette)
        plain = read_any_picture(saved(tmp_path / "a.png", picture))
        assert plain.shape == (2, 2, channels)
        np.testing.assert_array_equal(plain[0, 1], palette[3 : 3 + channels])
        hidden = read_any_picture(saved(tmp_path / "a.png", picture, transparency=1))
        np.testing.assert_array_equal(hidden[0, 1], [WHITE] * channels)
        np.testing.assert_array_equal(hidden[0, 0], palette[:channels])


# Channels and formats


@pytest.mark.parametrize(
    ("name", "mode", "channels"),
    [
        *[("a.png", mode, channels) for mode, channels in (("1", 1), ("L", 1), ("RGB", 3), ("P", 1))],
        *[("a.jpg", mode, channels) for mode, channels in (("L", 1), ("RGB", 3), ("CMYK", 3))],
        *[("a.bmp", mode, channels) for mode, channels in (("1", 1), ("L", 1), ("RGB", 3))],
        *[("a.tif", mode, channels) for mode, channels in (("1", 1), ("L", 1), ("RGB", 3), ("LAB", 3), ("LA", 1))],
        ("a.webp", "RGB", 3),
        ("a.JPEG", "L", 1),
        ("a.tiff", "CMYK", 3),
    ],
)
def test_every_mode_of_every_format(name: str, mode: str, channels: int, tmp_path: Path) -> None:
    with Image.open(saved(tmp_path / name, Image.new(mode, (5, 6), (7, 255) if mode == "LA" else 0))) as picture:
        expected = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(6, 5, channels)
    np.testing.assert_array_equal(read_any_picture(tmp_path / name), expected)
    for wanted in (1, 3, 4):
        assert read_picture(tmp_path / name, (wanted, 6, 5)).shape == (6, 5, wanted)


def test_images_of_other_channels_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images must have 1, 3 or 4 channels to be read from a picture, got 2"):
        read_picture(saved(tmp_path / "a.png", Image.fromarray(GREY)), (2, 6, 5))


def test_a_cameras_jpeg_may_bring_previews_of_itself(tmp_path: Path) -> None:
    previews = [Image.fromarray(COLOUR[::2, ::2])]
    path = saved(tmp_path / "a.jpg", Image.fromarray(COLOUR), format="MPO", save_all=True, append_images=previews)
    assert read_any_picture(path).shape == COLOUR.shape


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_several_pictures_in_a_file_are_refused(name: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1].copy())]
    path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
    assert refusal(path) == " holds 2 pictures; accepted is a file of one"


# What is damaged or hostile


def bomb(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8192, 8193), (60_000, 60_000), (1, MAX_PIXELS + 1), (10_000, 9_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width: int, height: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "bomb.png", bomb(width, height))
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        read_any_picture(path)
    assert str(caught.value).startswith(f"{path} declares ")
    assert f"the {MAX_PIXELS} " in str(caught.value)
    with pytest.raises(ValueError, match=r"bomb\.png (declares|is \d+ x \d+ pixels, and images are 28 x 28)"):
        read_picture(path, (1, 28, 28))
    assert time.process_time() - began < 5


def test_text_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    assert "is not a sound picture" in refusal(saved(tmp_path / "a.png", png(COLOUR, 2, text)))


def test_another_size_is_refused_before_decoding(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", png(COLOUR, 2)[:-30] + bytes(30))
    with pytest.raises(ValueError, match="is not a sound picture"):
        read_picture(path, (3, 6, 5))
    path = saved(tmp_path / "b.png", Image.fromarray(COLOUR))
    with pytest.raises(ValueError, match=r"b\.png is 5 x 6 pixels, and images are 7 x 6"):
        read_picture(path, (3, 6, 7))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_file_that_is_cut_short_is_refused(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
    for share in (0.1, 0.5, 0.9):
        path = saved(tmp_path / "a.png", buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
        with pytest.raises(ValueError, match=r"a\.png is not a sound picture \(PNG, JPEG, WebP, BMP or TIFF\)"):
            read_any_picture(path)


def test_no_bit_of_a_png_flips_unnoticed(tmp_path: Path) -> None:
    data = bytearray(png(COLOUR, 2))
    for place in range(len(data)):
        damaged = bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        assert "sound picture" in refusal(saved(tmp_path / "a.png", damaged)), place


def test_noise_ends_in_one_sentence(tmp_path: Path) -> None:
    """Decoders raise errors of every kind on damaged files."""
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(COLOUR).save(buffer, kind)
        for _ in range(100):
            data = bytearray(buffer.getvalue())
            for place in RANDOM.integers(0, len(data), 5):
                data[place] = RANDOM.integers(0, 256)
            path = saved(tmp_path / "a.png", bytes(data))
            with suppress(PictureError):
                read_any_picture(path)


@pytest.mark.parametrize("data", [b"", b"no picture", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture(data: bytes, tmp_path: Path) -> None:
    assert "is not a sound picture (PNG, JPEG, WebP, BMP or TIFF)" in refusal(saved(tmp_path / "a.png", data))


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
def test_what_is_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.png") == f" cannot be read: {os.strerror(2)}"
    (tmp_path / "folder.png").mkdir()
    assert "it is a folder" in refusal(tmp_path / "folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert "it is a pipe" in refusal(tmp_path / "pipe.png")
    saved(tmp_path / "real.png", Image.fromarray(COLOUR))
    (tmp_path / "link.png").symlink_to("real.png")  # data sets are often made of links
    np.testing.assert_array_equal(read_any_picture(tmp_path / "link.png"), COLOUR)
