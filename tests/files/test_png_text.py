"""The texts of PNG files: what is written is read, and what is damaged or of others does no harm."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

import stepfusion as sf
from stepfusion.files.images import encode_png
from stepfusion.files.png_text import read_texts
from stepfusion.files.provenance import Provenance, command_line, listed, texts

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_texts_come_back_and_pixels_stay() -> None:
    given = {"Software": "x", "stepfusion.model": "ü", "stepfusion.command": "日本 'a b'", "empty": ""}
    data = encode_png(PIXELS, texts=given)
    assert read_texts(data) == given
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.text == given  # an independent reader
        np.testing.assert_array_equal(np.asarray(picture), PIXELS)
    assert encode_png(PIXELS, texts=given) == data
    assert encode_png(PIXELS, texts={}) == encode_png(PIXELS) != data
    assert read_texts(encode_png(PIXELS)) == {}


def test_a_text_that_is_too_long_is_left_out() -> None:
    assert read_texts(encode_png(PIXELS, texts={"a": "x" * (1 << 17), "b": "y"})) == {"b": "y"}


def test_texts_of_others() -> None:
    data = encode_png(PIXELS)
    head, rest = data[:33], data[33:]
    more = chunk(b"tEXt", b"no separator") + chunk(b"zTXt", b"packed\0\0" + zlib.compress(b"z"))
    more += chunk(b"iTXt", b"packed\0\1\0\0\0" + zlib.compress(b"z")) + chunk(b"iTXt", b"short\0\0")
    more += chunk(b"iTXt", b"broken\0\0\0\0\0\xff") + chunk(b"tEXt", b"damaged\0x")[:-1] + b"\0"
    assert read_texts(head + more + chunk(b"tEXt", b"good\0\xe4") + rest) == {"good": "ä"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a", "it is not a PNG file"),
        (encode_png(PIXELS)[:-8], "it is cut short"),
        (b"", "it is not a PNG file"),
    ],
)
def test_what_is_no_png(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_texts(data)


@pytest.mark.parametrize(
    ("values", "short"),
    [
        ([5, 5, 5], "5"),
        (range(64), "0-63"),
        ([7], "7"),
        ([0, 1, 2] * 30, "0,1,2 in turn"),
        ([0, 1, 2, 0], "0,1,2,0"),
        ([1.5, 2.0, 0.1 + 0.2], "1.5,2,0.30000000000000004"),
        (["Bag", "Coat"], "Bag,Coat"),
        ([i * i for i in range(1000)], ",".join(str(i * i) for i in range(256)) + ", ..."),
        ([], ""),
    ],
)
def test_lists_are_short(values: list[int], short: str) -> None:
    assert listed(values) == short


def test_what_was_not_given_is_left_out() -> None:
    made = Provenance(model="m", sampler="ddim, eta 0", steps=3, seeds=[4], indices=[0]).text()
    facts = {"model": "m", "sampler": "ddim, eta 0", "steps": "3", "seed": "4", "index": "0"}
    assert made == {"Software": f"stepfusion {sf.__version__}", **{f"stepfusion.{k}": v for k, v in facts.items()}}


def test_words_of_a_shell_need_not_be_unicode() -> None:
    assert read_texts(encode_png(PIXELS, texts=texts({"command": "a\udcff"})))["stepfusion.command"] == "a?"


def test_a_command_line_is_quoted() -> None:
    options = {"num": 3, "first_index": None, "single": True, "quiet": False, "guidance": 0.1, "labels": "a b"}
    wanted = "stepfusion sample 'my model' --num 3 --single --guidance 0.1 --labels 'a b'"
    assert command_line("sample", "my model", options=options) == wanted
