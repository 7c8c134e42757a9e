"""Folders of pictures as data sets: nothing is left out without a word, and the litter of systems is passed over."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepfusion.commands.main import main
from stepfusion.training.datasets import ImageDataset, load_dataset
from stepfusion_testing.tiny_model import SIZE, save_tiny_model

LITTER = (
    *("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "__MACOSX/._a.png", "__MACOSX/a.png"),
    *("@eaDir/a.png/SYNOPHOTO.jpg", ".ipynb_checkpoints/a-checkpoint.png", "THUMBS.DB", "Icon\r"),
)


def draw(path: Path, value: int, size: tuple[int, int] = (5, 6)) -> None:
    """A grey picture of one value, in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.new("L", size, value).save(path, **options)


def fill(root: Path, pictures: Mapping[str, int], others: tuple[str, ...] = ()) -> Path:
    for name, value in pictures.items():
        draw(root / name, value)
    for name in others:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("no picture")
    return root


def values(dataset: ImageDataset) -> list[int]:
    """The value of each picture."""
    return dataset.images[:, 0, 0, 0].tolist()


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_dataset(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(f"{path}")


def test_every_format_is_read(tmp_path: Path) -> None:
    names = ("a.png", "b.jpg", "c.jpeg", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.PNG")
    dataset = load_dataset(fill(tmp_path, {f"cats/{name}": 10 * i for i, name in enumerate(names)}))
    assert values(dataset) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert (dataset.class_names, dataset.left_out) == (("cats",), ())


def test_folders_in_class_folders_belong_to_the_class(tmp_path: Path) -> None:
    pictures = {"cats/a.png": 1, "cats/more/b.png": 2, "cats/more/than/that/c.png": 3, "dogs/d.png": 4}
    dataset = load_dataset(fill(tmp_path, pictures))
    assert (values(dataset), dataset.labels.tolist()) == ([1, 2, 3, 4], [0, 0, 0, 1])


@pytest.mark.parametrize("wrapped", [{"train/cats/a.png": 1, "test/cats/b.png": 2}, {"data/cats/a.png": 1}])
def test_class_folders_a_level_deeper_are_pointed_at(wrapped: dict[str, int], tmp_path: Path) -> None:
    """Else "train" and "test" would be the classes."""
    sentence = refusal(fill(tmp_path, wrapped))
    folder = min(name.split("/")[0] for name in wrapped)
    assert sentence.startswith(" holds no picture in its folders, but in theirs, as ")
    assert sentence.endswith(f"name the folder that holds the class folders, as {tmp_path / folder}")
    assert load_dataset(tmp_path / folder).class_names == ("cats",)


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    dataset = load_dataset(fill(tmp_path, {"b.png": 2, "a.png": 1, "c.webp": 3}))
    assert (values(dataset), dataset.labels, dataset.class_names) == ([1, 2, 3], None, None)


def test_a_flat_folder_with_labels(tmp_path: Path) -> None:
    fill(tmp_path, {"b.png": 2, "a.png": 1})
    (tmp_path / "metadata.csv").write_text("file_name,label\nb.png,5\na.png,0\n")
    dataset = load_dataset(tmp_path)
    assert (values(dataset), dataset.labels.tolist(), dataset.left_out) == ([1, 2], [0, 5], ())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file_name,label\nb.png,5\n", "has no a.png; it needs file_name and label of every picture"),
        ("file_name,class\nb.png,5\na.png,1\n", "has no label; it needs file_name and label of every picture"),
        ("", "has no a.png"),
        ("file_name,label\na.png,cat\nb.png,1\n", "does not give a label to every picture: invalid literal"),
        ("file_name,label\na.png\nb.png,1\n", "does not give a label to every picture: "),
        ("file_name,label\na.png,-1\nb.png,1\n", "has the label -1; accepted are integers from 0 on"),
        ("file_name,label\na.png,1.5\nb.png,1\n", "does not give a label to every picture"),
        ("\xff\xfe", "does not give a label to every picture"),
    ],
)
def test_labels_that_do_not_fit(text: str, sentence: str, tmp_path: Path) -> None:
    fill(tmp_path, {"b.png": 2, "a.png": 1})
    (tmp_path / "metadata.csv").write_bytes(text.encode("latin-1"))
    assert refusal(tmp_path).startswith(f"/metadata.csv {sentence}")


