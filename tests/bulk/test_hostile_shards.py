"""Shards that somebody made, or that decayed, under a manifest that agrees: one sentence each, and little memory."""

from __future__ import annotations

import io
import resource
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from stepfusion.bulk.manifest import read_records, write_sorted
from stepfusion.bulk.shards import FORMATS, shard_digest
from stepfusion_testing.bulk_jobs import TINY, generate, tree

MOST_MEMORY = 300 << (20 if sys.platform == "darwin" else 10)  # in the unit of getrusage

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs that were made once, by their formats."""
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
def made(templates: Path) -> Callable[[str], Path]:
    """Makes a finished job in the directory ``out``; returns its second shard."""

    def make(form: str) -> Path:
        if not (templates / form).exists():
            generate(f"{TINY} --out out --format {form}")
            shutil.move("out", templates / form)
        shutil.copytree(templates / form, "out")
        return Path("out/images", f"000001{FORMATS[form].suffix}")

    return make


def forge(shard: Path) -> None:
    """Let the manifest agree with what the shard has become."""
    records = read_records(Path("out"))
    digest, size = shard_digest(Path("out"), shard.name)
    records[1] = replace(records[1], sha256=digest, bytes=size)
    write_sorted(Path("out"), records.values())


def unsound(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Checking ends in one line with these words, in little memory."""
    capsys.readouterr()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generate("generate --verify out", status=1)
    error = capsys.readouterr().err
    assert error.startswith("stepfusion: out is not complete and sound: unit 1 ")
    assert error.count("\n") == 1
    assert len(error) < 500
    assert all(word in error for word in words), error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


# Archives


def tar_members(path: Path) -> Members:
    """What is in a tar."""
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def tar_of(members: Mapping[str, bytes], **changes: Any) -> bytes:
    """A tar; ``changes`` are attributes of its second member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=changes.pop("format", tarfile.USTAR_FORMAT)) as archive:
        for number, (name, data) in enumerate(members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in changes.items() if number == 1 else ():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def png(pixels: Any, **options: Any) -> bytes:
    """A PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_stating(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A grey PNG that says that it has this size."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


GREY = np.zeros((8, 8), np.uint8)
ROWS = bytes(9 * 8)  # eight rows of a filter and eight pixels
PICTURES: dict[str, bytes] = {
    "empty": b"",
    "text": b"no picture",
    "signature": b"\x89PNG\r\n\x1a\n",
    "cut off": png(np.arange(64, dtype=np.uint8).reshape(8, 8) * 37)[:60],
    "another size": png(np.zeros((8, 9), np.uint8)),
    "colours": png(np.zeros((8, 8, 3), np.uint8)),
    "sixteen bits": png(np.zeros((8, 8), np.uint16)),
    "two levels": png(GREY.astype(bool)),
    "bomb": png_stating(60_000, 60_000, bytes(1 << 20)),
    "largest": png_stating(2**31 - 1, 2**31 - 1),
    "no rows": png_stating(8, 8, b""),
    "no stream": png_stating(8, 8, ROWS).replace(zlib.compress(ROWS), b"\x00" * len(zlib.compress(ROWS))),
    "too long": png_stating(8, 8, bytes(64 << 20)) + bytes(4000),
    "text bomb": png_stating(8, 8, ROWS, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5 << 20)))),
    "JPEG": b"\xff\xd8\xff\xe0" + bytes(100),
}


