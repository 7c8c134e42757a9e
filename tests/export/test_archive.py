"""An archive of PyTorch is looked at before it is unpacked: nothing is written outside, and no bomb goes off."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion.export.archive import check_archive
from stepfusion.export.to_aoti import load_package
from stepfusion.export.to_torch_tensorrt import TorchTensorRTNetwork

CPU = torch.device("cpu")
FOLDER = "model/data/aotinductor/model/"  # what PyTorch unpacks

Spoil = Callable[[zipfile.ZipFile], object]


def add(name: str, data: bytes = b"x", mode: int = 0, **settings: int) -> Spoil:
    """What adds an entry of any name to an archive; zipfile itself would make a tidy one of some names."""

    def spoil(archive: zipfile.ZipFile) -> None:
        entry = zipfile.ZipInfo("placeholder")
        entry.filename = entry.orig_filename = name
        entry.external_attr = mode << 16
        for key, value in settings.items():
            setattr(entry, key, value)
        archive.writestr(entry, data)

    return spoil


def twice(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("model/version", b"again")


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "a name above": (add("../evil"), r"its entry '../evil' is not the name of a file inside it"),
    "a name above, inside": (add(FOLDER + "../../evil"), r"is not the name of a file inside it"),
    "a name above, at the end": (add(FOLDER + ".."), r"is not the name of a file inside it"),
    "an absolute name": (add("/tmp/evil"), r"its entry '/tmp/evil' is not the name"),
    "a name with two slashes": (add("model//tmp/evil"), r"is not the name of a file inside it"),
    "a folder": (add("model/folder/", b""), r"is not the name of a file inside it"),
    "a Windows name above": (add("model\\..\\..\\evil"), r"is not the name of a file inside it"),
    "a Windows drive": (add("C:/evil"), r"its entry 'C:/evil' is not the name"),
    "a name with a line break": (add("model/a\nb"), r"is not the name of a file inside it"),
    "no name": (add(""), r"its entry '' is not the name"),
    "a link": (add("model/link", b"/etc/passwd", stat.S_IFLNK | 0o777), r"its entry 'model/link' is a link"),
    "a compressed entry": (
        add("model/zeros", bytes(1 << 20), compress_type=zipfile.ZIP_DEFLATED),
        r"(is compressed|its entries claim \d+ bytes, and the file has \d+)",
    ),
    "a compressed entry that is small": (
        add("model/zeros", bytes(100), compress_type=zipfile.ZIP_DEFLATED),
        r"its entry 'model/zeros' is compressed",
    ),
    "an entry that is there twice": (twice, r"it has two entries 'model/version'"),
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive as PyTorch writes it, as far as its form goes."""
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model/archive_format", "pt2")
        made.writestr("model/version", "3")
        made.writestr(FOLDER + "wrapper_metadata.json", "{}")
    return path


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_unopened(what: str, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        pytest.fail("the archive was opened")

    spoil, message = HOSTILE[what]
    check_archive(archive)
    with zipfile.ZipFile(archive, "a") as opened_archive:
        spoil(opened_archive)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", opened)
    with pytest.raises(sf.ExportError, match=rf"^model.pt2 is no archive that PyTorch wrote: .*{message}"):
        load_package(archive, CPU)
    with pytest.raises(sf.ExportError, match=message):  # before the package is asked for, which need not be installed
        TorchTensorRTNetwork(archive, None, CPU)  # type: ignore[arg-type]


def test_nothing_is_written_outside(archive: Path, tmp_path: Path) -> None:
    """PyTorch itself would write it, wherever its own folder for unpacking is."""
    target = tmp_path / "outside"
    with zipfile.ZipFile(archive, "a") as made:
        made.writestr(FOLDER + "../" * 20 + str(target).lstrip(os.sep), "evil")
    with pytest.raises(sf.ExportError, match=r"is not the name of a file inside it$"):
        load_package(archive, CPU)
    assert not target.exists()


def test_an_entry_whose_own_header_has_another_name_is_refused(archive: Path) -> None:
    data = archive.read_bytes()
    first = data.index(b"model/archive_format")
    archive.write_bytes(data[:first] + b"../../archive_format" + data[first + 20 :])
    with pytest.raises(sf.ExportError, match=r"^model.pt2 is no archive that PyTorch wrote: .* and header .* differ"):
        check_archive(archive)


def test_entries_that_lie_over_each_other_are_refused(archive: Path) -> None:
    """A bomb that compresses nothing: many names for the same bytes."""
    data = b"x" * 10_000
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("model/data", data)
        first = made.infolist()[0]
        for i in range(50):
            entry = zipfile.ZipInfo(f"model/{i}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(entry, name, getattr(first, name))
            made.filelist.append(entry)
            made.NameToInfo[entry.filename] = entry
        made._didModify = True
    with pytest.raises(sf.ExportError, match=r"its entries claim 510000 bytes, and the file has \d+$"):
        check_archive(archive)


def test_an_encrypted_entry_is_refused(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    central = data.index(b"PK\x01\x02")
    struct.pack_into("<H", data, central + 8, 1)
    archive.write_bytes(bytes(data))
    with pytest.raises(sf.ExportError, match=r"its entry 'model/archive_format' is encrypted$"):
        check_archive(archive)


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(10)])
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(data)
    with pytest.raises(sf.ExportError, match=r"^model.pt2 is no archive that PyTorch wrote: File is not a zip file$"):
        check_archive(path)


def test_a_truncated_archive_is_refused(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(sf.ExportError, match=r"^model.pt2 is no archive that PyTorch wrote: "):
        check_archive(archive)


def test_what_pytorch_writes_is_accepted(tmp_path: Path) -> None:
    program = torch.export.export(nn.Conv2d(1, 2, 3), (torch.zeros(1, 1, 4, 4),))
    torch.export.save(program, tmp_path / "program.pt2")
    check_archive(tmp_path / "program.pt2")