def test_what_systems_leave_there_is_passed_over(tmp_path: Path) -> None:
    plain = load_dataset(fill(tmp_path / "plain", {"cats/a.png": 1, "dogs/b.png": 2}))
    littered = fill(tmp_path / "littered", {"cats/a.png": 1, "dogs/b.png": 2}, LITTER)
    fill(littered / "cats", {}, LITTER)
    dataset = load_dataset(littered)
    assert torch.equal(dataset.images, plain.images)
    assert (dataset.class_names, dataset.labels.tolist(), dataset.left_out) == (("cats", "dogs"), [0, 1], ())
    assert values(load_dataset(fill(tmp_path / "flat", {"a.png": 7}, LITTER))) == [7]


def test_pictures_beside_class_folders_are_refused(tmp_path: Path) -> None:
    """Whether they are a class of their own, or lost, nobody can tell."""
    assert refusal(fill(tmp_path, {"cats/a.png": 1, "loose.png": 2})) == (
        " holds loose.png beside the folder cats, which holds pictures too: put every picture into the folder of its "
        "class, or none"
    )
    (tmp_path / "loose.png").rename(tmp_path / "loose.webp")
    assert refusal(tmp_path).startswith(" holds loose.webp beside the folder cats")


def test_what_is_no_picture_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = ("README.txt", "cats/notes.md", "cats/deep/labels.json", "dogs/LICENSE", "dogs/a.npy")
    fill(tmp_path / "data", {"cats/a.png": 1, "dogs/b.png": 2}, others)
    dataset = load_dataset(tmp_path / "data")
    assert values(dataset) == [1, 2]
    assert {str(path.relative_to(tmp_path / "data")) for path in dataset.left_out} == set(others)
    assert main(["train", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 1  # a batch is larger than two
    said = capsys.readouterr().err.splitlines()
    named = "README.txt, cats/deep/labels.json, cats/notes.md and 2 more"
    assert said[0] == f"stepfusion: 5 files are no pictures, and left out: {named}"


@pytest.mark.parametrize("name", ["cats/a.gif", "cats/a.HEIC", "cats/deep/a.avif", "a.ppm"])
def test_a_picture_that_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    path = fill(tmp_path, {"cats/b.png": 1} if name.startswith("cats") else {"b.png": 1}, (name,))
    assert refusal(path) == f"/{name} is of a format that is not read; accepted are PNG, JPEG, WebP, BMP or TIFF"


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"cats/a.png": 1}, ("dogs/notes.txt", "dogs/.hidden.png"))
    assert refusal(tmp_path) == "/dogs is the folder of a class, and holds no picture (PNG, JPEG, WebP, BMP or TIFF)"


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
def test_links_to_pictures_and_folders_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "store", {"cats/a.png": 1, "cats/b.png": 2})
    fill(tmp_path / "data", {"dogs/c.png": 3})
    (tmp_path / "data/cats").symlink_to(tmp_path / "store/cats")
    (tmp_path / "data/dogs/d.png").symlink_to(tmp_path / "store/cats/b.png")
    assert values(load_dataset(tmp_path / "data")) == [1, 2, 3, 2]
    (tmp_path / "data/dogs/circle").symlink_to("../../data")
    assert refusal(tmp_path / "data") == "/dogs/circle is a link to a folder that holds it"
    (tmp_path / "data/dogs/circle").unlink()
    os.mkfifo(tmp_path / "data/dogs/pipe.png")
    assert "/dogs/pipe.png cannot be read: it is a pipe" in refusal(tmp_path / "data")


def test_pictures_of_another_size_or_damaged_are_named(tmp_path: Path) -> None:
    fill(tmp_path, {"cats/a.png": 1})
    draw(tmp_path / "cats/b.png", 2, (6, 6))
    assert refusal(tmp_path) == "/cats/b.png is 6 x 6 pixels, and the pictures before it are 5 x 6"
    (tmp_path / "cats/b.png").write_bytes((tmp_path / "cats/a.png").read_bytes()[:40])
    assert refusal(tmp_path).startswith("/cats/b.png is not a sound picture")