@pytest.mark.parametrize("form", ["webdataset", "png"])
@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture(form: str, picture: str, made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    shard = made(form)
    if form == "png":
        (shard / "0000000009.png").write_bytes(PICTURES[picture])
    else:
        shard.write_bytes(tar_of({**tar_members(shard), "0000000009.png": PICTURES[picture]}))
    forge(shard)
    unsound(capsys)


def renamed(members: Members, old: str, new: str) -> Members:
    """Members of which one has another name."""
    return {new if name == old else name: data for name, data in members.items()}


TARS: dict[str, tuple[Callable[[Members], bytes], str]] = {
    "empty": (lambda m: bytes(10240), "other indices"),
    "nothing": (lambda m: b"x" * 10240, "cannot be read: ReadError"),
    "text": (lambda m: b"no archive" * 9, "cannot be read: ReadError"),
    "cut in a header": (lambda m: tar_of(m)[: 512 * 7 + 100], "unit 1 "),
    "cut in a picture": (lambda m: tar_of(m)[: 512 + 20], "unit 1 "),
    "cut after a picture": (lambda m: tar_of(m)[: 512 * 6], "other indices"),
    "a damaged header": (lambda m: tar_of(m)[:3072] + b"\xff" * 512 + tar_of(m)[3584:], "unit 1 "),
    "compressed": (lambda m: zlib.compress(tar_of(m)) + bytes(100), "cannot be read: ReadError"),
    "other order": (lambda m: tar_of(dict(reversed(m.items()))), "other indices"),
    "one more": (lambda m: tar_of({**m, "0000000016.png": m["0000000009.png"]}), "other indices"),
    "one less": (lambda m: tar_of({k: v for k, v in m.items() if "15" not in k}), "other indices"),
    "no label": (lambda m: tar_of({k: v for k, v in m.items() if k != "0000000009.cls"}), "other labels"),
    "another label": (lambda m: tar_of({**m, "0000000009.cls": b"1"}), "other labels"),
    "a long label": (lambda m: tar_of({**m, "0000000009.cls": b"9" * 5000}), "no plain file of at most 1 bytes"),
    "another index": (lambda m: tar_of({**m, "0000000009.json": b'{"seed": 0, "index": 8, "label": 0}'}), "indices"),
    "a name": (lambda m: tar_of(renamed(m, "0000000009.png", "../../0000000009.png")), "other indices"),
    "an absolute name": (lambda m: tar_of(renamed(m, "0000000009.cls", "/etc/passwd")), "other labels"),
    "a link": (lambda m: tar_of(m, type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0), "no plain file"),
    "a hard link": (lambda m: tar_of(m, type=tarfile.LNKTYPE, linkname="0000000008.png", size=0), "no plain file"),
    "a device": (lambda m: tar_of(m, type=tarfile.CHRTYPE, size=0), "no plain file"),
    "a folder": (lambda m: tar_of(m, type=tarfile.DIRTYPE, size=0), "no plain file"),
    "a sparse file": (
        lambda m: tar_of(
            m, format=tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 50)}
        ),
        "no plain file",
    ),
    "a large size": (
        lambda m: tar_of(m, format=tarfile.PAX_FORMAT, pax_headers={"size": str(1 << 50)}),
        "no plain file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARS)
def test_a_tar(kind: str, made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    shard = made("webdataset")
    change, words = TARS[kind]
    shard.write_bytes(change(tar_members(shard)))
    forge(shard)
    unsound(capsys, words)


def npz_members(path: Path) -> Members:
    """What is in an npz."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npz_of(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An npz."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    """A .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def stating(array: bytes, old: bytes, new: bytes) -> bytes:
    """A .npy whose header says something else."""
    header = 128
    start = array[:header].replace(old, new)
    return start.rstrip(b"\n ").ljust(header - 1) + b"\n" + array[header:]


NPZS: dict[str, tuple[Callable[[Members], bytes], str]] = {
    "empty": (lambda m: bytes(64), "cannot be read: BadZipFile"),
    "no zip": (lambda m: b"no archive" * 9, "cannot be read: BadZipFile"),
    "cut off": (lambda m: npz_of(m)[:-30], "cannot be read: BadZipFile"),
    "a damaged picture": (lambda m: npz_of(m).replace(m["arr_0.npy"][200:260], bytes(60)), "cannot be read: BadZip"),
    "compressed": (lambda m: npz_of(m, zipfile.ZIP_DEFLATED), "other shape"),
    "a bomb": (lambda m: npz_of({**m, "arr_0.npy": bytes(20 << 20)}, zipfile.ZIP_DEFLATED), "other shape"),
    "a large shape": (
        lambda m: npz_of({**m, "arr_0.npy": stating(m["arr_0.npy"], b"(8, 8, 8, 1)", b"(1000000000000,)")}),
        "other shape",
    ),
    "another shape": (
        lambda m: npz_of({**m, "arr_0.npy": stating(m["arr_0.npy"], b"(8, 8, 8, 1)", b"(8, 1, 8, 8)")}),
        "other shape",
    ),
    "another dtype": (lambda m: npz_of({**m, "arr_0.npy": stating(m["arr_0.npy"], b"|u1", b"|i1")}), "other shape"),
    "objects": (lambda m: npz_of({**m, "arr_0.npy": npy(np.array([{}, 1], object))}), "other shape"),
    "code": (lambda m: npz_of({**m, "indices.npy": b"cos\nsystem\n(S'false'\ntR."}), "other shape"),
    "no indices": (lambda m: npz_of({k: v for k, v in m.items() if k != "indices.npy"}), "other labels"),
    "no labels": (lambda m: npz_of({k: v for k, v in m.items() if k != "arr_1.npy"}), "other labels"),
    "one more array": (lambda m: npz_of({**m, "arr_2.npy": m["arr_1.npy"]}), "other labels"),
    "other indices": (lambda m: npz_of({**m, "indices.npy": npy(np.arange(8))}), "other indices"),
    "other labels": (lambda m: npz_of({**m, "arr_1.npy": npy(np.zeros(8, np.int64))}), "other labels"),
    "no names": (lambda m: npz_of(renamed(m, "arr_0.npy", "../arr_0.npy")), "other labels"),
    "encrypted": (lambda m: npz_of(m).replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
                  "cannot be read: RuntimeError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NPZS)
def test_an_npz(kind: str, made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    shard = made("npz")
    change, words = NPZS[kind]
    shard.write_bytes(change(npz_members(shard)))
    forge(shard)
    unsound(capsys, words)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda p: (p / "metadata.csv").unlink(), "other indices"),
    "another label": (
        lambda p: (p / "metadata.csv").write_bytes((p / "metadata.csv").read_bytes().replace(b"9.png,0", b"9.png,1")),
        "other labels",
    ),
    "a longer table": (lambda p: (p / "metadata.csv").write_bytes(b"file_name,label\n" * 2000), "no plain file"),
    "no text": (lambda p: (p / "metadata.csv").write_bytes(b"\xff\xfe\x00"), "other labels"),
    "a quotation mark": (lambda p: (p / "metadata.csv").write_bytes(b'"' * 100), "other labels"),
    "one picture less": (lambda p: (p / "0000000009.png").unlink(), "other indices"),
    "one picture more": (lambda p: shutil.copy(p / "0000000009.png", p / "0000000016.png"), "other indices"),
    "another name": (lambda p: (p / "0000000009.png").rename(p / "0000000099.png"), "other indices"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder(kind: str, made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    shard = made("png")
    change, words = FOLDERS[kind]
    change(shard)
    forge(shard)
    unsound(capsys, words)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_with_a_large_hole(form: str, made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A terabyte that takes no space is neither hashed nor read."""
    shard = made(form)
    with (shard / "0000000009.png" if form == "png" else shard).open("r+b") as file:
        file.truncate(1 << 40)
    records = read_records(Path("out"))
    records[1] = replace(records[1], bytes=1 << 40)
    write_sorted(Path("out"), records.values())
    unsound(capsys, "has 1099511627776 bytes in the manifest, which cannot hold its images")
    write_sorted(Path("out"), [replace(records[1], bytes=30720), records[0], records[2]])
    unsound(capsys, "has another hash or size than in the manifest")


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_damaged_is_made_again(form: str, made: Callable[[str], Path]) -> None:
    shard = made(form)
    before = tree()
    if form == "png":
        (shard / "0000000009.png").write_bytes(PICTURES["bomb"])
    else:
        shard.write_bytes(shard.read_bytes()[:700])
    forge(shard)
    generate(f"{TINY} --out out --format {form}", status=1)
    generate(f"{TINY} --out out --format {form}")
    assert tree() == before


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_not_damaged_is_sound(form: str, made: Callable[[str], Path]) -> None:
    """The control: a shard that is taken apart and put together again is the same, and so is one with comments."""
    shard = made(form)
    if form == "webdataset":
        before = shard.read_bytes()
        shard.write_bytes(tar_of(tar_members(shard)))
        assert shard.read_bytes() == before
        shard.write_bytes(tar_of(tar_members(shard), mtime=1_700_000_000))
    elif form == "npz":
        shard.write_bytes(npz_of(npz_members(shard)))
    else:
        comment = PngImagePlugin.PngInfo()
        comment.add_text("Comment", "the same pixels")
        with Image.open(shard / "0000000009.png") as picture:
            (shard / "0000000009.png").write_bytes(png(np.array(picture), pnginfo=comment))
    forge(shard)
    generate("generate --verify out --quiet")
