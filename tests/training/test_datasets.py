"""Reading images: what is sound is read exactly, what is damaged is refused with a sentence that names the file."""

import gzip
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepfusion.training.array_files import MAX_DATASET_BYTES, read_idx
from stepfusion.training.datasets import load_dataset

SLICE = Path(__file__).parents[1] / "data" / "fashion-mnist-slice"


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}i", 0x0800 + values.ndim, *values.shape) + values.tobytes()


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([2, 0, 1], dtype=np.uint8)


@pytest.fixture
def idx_directory(tmp_path: Path) -> Path:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    return tmp_path


def refused(path: Path, sentence: str, *, name: str | None = None, split: str = "train") -> None:
    """`sentence` must be in the error, with the file's name."""
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_dataset(path, split)
    assert (name or path.name) in str(caught.value)


@pytest.mark.parametrize(("split", "count"), [("train", 200), ("test", 100)])
def test_the_slice_is_balanced(split: str, count: int) -> None:
    dataset = load_dataset(SLICE, split)
    assert dataset.images.shape == (count, 1, 28, 28)
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels is not None
    assert dataset.labels.dtype == torch.int64
    assert dataset.labels.bincount().tolist() == [count // 10] * 10
    assert dataset.num_classes == 10


def test_idx_plain_and_compressed(idx_directory: Path) -> None:
    dataset = load_dataset(idx_directory)
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(IMAGES))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 0, 1]
    assert len(dataset) == 3


def test_idx_without_labels(idx_directory: Path) -> None:
    (idx_directory / "train-labels-idx1-ubyte.gz").unlink()
    dataset = load_dataset(idx_directory)
    assert dataset.labels is None
    assert dataset.num_classes == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "begins with nothing"),
        (b"\x00\x00\x08", "begins with 000008"),
        (b"\x89PNG\r\n\x1a\n", "begins with 89504e47"),
        (struct.pack(">2i", 0x0D01, 3) + b"abc", "begins with 00000d01"),
        (struct.pack(">2i", 0x0803, 3), "its header ends too early"),
        (struct.pack(">4i", 0x0803, 3, 4, 5) + bytes(59), "60 bytes, but holds 59"),
        (struct.pack(">4i", 0x0803, 3, 4, 5) + bytes(61), "60 bytes, but holds more"),
        (struct.pack(">4i", 0x0803, 3, -4, 5) + bytes(60), "declares the shape [3, -4, 5]"),
        (struct.pack(">4i", 0x0803, 0, 4, 5), "declares the shape [0, 4, 5]"),
        (struct.pack(">4i", 0x0803, *[2**31 - 1] * 3), f"{MAX_DATASET_BYTES} bytes at most"),
        (idx(LABELS), "holds labels; images are needed"),
    ],
)
def test_damaged_idx(idx_directory: Path, content: bytes, sentence: str) -> None:
    path = idx_directory / "train-images-idx3-ubyte"
    path.write_bytes(content)
    refused(idx_directory, sentence, name=path.name)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-9], "the gzip stream ends too early"),
        (lambda data: data[:-8] + bytes(8), "is not a sound gzip file"),
        (lambda data: b"not gzip" + data, "is not a sound gzip file"),
        (lambda data: data[:10] + b"\xff" + data[11:], "is not a sound gzip file"),
    ],
)
def test_damaged_gzip(idx_directory: Path, damage, sentence: str) -> None:
    path = idx_directory / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    refused(idx_directory, sentence, name=path.name)