# What `stepfusion generate` wrote


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ten images of a small model in three shards, in every format, and without labels."""
    root = tmp_path_factory.mktemp("generated")
    save_tiny_model(root / "model")
    save_tiny_model(root / "plain", num_class_embeds=None, in_channels=3, out_channels=3)
    made = {}
    for model, kind in (("model", "webdataset"), ("model", "png"), ("model", "npz"), ("plain", "png")):
        made[f"{model} {kind}"] = root / f"{model}-{kind}"
        command = [
            "generate",
            str(root / model),
            "-n",
            "10",
            "--unit",
            "4",
            "--steps",
            "1",
            "--format",
            kind,
            "--npz",
        ]
        assert main([*command, "--devices", "cpu", "--quiet", "--out", str(made[f"{model} {kind}"])]) == 0
    return made


@pytest.mark.parametrize("kind", ["webdataset", "png", "npz"])
@pytest.mark.parametrize("part", ["", "images"])
def test_generated_images_are_a_data_set(kind: str, part: str, generated: dict[str, Path]) -> None:
    out = generated[f"model {kind}"]
    dataset, whole = load_dataset(out / part), load_dataset(next(out.glob("samples_*.npz")))
    assert dataset.images.shape == (10, 1, SIZE, SIZE)
    assert torch.equal(dataset.images, whole.images)
    assert dataset.labels.tolist() == whole.labels.tolist() == [i % 3 for i in range(10)]
    assert dataset.left_out == ()


@pytest.mark.parametrize(("kind", "shard"), [("webdataset", "000001.tar"), ("png", "000001"), ("npz", "000001.npz")])
def test_one_shard_is_a_data_set(kind: str, shard: str, generated: dict[str, Path]) -> None:
    out = generated[f"model {kind}"]
    dataset, whole = load_dataset(out / "images" / shard), load_dataset(out)
    assert torch.equal(dataset.images, whole.images[4:8])
    assert dataset.labels.tolist() == whole.labels[4:8].tolist()


def test_generated_images_without_labels(generated: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(generated["plain png"])
    assert (dataset.images.shape, dataset.labels) == ((10, 3, SIZE, SIZE), None)
    monkeypatch.chdir(generated["plain png"] / "images")
    assert torch.equal(load_dataset(".").images, dataset.images)


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5, 6), value).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_webdataset_of_others(tmp_path: Path) -> None:
    members = {"b/1.cls": b"3", "b/1.png": picture(2), "../a.jpg": picture(1), "../a.cls": b"0\n", "b/1.json": b"{}"}
    dataset = load_dataset(tar(tmp_path / "a.tar", members))
    assert (values(dataset), dataset.labels.tolist()) == ([2, 1], [3, 0])
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]  # nothing is unpacked


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"1.png": picture(1), "1.cls": b"cat"}, " is not a sound tar of pictures and labels: invalid literal"),
        ({"1.png": picture(1)[:50]}, ": 1 is not a sound picture"),
        ({"1.cls": b"1"}, " holds no picture"),
    ],
)
def test_a_damaged_tar_is_named(members: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    assert refusal(tar(tmp_path / "a.tar", members)).startswith(sentence)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"1.png": picture(1), "1.cls": b"1", "2.png": picture(2)}, "has labels for 1 of its 2 pictures"),
        ({"1.png": picture(1), "1.cls": b"-1"}, "has labels from -1 to -1; accepted are 0 to 65535"),
        ({"1.png": picture(1), "1.cls": b"9999999999"}, "has labels from 9999999999 to 9999999999"),
    ],
)
def test_labels_of_shards_that_do_not_fit(members: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_dataset(tar(tmp_path / "a.tar", members))


def test_a_tar_of_noise_or_cut_short(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"1.png": picture(1), "1.cls": b"1"})
    data = path.read_bytes()
    for damaged in (b"", b"noise" * 500, data[:700], data[:520]):
        path.write_bytes(damaged)
        assert refusal(path)
    random = np.random.default_rng(0)
    for _ in range(100):
        noisy = bytearray(data)
        noisy[random.integers(0, 1600)] ^= 1 << random.integers(0, 8)
        path.write_bytes(noisy)
        with suppress(ValueError):
            load_dataset(path)


def test_a_shard_of_another_kind_is_named(tmp_path: Path) -> None:
    fill(tmp_path, {}, ("job.json", "images/000000.zip"))
    assert refusal(tmp_path) == "/images/000000.zip is no shard: neither a folder, nor a .tar or .npz file"
    (tmp_path / "images/000000.zip").unlink()
    with pytest.raises(ValueError, match="the directory of the job holds no picture"):
        load_dataset(tmp_path)