def test_labels_that_do_not_fit(idx_directory: Path) -> None:
    path = idx_directory / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(LABELS[:2])))
    refused(idx_directory, "holds 2 labels, but", name=path.name)
    path.write_bytes(gzip.compress(idx(IMAGES)))
    refused(idx_directory, "holds images; labels are needed", name=path.name)


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "is neither a directory nor an .npz file")
    refused(tmp_path, "holds neither train-images-idx3-ubyte(.gz) nor pictures (PNG, JPEG, WebP, BMP or TIFF)")
    refused(tmp_path, "split is 'validation'; accepted are 'train' and 'test'", split="validation", name="split")
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "absent-idx1-ubyte")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_folders(tmp_path: Path, mode: str) -> None:
    channels = 1 if mode == "L" else 3
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, channels), dtype=np.uint8)
    for name, chosen in (("shoes", [0, 1]), ("bags", [2, 3])):
        (tmp_path / name).mkdir()
        for number in chosen:
            Image.fromarray(pixels[number].squeeze(-1) if channels == 1 else pixels[number]).save(
                tmp_path / name / f"{number}.png"
            )
    (tmp_path / "shoes" / "notes.txt").write_text("not an image")
    dataset = load_dataset(tmp_path)
    assert dataset.class_names == ("bags", "shoes")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(dataset.images, torch.from_numpy(pixels[[2, 3, 0, 1]].transpose(0, 3, 1, 2).copy()))


def test_grey_pictures_among_coloured_ones_become_coloured(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    grey, colour = random.integers(0, 256, (6, 5), dtype=np.uint8), random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    for name, values in (("a", grey), ("b", colour)):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "0.png")
    images = load_dataset(tmp_path).images
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, 6, 5))
    assert torch.equal(images[1], torch.from_numpy(colour).permute(2, 0, 1))


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "bags"
    folder.mkdir()
    refused(tmp_path, "is the folder of a class, and holds no picture", name="bags")
    Image.new("L", (5, 6)).save(folder / "a.png")
    Image.new("L", (6, 6)).save(folder / "b.png")
    refused(tmp_path, "is 6 x 6 pixels, and the pictures before it are 5 x 6", name="b.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    refused(tmp_path, "is not a sound picture", name="b.png")
    Image.new("L", (5, 6)).save(folder / "b.gif")
    (folder / "b.gif").rename(folder / "b.png")
    refused(tmp_path, "is not a sound picture", name="b.png")


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, IMAGES[..., None], LABELS)
    dataset = load_dataset(path)
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(IMAGES))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 0, 1]
    np.savez(path, IMAGES[..., None])
    assert load_dataset(path).labels is None


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ([IMAGES], "arr_0 is uint8 [3, 4, 5]"),
        ([IMAGES[..., None].astype(np.float32)], "arr_0 is float32 [3, 4, 5, 1]"),
        ([IMAGES.reshape(3, 2, 5, 2)], "with C of 1 or 3"),
        ([IMAGES[:0, ..., None]], "arr_0 is uint8 [0, 4, 5, 1]"),
        ([IMAGES[..., None], LABELS[:2]], "arr_1 is uint8 [2]; accepted are integers [3]"),
        ([IMAGES[..., None], LABELS.astype(np.float64)], "arr_1 is float64 [3]"),
        ([IMAGES[..., None], np.array([0, -1, 1])], "labels from -1 to 1; accepted are 0 to 2"),
        ([IMAGES[..., None], np.array([0, 3, 1])], "labels from 0 to 3; accepted are 0 to 2"),
    ],
)
def test_damaged_npz(tmp_path: Path, arrays: list[np.ndarray], sentence: str) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, *arrays)
    refused(path, sentence)


def test_npz_of_other_content(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=IMAGES)
    refused(path, "it has no arr_0; it holds ['images']")
    path.write_bytes(b"PK\x03\x04 no zip")
    refused(path, "is not a sound .npz file")
    np.savez(path, IMAGES[..., None])
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, "is not a sound .npz file")


class Trap:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    path = tmp_path / "images.npz"
    np.savez(path, np.array([Trap(sprung)], dtype=object))
    refused(path, "is not a sound .npz file")
    path.write_bytes(pickle.dumps(Trap(sprung)))
    refused(path, "is not a sound .npz file")
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))  # the trap does work
    assert sprung.exists()
